"""Which kernel is fastest where a frame's queries see a prefix of the clip's keys: the reference, forward.

    python benchmarks/prefix.py

The reference sees every token, so frame f's queries see the keys of frames 0 to f: no mask is needed, only a
length. In memory, [s, rows, A, d], the heads of all clips lie side by side under every token: they are heads
of one clip, whose every frame is a sequence of its own, and the key ranges of these sequences overlap. Times
are of a CUDA graph of several calls. Rates count useful work: 4 FLOPs a channel and pair that can see.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import time
import traceback
from collections.abc import Callable

import common  # noqa: F401  (puts the clone on the path)
import replay
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextvid_mcore import recipes
from nextvid_mcore.config import ConfigError
from nextvid_mcore.models import kernels
from nextvid_mcore.models.attention import AttentionPattern, Frames, regular_pattern
from nextvid_mcore.training.graphs import own_stream

CALLS = 10  # in one graph
Heads = tuple[Tensor, Tensor, Tensor]  # q, k, v: [s, rows * A, d], views of [s, rows * A, 3, d]


class Case:
    """One layer's queries, keys and values, and what each kernel needs to know of them."""

    def __init__(self, recipe: str, frames: int, rows: int, device: torch.device) -> None:
        model = recipes.get(recipe).model
        self.recipe, self.frames, self.rows = recipe, frames, rows
        self.n, self.t = model.tokens_per_frame, model.token_frames(frames)
        self.heads, self.d, self.s = model.encoder.heads, model.encoder.head_width, self.t * self.n
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16
        shape = (self.s, rows * self.heads, 3, self.d)
        packed = torch.randn(*shape, device=device, dtype=dtype, generator=generator)
        self.qkv: Heads = packed.unbind(2)
        whole = (Frames(0, self.t, self.n),)
        self.pattern: AttentionPattern = regular_pattern(whole, whole, "causal", device)
        self.lengths = torch.arange(1, self.t + 1, device=device, dtype=torch.int32) * self.n
        pairs = self.n * self.n * self.t * (self.t + 1) // 2
        self.work = 4 * pairs * rows * self.heads * self.d

    def rowed(self, x: Tensor) -> Tensor:
        """[s, rows * A, d] as the model's kernels take it: [rows, A, s, d]."""
        return x.unflatten(1, (self.rows, self.heads)).permute(1, 2, 0, 3)

    def expected(self) -> Tensor:
        """fp32 attention of the last clip, [s, A, d]."""
        q, k, v = (self.rowed(x)[-1:].float() for x in self.qkv)
        return kernels.masked(q, k, v, self.pattern)[0].transpose(0, 1)


def flex(case: Case) -> Callable[[], Tensor]:
    q, k, v = (case.rowed(x) for x in case.qkv)
    return lambda: kernels.flex(q, k, v, case.pattern).permute(2, 0, 1, 3).flatten(1, 2)


@functools.cache
def handle() -> object:
    import cudnn

    return cudnn.create_handle()


