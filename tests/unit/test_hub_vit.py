"""The plain encoder: shapes, causality, masks, layers, other sizes, and what it says of bad input."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nextvid_mcore import rope
from nextvid_mcore.hub import vit

SIZES = dict(
    image_size=32, frames=8, patch_size=8, tubelet_size=2, width=48, depth=3, heads=4, mlp_width=96,
    norm_eps=1e-6, rope_base=10000.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> vit.VisionTransformer:
    torch.manual_seed(0)
    model = vit.VisionTransformer.from_config(SIZES | {"predictor_width": 5}).eval()
    for parameter in model.parameters():  # no zero biases, no unit norms: every term counts
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def video(batch: int = 2, frames: int = 8, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("head_width", [12, 24, 32, 64, 80])
def test_rope_is_the_training_codes(head_width: int) -> None:
    positions = vit.grid_positions(32, 3, 5)
    assert torch.equal(positions, rope.grid_positions(32, 3, 5))
    mine = vit.rope_angles(positions, head_width, 10000.0)
    theirs = rope.angles(positions, head_width, 10000.0)
    assert mine.shape == theirs.shape == (480, 6 * (head_width // 6))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    x = torch.randn(2, 3, 480, head_width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vit.rotate(x, mine[None, None]), rope.rotate(x, theirs), rtol=0, atol=2e-5)


def test_output_is_ordered_by_frame_row_column(encoder: vit.VisionTransformer) -> None:
    clip = video()
    assert encoder(clip).shape == (2, 4 * 16, 48)
    patch = clip[1, :, 4:6, 8:16, 24:32].flatten()  # frame 2, row 1, column 3
    assert torch.equal(encoder.patchify(clip)[1, (2 * 4 + 1) * 4 + 3], patch)


def test_a_frame_sees_itself_and_the_past(encoder: vit.VisionTransformer) -> None:
    clip = video()
    changed = clip.clone()
    changed[:, :, 4:6, 8:16, 8:16] += 0.5  # one patch of token frame 2
    a, b = encoder(clip).unflatten(1, (4, 16)), encoder(changed).unflatten(1, (4, 16))
    assert torch.equal(a[:, :2], b[:, :2])
    assert ((a - b)[:, 2:].abs().amax(-1) > 1e-4).all()  # every token of frames 2 and 3


def test_frame_by_frame_equals_one_mask(encoder: vit.VisionTransformer) -> None:
    clip, everyone = video(), torch.arange(64).repeat(2, 1)
    shuffled = everyone[:, torch.randperm(64, generator=torch.Generator().manual_seed(2))]
    frames = shuffled // 16
    assert isinstance(vit.frame_plan(frames, frames), torch.Tensor)
    assert vit.frame_plan(everyone // 16, everyone // 16) == [(16, 16), (16, 32), (16, 48), (16, 64)]
    whole = encoder(clip)
    torch.testing.assert_close(encoder(clip, everyone), whole, rtol=0, atol=1e-5)
    by_mask = encoder(clip, shuffled)
    torch.testing.assert_close(by_mask, whole[0:2, shuffled[0]], rtol=0, atol=1e-5)


def test_strict_plan_leaves_the_own_frame_out() -> None:
    queries, keys = torch.tensor([[1, 1, 2]]), torch.tensor([[0, 0, 1, 2]])
    assert vit.frame_plan(queries, keys, strict=True) == [(2, 2), (1, 3)]
    ragged = vit.frame_plan(queries, torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2]]), strict=True)
    assert ragged[:, 0].tolist() == [
        [[True, True, False, False]] * 2 + [[True, True, True, False]],
        [[True, False, False, False]] * 2 + [[True, True, True, False]],
    ]


def test_hidden_tokens_have_no_influence(encoder: vit.VisionTransformer) -> None:
    clip = video()
    ids = torch.tensor([[0, 5, 17, 18, 40], [3, 4, 20, 31, 63]])  # ragged over frames
    changed = encoder.patchify(clip)
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter(1, ids, False)
    assert torch.equal(encoder(clip, ids), encoder(clip, ids))
    original, masked = encoder.patchify, encoder(clip, ids)
    try:
        encoder.patchify = lambda _: torch.where(hidden[..., None], torch.full_like(changed, 9.0), changed)
        assert torch.equal(encoder(clip, ids), masked)
    finally:
        encoder.patchify = original
    assert not torch.allclose(encoder(clip)[0, ids[0]], masked[0], atol=1e-3)
    several = encoder(clip, [ids, ids[:, :2]])
    assert torch.equal(several[0], masked) and several[1].shape == (2, 2, 48)


def test_layers(encoder: vit.VisionTransformer) -> None:
    clip = video(1)
    seen = {}
    handles = [
        block.register_forward_hook(lambda module, args, out, i=i: seen.__setitem__(i, out))
        for i, block in enumerate(encoder.blocks)
    ]
    last, first = encoder(clip, return_layers=[-1, 0])
    raw = encoder(clip, return_layers=[1], norm_layers=False)
    for handle in handles:
        handle.remove()
    assert torch.equal(last, encoder(clip)) and torch.equal(first, encoder.norm(seen[0]))
    assert torch.equal(raw[0], seen[1])
    nested = encoder(clip, [torch.tensor([[1, 2]])], return_layers=[0, 1, 2])
    assert len(nested) == 1 and [x.shape for x in nested[0]] == [(1, 2, 48)] * 3


def test_other_sizes_and_positions(encoder: vit.VisionTransformer) -> None:
    assert encoder(video(1, 2, 48, 16)).shape == (1, 1 * 6 * 2, 48)
    assert encoder(video(1, 20)).shape == (1, 10 * 16, 48)
    clip, grid = video(1), vit.grid_positions(4, 4, 4)
    torch.testing.assert_close(encoder(clip, positions=grid + 7), encoder(clip), rtol=0, atol=1e-4)
    assert not torch.allclose(encoder(clip, positions=grid * 2), encoder(clip), atol=1e-3)


def test_sixty_four_frames_need_no_square_mask(encoder: vit.VisionTransformer) -> None:
    features = encoder(video(1, 64))
    torch.testing.assert_close(features[:, :64], encoder(video(1, 64)[:, :, :8]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "clip, message",
    [
        (torch.zeros(3, 8, 32, 32), r"\(3, 8, 32, 32\): give \[B, 3, T, H, W\]"),
        (torch.zeros(1, 8, 3, 32, 32), r"\[B, 3, T, H, W\]"),
        (torch.zeros(1, 3, 7, 32, 32), r"T \(frames\) must be a multiple of 2, e.g. 6 or 8"),
        (torch.zeros(1, 3, 1, 32, 32), "e.g. 2; a picture is a clip of equal frames"),
        (torch.zeros(1, 3, 8, 36, 32), "H must be a multiple of 8, e.g. 32 or 40"),
        (torch.zeros(1, 3, 8, 32, 4), "W must be a multiple of 8, e.g. 8"),
        (torch.zeros(1, 3, 8, 32, 32, dtype=torch.uint8), "uint8: give floats"),
    ],
)
def test_bad_videos(encoder: vit.VisionTransformer, clip: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(clip)


def test_bad_settings(encoder: vit.VisionTransformer) -> None:
    for tokens in (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4), torch.zeros(2, 0).long()):
        with pytest.raises(ValueError, match="give int64 ids"):
            encoder(video(), tokens)
    with pytest.raises(ValueError, match="token ids 2 to 64: the clip's tokens are 0 to 63"):
        encoder(video(), torch.tensor([[2, 64], [3, 4]]))
    with pytest.raises(ValueError, match="block 3 of 3"):
        encoder(video(), return_layers=[3])
    with pytest.raises(ValueError, match="lacks heads"):
        vit.VisionTransformer.from_config({k: v for k, v in SIZES.items() if k != "heads"})
    with pytest.raises(ValueError, match="positions have shape"):
        encoder(video(), positions=torch.zeros(3, 3))


def test_bfloat16_and_training(encoder: vit.VisionTransformer) -> None:
    half = vit.VisionTransformer.from_config(SIZES)
    half.load_state_dict(encoder.state_dict())
    out = half.to(torch.bfloat16)(video())
    assert out.dtype == torch.bfloat16
    assert (out.float() - encoder(video())).abs().max() < 0.1 * encoder(video()).abs().max()
    out.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in half.parameters())


def test_the_file_works_alone(tmp_path: Path) -> None:
    shutil.copy(vit.__file__, tmp_path / "vit.py")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import vit, torch\n"
        f"encoder = vit.VisionTransformer.from_config({SIZES!r})\n"
        "assert encoder(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 32, 48)\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "bad = loaded & {'nextvid_mcore', 'megatron', 'einops', 'safetensors'}\n"
        "assert not bad, bad\n"
    )
    subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path)], check=True, cwd=tmp_path, timeout=120
    )
