"""FP8 without a GPU: what is refused and why, and what megatron-core is told."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from nextvid_mcore import cli, recipes
from nextvid_mcore.config import ConfigError, Fp8Config
from nextvid_mcore.models import fp8, specs
from nextvid_mcore.parallel.memory import rank_memory
from nextvid_mcore.parallel.plan import check


def plan(line: str, world: int = 1):
    config, _ = cli.parse([*line.split(), "--dry-run"])
    return check(config, world, dry_run=True)


TE = "--model.backend te"


def test_one_flag_switches_all_roles_and_each_can_differ():
    config, _ = cli.parse(f"vit_l --dry-run {TE} --fp8.all current --fp8.decoder none".split())
    assert config.fp8.used == {"student": "current", "reference": "current", "predictor": "current"}
    config, _ = cli.parse(f"vit_l --dry-run {TE} --fp8.reference delayed".split())
    assert config.fp8.used == {"reference": "delayed"}
    assert recipes.get("vit_l").fp8.used == {}


@pytest.mark.parametrize("recipe", ["current", "delayed", "blockwise", "mxfp8"])
@pytest.mark.parametrize(
    ("run", "world"),
    [
        ("vit_g", 1),
        ("vit_h", 1),
        ("vit_l", 1),
        ("vit_g --parallel.encoder.tensor 2 --parallel.sequence --parallel.encoder.pipeline 2", 4),
        ("vit_l --model.context joint --model.condition cross_self", 1),
    ],
)
def test_the_papers_shapes_are_fit_for_fp8(run: str, world: int, recipe: str):
    plan(f"{run} {TE} --fp8.all {recipe} --train.micro-batch 4", world)


@pytest.mark.parametrize(
    ("line", "world", "said"),
    [
        ("tiny --fp8.student current", 1, "fp8 (student current) runs in Transformer Engine's linears; use"),
        (f"vit_l {TE} --fp8.all current --train.precision fp32", 1, "goes with --train.precision bf16"),
        (f"vit_l {TE} --fp8.all current --mask.mode packed", 1, "mask mode packed changes it"),
        (f"vit_l {TE} --fp8.all delayed --fp8.bf16-first 1", 1, "fp8 bf16_first 1: recipe delayed"),
        (f"vit_l {TE} --fp8.all current --fp8.bf16-last 13", 1, "more than the predictor's 12 layers"),
        (f"vit_l {TE} --fp8.all current --fp8.bf16-last -1", 1, "must be 0 or more layers, got -1"),
        (
            f"tiny {TE} --fp8.predictor current --train.precision bf16 --predictor-width",
            1,
            "fp8 predictor current: width 40 over tensor parallel 1 is 40 on a rank, which is no multi",
        ),
        (
            f"vit_g {TE} --fp8.student mxfp8 --parallel.encoder.tensor 2 --parallel.sequence "
            "--train.micro-batch 1",
            2,
            "fp8 student mxfp8, stage warmup: 1 clip of 504 student tokens on a rank make 504, no multiple "
            "of "
            "32; use a micro-batch (in the held-out loss: eval batch and samples) that is a multiple of 4",
        ),
        (
            f"vit_g {TE} --fp8.all current --parallel.encoder.tensor 2 --parallel.sequence "
            "--train.micro-batch 2 --eval.every 10 --eval.batch 4 --eval.samples 9",
            2,
            "fp8 student current, the held-out loss: 1 clip of 504 student tokens on a rank make 504, no",
        ),
        (
            f"vit_g {TE} --fp8.all current --mask.keep 0.375 0.19140625 --train.micro-batch 4",
            1,
            "fp8 student current, stage warmup: 4 clips of 1015 student tokens on a rank make 4060, no",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_numbers(line: str, world: int, said: str):
    if "--predictor-width" in line:
        line = line.replace("--predictor-width", "--model.predictor.width 40 --model.decoder.width 40")
    with pytest.raises(ConfigError) as error:
        plan(line, world)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_without_alignment_the_reference_is_asked_for_an_online_knn_alone():
    plan(f"table5_cross {TE} --fp8.all current", 1)
    odd = f"tiny {TE} --train.precision bf16 --fp8.reference current --model.align False --mask.keep 0.5 0.25"
    odd += " --model.image-size 48 --train.micro-batch 1"  # 4 x 36 tokens in stage 1, 8 x 36 in the last
    assert plan(f"{odd} --stages.0.frames 10", 1)
    with pytest.raises(ConfigError, match="fp8 reference current, stage warmup: 1 clip of 180 reference tok"):
        plan(f"{odd} --stages.0.frames 10 --eval.knn-every 5", 1)


def on(monkeypatch, name: str, capability: tuple[int, int], cuda: str = "13.0") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("recipe", "gpu", "said"),
    [
        (
            "current",
            ("NVIDIA A100", (8, 0)),
            "A100 (compute capability 8.0): it needs compute capability 8",
        ),
        ("current", ("NVIDIA A100", (8, 0)), "use --fp8.student none (bf16)"),
        ("mxfp8", ("NVIDIA H100", (9, 0)), "fp8 student mxfp8 does not run on NVIDIA H100 (compute capa"),
        ("mxfp8", ("NVIDIA H100", (9, 0)), "use --fp8.student current or none"),
        ("mxfp8", ("NVIDIA RTX", (12, 0)), "for compute capability 10 and 11 alone"),
        ("blockwise", ("NVIDIA L40", (8, 9)), "it needs compute capability 9.0"),
        ("blockwise", ("NVIDIA H100", (9, 0), "12.8"), "needs CUDA 12.9, and torch was built with 12.8"),
    ],
)
def test_a_gpu_that_cannot_is_named(monkeypatch, recipe: str, gpu: tuple, said: str):
    on(monkeypatch, *gpu)
    with pytest.raises(ConfigError) as error:
        fp8.check_gpu(Fp8Config(student=recipe))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_gpu_that_can_is_not_refused(monkeypatch):
    on(monkeypatch, "NVIDIA H100", (9, 0))
    fp8.check_gpu(Fp8Config(all="current", reference="delayed", predictor="blockwise"))
    on(monkeypatch, "NVIDIA B200", (10, 0))
    fp8.check_gpu(Fp8Config(all="mxfp8"))


def test_without_cuda_or_te_a_start_is_refused(monkeypatch):
    from megatron.core.extensions import transformer_engine as te

    config, _ = cli.parse(f"vit_l --dry-run {TE} --fp8.all current --target.kind pixels".split())
    monkeypatch.setattr(te, "HAVE_TE", False)
    with pytest.raises(ConfigError, match="needs Transformer Engine, which is not installed"):
        check(config, 1)
    monkeypatch.setattr(te, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for asked in (config, config.altered(model={"backend": "auto"})):  # fp8 leaves auto no choice
        with pytest.raises(ConfigError, match="needs a CUDA GPU and none is visible"):
            check(asked, 1)


@pytest.mark.parametrize("recipe", ["none", "current", "delayed", "blockwise", "mxfp8"])
def test_megatron_core_is_told_the_recipe(recipe: str):
    run = recipes.get("vit_l")
    split = specs.Split(dtype=torch.bfloat16, fp8=fp8.settings(Fp8Config(student=recipe), "student"))
    config = specs.transformer_config(run.model.encoder, run.model, split)
    names = {"none": None, "current": "tensorwise"}
    assert config.fp8 == (None if recipe == "none" else "hybrid")
    assert recipe == "none" or config.fp8_recipe == names.get(recipe, recipe)
    assert not config.fp8_param  # weights stay bf16
    assert fp8.settings(Fp8Config(student=recipe), "decoder") == {}


def test_layers_that_stay_in_bf16():
    found = fp8.settings(Fp8Config(all="current", bf16_first=1, bf16_last=2), "decoder")
    run = recipes.get("vit_l")
    config = specs.transformer_config(run.model.decoder, run.model, specs.Split(fp8=found))
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    kept = [layer for layer in range(12) if is_first_last_bf16_layer(config, layer)]
    assert kept == [0, 10, 11]


def test_delayed_reduces_over_the_roles_own_group(monkeypatch):
    """TE would take the whole world where megatron-core's global groups are not set."""
    from megatron.core.transformer import transformer_block

    seen = {}
    te = ModuleType("transformer_engine.pytorch")
    te.autocast = lambda **given: seen.update(given) or "context"
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)
    monkeypatch.setattr(fp8, "_delayed_recipe", lambda fp8_format: f"delayed {fp8_format}")
    monkeypatch.setattr(transformer_block, "get_fp8_context", transformer_block.get_fp8_context)
    run = recipes.get("vit_l")
    for recipe, wanted in (("delayed", "group"), ("current", None)):
        seen.clear()
        split = specs.Split(fp8=fp8.settings(Fp8Config(all=recipe), "student"))
        config = specs.transformer_config(run.model.encoder, run.model, split)
        fp8.reduce_over(config, "group")
        transformer_block.get_fp8_context(config)
        assert seen.get("amax_reduction_group") == wanted
        assert seen.get("recipe") == (wanted and "delayed hybrid")