def cudnn_graph(case: Case, ragged: bool, by_clip: bool = False) -> Callable[[], Tensor]:
    """Batch: frames (by_clip: clips x frames); heads: of all clips (one clip); keys begin at token 0.

    ragged: where each sequence begins is told in offsets, else by strides, that of the keys' batch being 0.
    """
    import cudnn

    q, k, v = case.qkv
    device, n, t, d, s = q.device, case.n, case.t, case.d, case.s
    rows = case.rows if by_clip else 1
    heads = q.shape[1] // rows
    out = torch.empty(s, q.shape[1], d, device=device, dtype=q.dtype)
    lengths_q, lengths_k = torch.full_like(case.lengths, n).repeat(rows), case.lengths.repeat(rows)
    half = cudnn.data_type.BFLOAT16
    graph = cudnn.pygraph(
        io_data_type=half,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle(),
    )
    b = rows * t
    frame, clip = torch.arange(t, device=device).repeat(rows), torch.arange(rows, device=device)
    clip = clip.repeat_interleave(t)
    feeds = {}

    def offsets(x: Tensor, tokens: int, name: str) -> object:
        starts = clip * heads * x.stride(1) + frame * tokens * x.stride(0)
        starts = torch.cat([starts, starts[-1:]]).long()
        node = graph.tensor(
            dim=(b + 1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=cudnn.data_type.INT64, name=name
        )
        feeds[node] = starts
        return node

    def strides(x: Tensor, queries: bool) -> tuple[int, ...]:
        batch = n * x.stride(0) if queries else (s * x.stride(0) if ragged else 0)
        return (batch, x.stride(1), x.stride(0), 1)

    nodes = []
    for name, x in zip("qkv", (q, k, v), strict=True):
        queries = name == "q"
        shape = (b, heads, n if queries else s, d)
        node = graph.tensor(dim=shape, stride=strides(x, queries), data_type=half, name=name)
        if ragged:
            node.set_ragged_offset(offsets(x, n if queries else 0, f"{name}_offset"))
        feeds[node] = x
        nodes.append(node)
    told = []
    for name, lengths in (("q_length", lengths_q), ("k_length", lengths_k)):
        node = graph.tensor(dim=(b, 1, 1, 1), stride=(1, 1, 1, 1), data_type=cudnn.data_type.INT32, name=name)
        feeds[node] = lengths.contiguous()
        told.append(node)
    o, _ = graph.sdpa(
        name="prefix",
        q=nodes[0],
        k=nodes[1],
        v=nodes[2],
        generate_stats=False,
        attn_scale=1 / math.sqrt(d),
        use_padding_mask=True,
        seq_len_q=told[0],
        seq_len_kv=told[1],
    )
    o.set_output(True).set_dim((b, heads, n, d)).set_stride(strides(out, True))
    if ragged:
        o.set_ragged_offset(offsets(out, n, "o_offset"))
    feeds[o] = out
    cudnn.set_stream(handle=handle(), stream=torch.cuda.current_stream().cuda_stream)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(graph.get_workspace_size(), 1), device=device, dtype=torch.uint8)
    pointers = {node: x.data_ptr() for node, x in feeds.items()}

    def call() -> Tensor:
        cudnn.set_stream(handle=handle(), stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(pointers, workspace.data_ptr(), handle=handle())
        return out

    call.keeps = feeds, workspace
    return call


def flash(case: Case) -> Callable[[], Tensor]:
    q, k, v = case.qkv
    starts_q = torch.arange(case.t + 1, device=q.device, dtype=torch.int32) * case.n
    starts_k = torch.zeros_like(starts_q)
    return lambda: torch.ops.aten._flash_attention_forward(
        q, k, v, starts_q, starts_k, case.n, case.s, 0.0, False, False, seqused_k=case.lengths
    )[0]


def te(case: Case, by_clip: bool) -> Callable[[], Tensor]:
    """cuDNN by Transformer Engine: contiguous copies (of each clip, or of all clips' heads)."""
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_fwd

    rows, heads = (case.rows, case.heads) if by_clip else (1, case.rows * case.heads)
    t, n, device = case.t, case.n, case.qkv[0].device

    def cumulative(lengths: Tensor) -> Tensor:
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])

    lengths = cumulative(case.lengths.repeat(rows))
    starts = torch.arange(rows * t + 1, device=device, dtype=torch.int32)
    starts_q, starts_k = starts * n, torch.div(starts, t, rounding_mode="floor").int() * case.s

    def copies() -> list[Tensor]:
        return [
            x.unflatten(1, (rows, heads)).transpose(0, 1).reshape(-1, heads, case.d).contiguous()
            for x in case.qkv
        ]

    def call() -> Tensor:
        out = fused_attn_fwd(
            False,
            n,
            case.s,
            starts_q,
            lengths,
            *copies(),
            torch.bfloat16,
            FusedAttnBackend["F16_arbitrary_seqlen"],
            cu_seqlens_q_padded=starts_q,
            cu_seqlens_kv_padded=starts_k,
            qkv_layout="thd_thd_thd",
            o_format="thd",
            attn_mask_type="padding",
        )[0]
        return out.view(rows, case.s, heads, case.d).transpose(0, 1).flatten(1, 2)

    return call


def a_frame(case: Case) -> Callable[[], Tensor]:
    q, k, v = (x.transpose(0, 1)[None] for x in case.qkv)  # [1, rows * A, s, d]
    cuts = [slice(f * case.n, (f + 1) * case.n) for f in range(case.t)]

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            parts = [kernels.plain(q[:, :, x], k[:, :, : x.stop], v[:, :, : x.stop]) for x in cuts]
        return torch.cat([x[0].transpose(0, 1) for x in parts])

    return call


