"""flow.py: the path and its velocity, tau's law, purity per sample, and the solvers' order."""

import numpy as np
import pytest
import torch

from nextvid_mcore import flow
from nextvid_mcore.config import ConfigError

GOLDEN_TAU = 0.8786978125572205
GOLDEN_NOISE = [0.9433467984199524, 0.8865755796432495]
SIZES = dict(masks=2, frames=3, tau_samples=4, n=4, channels=6)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_path_runs_from_noise_to_data_with_constant_velocity():
    noise, data = normal(2, 3, 5, 7), normal(2, 3, 5, 7, seed=1)
    at = lambda tau: flow.interpolate(noise, data, torch.full((2, 3), tau, dtype=torch.float64))  # noqa: E731
    assert torch.equal(at(0.0), noise) and torch.equal(at(1.0), data)
    torch.testing.assert_close((at(0.75) - at(0.25)) / 0.5, flow.velocity(noise, data))
    torch.testing.assert_close(at(0.25), 0.75 * noise + 0.25 * data)


def test_tau_goes_with_the_leading_axes_and_data_broadcasts_over_tau_samples():
    tau, noise = flow.draw(0, range(2), **SIZES)
    data = normal(2, 1, 3, 1, 4, 6).float()
    mixed = flow.interpolate(noise, data, tau)
    assert mixed.shape == noise.shape
    b, m, p, k = 1, 1, 2, 3
    want = (1 - tau[b, m, p, k]) * noise[b, m, p, k] + tau[b, m, p, k] * data[b, 0, p, 0]
    torch.testing.assert_close(mixed[b, m, p, k], want)


def test_shapes_and_types():
    tau, noise = flow.draw(0, range(5), **SIZES)
    assert tau.shape == (5, 2, 3, 4) and noise.shape == (5, 2, 3, 4, 4, 6)
    assert tau.dtype == noise.dtype == torch.float32


def test_tau_is_uniform_and_open():
    tau = flow.draw_tau(0, range(2000), 2, 7, 4).flatten().double()
    assert 0 < tau.min() and tau.max() < 1
    assert tau.mean() == pytest.approx(1 / 2, abs=0.005)
    assert tau.var() == pytest.approx(1 / 12, abs=0.002)
    shares = torch.histc(tau, bins=20, min=0, max=1) / tau.numel()
    assert (shares - 0.05).abs().max() < 0.003
    ends = (2 * np.array([0, (1 << 23) - 1]) + 1).astype(np.float32) * np.float32(2.0**-24)
    assert 0 < ends[0] and ends[1] < 1, "an end of the interval is reached by rounding"


def test_tau_is_independent_between_frames_masks_and_samples():
    tau = flow.draw_tau(0, range(2000), 2, 3, 2).flatten(1)
    off = torch.corrcoef(tau.T) - torch.eye(12)
    assert off.abs().max() < 0.1


def test_tau_per_clip_is_shared_by_the_frames_only():
    tau = flow.draw_tau(0, range(50), 2, 3, 4, per="clip")
    assert tau.shape == (50, 2, 3, 4)
    assert torch.equal(tau, tau[:, :, :1].expand_as(tau))
    assert len(tau[:, :, 0].flatten().unique()) == 50 * 2 * 4
    with pytest.raises(ConfigError, match="'pixel'"):
        flow.draw_tau(0, [0], 2, 3, 4, per="pixel")


def test_noise_is_standard_normal():
    noise = flow.draw_noise(0, range(50), (2, 3, 4, 8, 16)).double()
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert (noise.abs() < 1).double().mean() == pytest.approx(0.6827, abs=0.005)
    rows = noise.reshape(50, -1)
    assert (torch.corrcoef(rows) - torch.eye(50)).abs().max() < 0.1