def test_delayed_asks_the_tensor_ranks_alone(monkeypatch):
    """Data ranks would stand in every recorded pass; they multiply nothing of each other's."""
    from megatron.core.transformer import transformer_block

    monkeypatch.setattr(transformer_block, "get_fp8_context", transformer_block.get_fp8_context)
    monkeypatch.setattr(
        specs, "TransformerBlock", lambda config, **given: SimpleNamespace(config=config, layers=[])
    )
    run, groups = recipes.get("vit_l"), SimpleNamespace(tp="tensor", tp_dp_cp="tensor and data")
    for recipe, wanted in (("delayed", "tensor"), ("current", None)):
        split = specs.Split(fp8=fp8.settings(Fp8Config(all=recipe), "student"))
        config = specs.transformer_config(run.model.encoder, run.model, split)
        built = specs.build_block(config, "layer", 1, None, groups)
        assert getattr(built.config, "amax_group", None) == wanted


def test_weights_are_quantised_again_every_step():
    """megatron-core's schedule tells a model so; it does not know ours, which hides in a StageModel."""
    from megatron.core.transformer.module import MegatronModule

    class Linear(torch.nn.Module):
        is_first_microbatch = False

    network = MegatronModule(SimpleNamespace(fp8="hybrid", fp4=None))
    network.linear = Linear()
    plain = MegatronModule(SimpleNamespace(fp8=None, fp4=None))
    plain.linear = Linear()
    fp8.quantise_again([network, plain])
    assert network.linear.is_first_microbatch and not plain.linear.is_first_microbatch