def prefix(case: Case, module: str) -> Callable[[], Tensor]:
    attend = importlib.import_module(f"nextvid_mcore.models.{module}").attend
    q, k, v = (case.rowed(x) for x in case.qkv)
    return lambda: attend(q, k, v, case.n).permute(2, 0, 1, 3).flatten(1, 2)


KERNELS: dict[str, Callable[[Case], Callable[[], Tensor]]] = {
    "gluon": functools.partial(prefix, module="gluon_prefix"),
    "triton": functools.partial(prefix, module="triton_prefix"),
    "flex": flex,
    "cudnn strides": functools.partial(cudnn_graph, ragged=False),
    "cudnn ragged": functools.partial(cudnn_graph, ragged=True),
    "cudnn ragged clips": functools.partial(cudnn_graph, ragged=True, by_clip=True),
    "cudnn a frame": a_frame,
    "flash 2": flash,
    "te": functools.partial(te, by_clip=False),
    "te clips": functools.partial(te, by_clip=True),
}


def milliseconds(call: Callable[[], Tensor], repeats: int) -> tuple[float, str]:
    """Of one call, and how it was timed."""

    def work() -> None:
        for _ in range(CALLS):
            call()

    try:
        return 1e3 * replay.seconds(work, repeats) / CALLS, ""
    except Exception as problem:
        traceback.print_exc(limit=3)
        torch.cuda.synchronize()
        return 1e3 * replay.median(work, repeats) / CALLS, f"eager ({type(problem).__name__})"


def line(case: Case, name: str, wanted: Tensor, repeats: int) -> tuple[str, float]:
    begun = time.perf_counter()
    head = f"{case.recipe:<6}{case.frames:>3} x {case.rows:<2} {name:<22}"
    try:
        with torch.no_grad():
            call = KERNELS[name](case)
            found = call()[:, -case.heads :].float()
            worst = ((found - wanted).norm() / wanted.norm()).item()
            ms, how = milliseconds(call, repeats)
    except Exception as problem:  # one kernel's refusal must not cost the others' figures
        text = "".join(traceback.format_exception(problem)).strip().splitlines()
        print("\n".join(text[-12:]), flush=True)
        return f"{head} {type(problem).__name__}: {str(problem)[-150:]!r}", math.nan
    rate, took = case.work / ms / 1e9, time.perf_counter() - begun
    return f"{head} {ms:>8.3f} {rate:>8.0f} {worst:>9.1e} {took:>6.1f} {how}", ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["vit_g:16:16", "vit_g:64:4", "vit_l:16:32"])
    parser.add_argument("--kernels", nargs="+", help="those whose name begins so")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=38, help="seconds after which no line begins")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is visible")
    begun, found = time.perf_counter(), {}
    own_stream()

    cases = []
    for text in args.cases:
        try:
            recipe, frames, rows = text.split(":")
            cases.append(Case(recipe, int(frames), int(rows), torch.device("cuda")))
        except (ValueError, ConfigError) as error:
            parser.error(f"--cases {text}: write RECIPE:FRAMES:CLIPS, as vit_g:16:16 ({error})")
    wanted = [case.expected() for case in cases]
    print(f"ready after {time.perf_counter() - begun:.0f} s", flush=True)
    for name in KERNELS:
        if args.kernels and not name.startswith(tuple(args.kernels)):
            continue
        for case, expected in zip(cases, wanted, strict=True):
            if time.perf_counter() - begun > args.limit:
                print(f"{name} {case.recipe}: not begun within {args.limit:.0f} s", flush=True)
                continue
            found[case, name] = line(case, name, expected, args.repeats)
            print(found[case, name][0], flush=True)
    gpu = torch.cuda.get_device_name()
    print(f"\nfrom packed q, k, v; forward, bf16, one layer, CUDA graph of {CALLS} calls; {gpu}")
    names = ("recipe, frames x clips, kernel", "ms", "TFLOP/s", "error", "all s", "times flex")
    print("{:<37} {:>8} {:>8} {:>9} {:>6} {}".format(*names))
    for case in cases:
        flex_ms = found.get((case, "flex"), ("", math.nan))[1]
        for (of, _), (text, ms) in found.items():
            if of is case:
                print(text if math.isnan(ms) else f"{text} {flex_ms / ms:.2f}", flush=True)


if __name__ == "__main__":
    main()