def test_draws_are_the_same_however_the_batch_is_cut():
    tau, noise = flow.draw(3, range(6), **SIZES)
    for batch in ([0, 1, 2], [5, 3], torch.tensor([4])):
        part_tau, part_noise = flow.draw(3, batch, **SIZES)
        rows = torch.as_tensor(batch)
        assert torch.equal(part_tau, tau[rows]) and torch.equal(part_noise, noise[rows])
    other_tau, other_noise = flow.draw(4, range(6), **SIZES)
    assert not torch.equal(other_tau, tau) and not torch.equal(other_noise, noise)


def test_indices_that_agree_in_32_bits_get_other_noise():
    """The failing of torch's CPU generator: two seeds equal modulo 2**32 give the same numbers."""
    a, b = flow.draw_noise(0, [1, 1 + 2**32], (64,))
    assert not torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_draws_are_pure_and_tau_is_the_cpus():
    tau, noise = flow.draw(3, range(6), **SIZES, device="cuda")
    part_tau, part_noise = flow.draw(3, [5, 3], **SIZES, device="cuda")
    assert torch.equal(part_tau, tau[[5, 3]]) and torch.equal(part_noise, noise[[5, 3]])
    assert torch.equal(tau.cpu(), flow.draw_tau(3, range(6), 2, 3, 4))
    assert abs(noise.std().item() - 1) < 0.05 and not torch.equal(noise[0], noise[1])


def test_golden_draws_never_change():
    tau, noise = flow.draw(0, [7], 1, 1, 1, 1, 2)
    assert tau.item() == GOLDEN_TAU
    torch.testing.assert_close(noise.flatten(), torch.tensor(GOLDEN_NOISE), rtol=0, atol=1e-6)


def test_timestep_embedding_by_hand():
    got = flow.timestep_embedding(torch.tensor([[0.0], [0.003]]), 4)
    assert got.shape == (2, 1, 4) and got.dtype == torch.float32
    assert got[0, 0].tolist() == [1, 1, 0, 0]
    want = torch.tensor([3.0, 0.03])  # 1000 tau times 1 and 10000 ** (-1 / 2)
    torch.testing.assert_close(got[1, 0], torch.cat((want.cos(), want.sin())))
    with pytest.raises(ConfigError, match="7 is odd"):
        flow.timestep_embedding(torch.zeros(1), 7)


def test_timestep_embedding_tells_close_times_apart():
    taus = torch.linspace(0.001, 0.999, 200)
    distances = torch.cdist(flow.timestep_embedding(taus, 256), flow.timestep_embedding(taus, 256))
    assert (distances + 10 * torch.eye(200)).min() > 0.5
    assert flow.timestep_embedding(taus.bfloat16(), 256).dtype == torch.float32


@pytest.mark.parametrize("solver, order, evaluations", [(flow.euler, 1, 1), (flow.midpoint, 2, 2)])
def test_solvers_recover_a_linear_field_at_their_order(solver, order, evaluations):
    """dx/dtau = A x has the solution exp(A) x0; halving the step divides the error by 2 ** order."""
    matrix, start = 0.7 * normal(5, 5), normal(3, 5, seed=1)
    exact = start @ torch.matrix_exp(matrix).T
    calls = []

    def field(x, tau):
        calls.append(tau)
        return x @ matrix.T

    errors = [(solver(field, start, steps) - exact).norm().item() for steps in (64, 128)]
    assert errors[1] < 0.05 * exact.norm()
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert len(calls) == evaluations * 192 and min(calls) == 0 and max(calls) < 1


@pytest.mark.parametrize("solver", [flow.euler, flow.midpoint])
def test_solvers_follow_time(solver):
    """dx/dtau = (data - x) / (1 - tau) is the flow of one data point: straight, so any steps are exact."""
    noise, data = normal(2, 5), normal(2, 5, seed=1)
    kept = noise.clone()
    for steps in (1, 3, 10):
        torch.testing.assert_close(solver(lambda x, tau: (data - x) / (1 - tau), noise, steps), data)
    assert torch.equal(noise, kept), "the start was overwritten"
    with pytest.raises(ConfigError, match="got 0"):
        solver(lambda x, tau: x, noise, 0)
