"""The whole training step against plain PyTorch: the hub's networks, the paper's equations, torch's AdamW."""

from __future__ import annotations

import copy

import parity
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvid_mcore import flow, hub
from nextvid_mcore.config import RunConfig
from nextvid_mcore.hub.export import flat_config, to_hub
from nextvid_mcore.masking import draw_visible
from nextvid_mcore.models.nextvid import NextVid
from nextvid_mcore.schedule import StagePoint
from nextvid_mcore.training.step import TrainStep

NETWORKS = {"encoder": hub.VisionTransformer, "predictor": hub.Predictor, "decoder": hub.Decoder}


def states(model: NextVid) -> dict[str, dict[str, Tensor]]:
    """Copies of the weights under the hub's names."""
    projection = model.student.context_projection.named_parameters(prefix="context_projection")
    parts = {
        "encoder": model.student.encoder.named_parameters(),
        "predictor": [*projection, *model.predictor.named_parameters()],
        "decoder": model.decoder.named_parameters(),
        "reference": model.reference.named_parameters(),
    }
    shapes = model.run.model
    return copy.deepcopy({name: to_hub(named, shapes.shape(name).heads) for name, named in parts.items()})


def losses(config: RunConfig, nets: dict[str, nn.Module], point: StagePoint) -> tuple[Tensor, Tensor]:
    """Eq. 8 and 5 of a step, clip by clip, mask by mask, frame by frame and tau by tau."""
    n, K, seed = config.model.tokens_per_frame, point.stage.tau_samples, config.train.seed
    t = config.model.token_frames(point.stage.frames)
    flows, aligns = [], []
    for batch in parity.clips(config, point, 0, 1):
        for clip, index in zip(batch.video, batch.index.tolist(), strict=True):
            video = (clip[None].float() / 255 - 0.5) / 0.5
            latents = nets["encoder"].patchify(video)[0].split(n)  # pixels: a frame's own patches
            with torch.no_grad():
                features = F.layer_norm(nets["reference"](video), (config.model.encoder.width,), eps=1e-6)
            masks = draw_visible(config.mask, config.model.grid, seed, index)
            tau, noise = flow.draw(seed, [index], len(masks), t - 1, K, n, latents[0].shape[-1])
            for m, places in enumerate(masks):
                # all frames: a last one that is never read takes part as well
                tokens = torch.cat([torch.from_numpy(places) + frame * n for frame in range(t)])[None]
                context = nets["encoder"](video, tokens)
                for frame in range(1, t):
                    z, aligned = nets["predictor"](context, tokens, frames=[frame])
                    wanted = features[:, frame * n : (frame + 1) * n]
                    aligns.append((aligned - wanted).square().mean())
                    for k in range(K):
                        at, h0, h1 = tau[0, m, frame - 1, k], noise[0, m, frame - 1, k], latents[frame]
                        velocity = nets["decoder"](((1 - at) * h0 + at * h1)[None], at.view(1, 1), z)
                        flows.append((velocity[0] - (h1 - h0)).square().mean())
    return torch.stack(flows).mean(), torch.stack(aligns).mean()


def optimizer(modules: list[nn.Module]) -> torch.optim.AdamW:
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if (p.dim() > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, 0.04), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


@pytest.mark.parametrize("micro", [1, 2])
def test_three_steps_over_two_stages_are_those_of_plain_pytorch(micro: int):
    """Of a second stage with more frames, another flow learning rate and fewer tau samples."""
    config = parity.small().altered(optim={"ema": 0.9, "clip": 0.3}, train={"micro_batch": micro})
    step: TrainStep = parity.built(config)
    before, sizes = states(step.model), flat_config(config, step.target.channels, 0, "online")
    nets = {name: kind.from_config(sizes) for name, kind in NETWORKS.items()}
    for name, module in nets.items():
        module.load_state_dict(before[name])
    nets["reference"] = copy.deepcopy(nets["encoder"])
    others, decoder = optimizer([nets["encoder"], nets["predictor"]]), optimizer([nets["decoder"]])
    trained = [p for name in NETWORKS for p in nets[name].parameters()]
    clipped = 0
    for number, (lr, lr_flow) in enumerate(((1e-3, 1e-3), (9e-4, 9e-4), (8e-4, 2e-3))):
        point = parity.schedule(config).at(number)
        flow_loss, align_loss = losses(config, nets, point)
        result = step.run(point, parity.clips(config, point, 0, 1))
        assert result.loss_flow == pytest.approx(flow_loss.item(), rel=1e-5)
        assert result.loss_align == pytest.approx(align_loss.item(), rel=1e-5)
        total = 0.5 * flow_loss + 1.0 * align_loss
        assert result.loss == pytest.approx(total.item(), rel=1e-5)
        for each, rate in ((others, lr), (decoder, lr_flow)):
            each.zero_grad()
            for group in each.param_groups:
                group["lr"] = rate
        total.backward()
        norm = nn.utils.clip_grad_norm_(trained, 0.3).item()
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)
        clipped += norm > 0.3
        others.step()
        decoder.step()
        with torch.no_grad():
            for mean, now in zip(nets["reference"].parameters(), nets["encoder"].parameters(), strict=True):
                mean.copy_(0.9 * mean + 0.1 * now)
    assert clipped, "the norm was never cut, so clipping was never tested"
    for name, after in states(step.model).items():
        for key, plain in nets[name].state_dict().items():
            moved = (plain - before[name][key]).abs().max()
            assert moved > 0 and (after[key] - plain).abs().max() < 0.02 * moved, f"{name}: {key}"