def test_a_run_that_records_keeps_no_weights():
    from megatron.core.transformer.module import MegatronModule

    network = MegatronModule(SimpleNamespace(fp8="hybrid", fp4=None))
    network.linear = torch.nn.Module()
    network.linear.disable_parameter_transpose_cache, network.linear._fp8_workspaces = False, {"weight": 1}
    fp8.cache_weights([network], False)
    assert network.linear.disable_parameter_transpose_cache
    assert not network.linear._fp8_workspaces  # an eager pass before has left none
    fp8.cache_weights([network], True)
    assert not network.linear.disable_parameter_transpose_cache


def test_quantised_weights_are_counted():
    """ViT-L's encoder has 303.9M parameters: two bytes more for the student's, one for the reference's."""

    def held(line: str):
        config, _ = cli.parse(f"vit_l --dry-run {TE} {line}".split())
        return rank_memory(config, check(config, 1, dry_run=True), 0, config.stages[0])

    plain, quantised = held(""), held("--fp8.student current --fp8.reference current")
    assert quantised.weights - plain.weights == pytest.approx(2 * 303.9e6, rel=0.01)
    assert quantised.reference - plain.reference == pytest.approx(303.9e6, rel=0.01)


def test_only_delayed_rehearses_its_first_step():
    assert fp8.rehearsals(Fp8Config(all="current", reference="delayed")) > 0
    assert fp8.rehearsals(Fp8Config(all="blockwise")) == fp8.rehearsals(Fp8Config()) == 0


def test_a_checkpoint_of_another_precision_or_backend_is_the_same_model(monkeypatch):
    from nextvid_mcore.training import checkpoint

    there, _ = cli.parse("vit_l --dry-run".split())
    here, _ = cli.parse(f"vit_l --dry-run {TE} --fp8.all current --no-model.compile".split())
    monkeypatch.setattr(checkpoint, "read_state", lambda path: {"config": json.loads(there.to_json())})
    checkpoint.check_model("somewhere", here)


def test_an_evaluation_leaves_delayed_as_it_was():
    """The probe's passes write largest values; a recorded pass reads the very memory, so that must stay."""

    def network(recipe: str) -> torch.nn.Module:
        module = torch.nn.Module()
        module.config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
        module.linear = torch.nn.Linear(1, 1)
        state = SimpleNamespace(scale=torch.full((3,), 2.0), amax_history=torch.zeros(4, 3))
        module.linear.fp8_meta = {"scaling_fwd": state, "recipe": None}
        return module

    delayed, current = network("delayed"), network("tensorwise")
    states = [module.linear.fp8_meta["scaling_fwd"] for module in (delayed, current)]
    places = [states[0].scale.data_ptr(), states[0].amax_history.data_ptr()]
    with pytest.raises(KeyError), fp8.scales_kept([delayed, current]):
        for state in states:
            state.scale.fill_(7)
            state.amax_history[0] = 9
        raise KeyError
    assert states[0].scale.tolist() == [2] * 3 and not states[0].amax_history.any()
    assert places == [states[0].scale.data_ptr(), states[0].amax_history.data_ptr()]
    assert states[1].scale.tolist() == [7] * 3  # `current` has no state to speak of


def test_the_references_scales_are_renewed_in_training_alone(monkeypatch):
    called = []
    te = ModuleType("transformer_engine.pytorch.quantization")
    te.FP8GlobalStateManager = SimpleNamespace(
        reduce_and_update_fp8_tensors=lambda forward: called.append(forward)
    )
    monkeypatch.setitem(sys.modules, te.__name__, te)
    for recipe, wanted in (("delayed", [True]), ("tensorwise", [])):
        called.clear()
        network = SimpleNamespace(config=SimpleNamespace(fp8="hybrid", fp8_recipe=recipe))
        with torch.no_grad():
            fp8.update_scales(network)
        assert called == []
        fp8.update_scales(network)
        assert called == wanted
