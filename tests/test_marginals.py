"""Whole samplers with a denoiser that is known exactly, through the public op: the marginals of every step's x'.

Two targets. A point mass, where DDIM with any admissible variance and CPS keep the marginals at any number of steps.
A Gaussian, where the others converge to them; there every step is linear, so mean and variance are propagated
through the table in float64 and the samples are held against that.

The mean and the variance V of 10,000 samples of a Gaussian have standard errors sqrt(V/10,000) and V sqrt(2/10,000).
`Z` of them are allowed: one fair check in 150,000 fails by chance, and the seeds are fixed. That finds a mean that is
off by 4.5% of the standard deviation and a variance that is off by 6.4%.
"""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from pcpo_fast import NoiseKey, StepTable, sample_noise, sampler_step, shifted_sigmas

SEED = 20
SHAPE = (10, 1000)
COUNT = math.prod(SHAPE)
Z = 4.5
# rounding of a float32 sampler with terms of order 1 (up to 20 where a = sqrt(ap / at) is large)
ROUNDING = 1e-5
POINT = 0.8
MEAN, VARIANCE = 0.8, 0.25


def sd_alphas() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


class Case:
    """A sampler: its table, and the share of sample and noise, x = signal x0 + noise epsilon, before every step and
    after the last."""

    def __init__(self, table: StepTable, signal: torch.Tensor, noise: torch.Tensor, predicts: str) -> None:
        self.table, self.predicts = table, predicts
        self.signal, self.noise = signal.tolist(), noise.tolist()

    def marginal(self, k: int, mean: float, variance: float) -> tuple[float, float]:
        """Mean and variance of x before step k, for a Gaussian x0."""
        return self.signal[k] * mean, self.signal[k] ** 2 * variance + self.noise[k] ** 2

    def output(self, k: int, mean: float, variance: float) -> tuple[float, float]:
        """(slope, offset) of the exact denoiser E[output | x] of a Gaussian x0, which is linear in x."""
        centre, spread = self.marginal(k, mean, variance)
        of_sample, of_noise = {
            "epsilon": (0.0, 1.0),
            "velocity": (-1.0, 1.0),
            "v": (-self.noise[k], self.signal[k]),
            "sample": (1.0, 0.0),
        }[self.predicts]
        slope = (of_sample * self.signal[k] * variance + of_noise * self.noise[k]) / spread
        return slope, of_sample * mean - slope * centre

    def coefficients(self, k: int) -> tuple[float, float, float]:
        table = self.table
        return float(table.sample_coef[k]), float(table.output_coef[k]), float(table.std[k])


def flow_case(num_steps: int, shift: float = 1.0, **kwargs) -> Case:
    sigmas = shifted_sigmas(num_steps, shift)
    return Case(StepTable.flow(sigmas, **kwargs), 1 - sigmas, sigmas, "velocity")


def ddim_case(num_steps: int, predicts: str = "epsilon", **kwargs) -> Case:
    """Stable Diffusion's schedule, from its noisiest timestep."""
    steps = torch.arange(num_steps, 0, -1) * (1000 // num_steps) - 1
    alphas = sd_alphas()
    along = torch.cat([alphas[steps], alphas[:1]])
    kind = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}[predicts]
    table = StepTable.ddim(alphas, steps, prediction_type=kind, **kwargs)
    return Case(table, along.sqrt(), (1 - along).sqrt(), predicts)


def no_signal_case(num_steps: int, predicts: str, **kwargs) -> Case:
    """Zero terminal SNR: the first step starts from noise alone."""
    alphas = torch.cat([sd_alphas(), torch.zeros(1, dtype=torch.float64)])
    steps = torch.arange(num_steps, 0, -1) * (1000 // num_steps)
    along = torch.cat([alphas[steps], alphas[:1]])
    kind = {"v": "v_prediction", "sample": "sample"}[predicts]
    table = StepTable.ddim(alphas, steps, prediction_type=kind, **kwargs)
    return Case(table, along.sqrt(), (1 - along).sqrt(), predicts)


def part_case(first: float, last: float, num_steps: int, **kwargs) -> Case:
    """A part of a flow's schedule."""
    sigmas = torch.linspace(first, last, num_steps + 1, dtype=torch.float64)
    return Case(StepTable.flow(sigmas, **kwargs), 1 - sigmas, sigmas, "velocity")


def fine_ddim_case(num_steps: int, **kwargs) -> Case:
    """A schedule fine enough to halve the step many times, between the same ends whatever the number of steps."""
    size = 2**12
    alphas = torch.cos((0.02 + 0.93 * torch.arange(size + 1, dtype=torch.float64) / size) * math.pi / 2) ** 2
    steps = size - torch.arange(num_steps) * (size // num_steps)
    along = torch.cat([alphas[steps], alphas[:1]])
    return Case(StepTable.ddim(alphas, steps, **kwargs), along.sqrt(), (1 - along).sqrt(), "epsilon")


def key(seed: int) -> NoiseKey:
    return NoiseKey(seed, torch.arange(SHAPE[0]))


def sample(case: Case, mean: float, variance: float, seed: int = SEED):
    """Runs the sampler from its first marginal and yields every step's x'."""
    centre, spread = case.marginal(0, mean, variance)
    x = centre + math.sqrt(spread) * sample_noise(SHAPE, case.table, 0, key(seed), stream=1)
    for k in range(len(case.table)):
        slope, offset = case.output(k, mean, variance)
        x = sampler_step(slope * x + offset, x, case.table, k, key(seed)).prev_sample
        yield x


def check_marginal(x: torch.Tensor, mean: float, variance: float) -> None:
    x = x.double()
    assert abs(float(x.mean()) - mean) <= Z * math.sqrt(variance / COUNT) + ROUNDING
    # a rounding r of x moves its variance by at most 2 r sqrt(V) + r^2
    rounding = 2 * ROUNDING * math.sqrt(variance) + ROUNDING**2
    assert abs(float(x.var()) - variance) <= Z * variance * math.sqrt(2 / COUNT) + rounding


def propagate(case: Case, mean: float, variance: float) -> list[tuple[float, float]]:
    """Mean and variance of every step's x', exactly: x' = (a + b slope) x + b offset + s z."""
    centre, spread = case.marginal(0, mean, variance)
    found = []
    for k in range(len(case.table)):
        a, b, std = case.coefficients(k)
        slope, offset = case.output(k, mean, variance)
        centre, spread = (a + b * slope) * centre + b * offset, (a + b * slope) ** 2 * spread + std**2
        found.append((centre, spread))
    return found


POINT_MASS = {
    "ddim, eta 1": lambda T: ddim_case(T),
    "ddim, eta 0.4": lambda T: ddim_case(T, eta=0.4),
    "ddim, eta 0": lambda T: ddim_case(T, eta=0.0),
    "ddim, v": lambda T: ddim_case(T, "v"),
    "ddim, sample": lambda T: ddim_case(T, "sample"),
    "ddim, proportionate": lambda T: ddim_case(T, credit="proportionate"),
    "ddim, published": lambda T: ddim_case(T, credit="published"),
    "ddim, window": lambda T: ddim_case(T, credit="proportionate", window=(1, T - 1)),
    "ddim, no signal, v": lambda T: no_signal_case(T, "v"),
    "ddim, no signal, sample, proportionate": lambda T: no_signal_case(T, "sample", credit="proportionate"),
    "cps, 0.7 to 0.2": lambda T: part_case(0.7, 0.2, T, sde="cps"),
    "cps, from nearly 1": lambda T: part_case(0.999999, 0.0, T, sde="cps"),
    "cps, 0.3": lambda T: flow_case(T, sde="cps", noise_level=0.3),
    "cps, 0.8, shift 3": lambda T: flow_case(T, 3.0, sde="cps", noise_level=0.8),
    "cps, 1": lambda T: flow_case(T, sde="cps", noise_level=1.0),
    "cps, 1.6": lambda T: flow_case(T, sde="cps", noise_level=1.6),
    "cps, a level per step": lambda T: flow_case(T, sde="cps", noise_level=torch.linspace(0.2, 1.0, T)),
    "cps, steps": lambda T: flow_case(T, sde="cps", steps=range(0, T, 2)),
    "cps, window": lambda T: flow_case(T, sde="cps", noise_level=0.8, window=(1, T - 1)),
    "ode of a flow": lambda T: flow_case(T, 3.0, noise_level=0.0),
}


# the windows leave out the first and the last step
@pytest.mark.parametrize(
    ("sampler", "num_steps"),
    [(name, number) for name in POINT_MASS for number in (1, 3, 10) if number > 1 or "window" not in name],
)
def test_a_point_mass_is_sampled_exactly_at_any_number_of_steps(sampler, num_steps):
    case = POINT_MASS[sampler](num_steps)
    for k, x in enumerate(sample(case, POINT, 0.0)):
        check_marginal(x, *case.marginal(k + 1, POINT, 0.0))


@pytest.mark.parametrize("sampler", ["ddim, proportionate", "ddim, published"])
def test_the_resolved_samplers_are_other_samplers(sampler):
    assert not torch.allclose(POINT_MASS[sampler](10).table.std, ddim_case(10).table.std, rtol=1e-2)


@pytest.mark.parametrize("sde", ["flow", "dance"])
def test_a_point_mass_is_missed_by_the_sde_s_in_few_steps(sde):
    """What the exact check above would see: their marginals are right to the first order only."""
    case = flow_case(3, sde=sde, noise_level=1.0)
    *_, (centre, spread), _ = propagate(case, POINT, 0.0)
    mean, variance = case.marginal(len(case.table) - 1, POINT, 0.0)
    assert centre == pytest.approx(mean, abs=1e-12) and abs(spread / variance - 1) > 0.1


GAUSSIAN = {
    "flow": lambda T: flow_case(T, 3.0, sde="flow", noise_level=0.7),
    "flow, proportionate": lambda T: flow_case(T, 3.0, sde="flow", noise_level=0.7, credit="proportionate"),
    "dance": lambda T: flow_case(T, 3.0, sde="dance", noise_level=0.3),
    "dance, noise at the end": lambda T: flow_case(T, 3.0, sde="dance", noise_level=0.3, last_step="noise"),
    "dance, no shift": lambda T: flow_case(T, sde="dance", noise_level=0.3),
    "ode of a flow": lambda T: flow_case(T, 3.0, noise_level=0.0),
    "ddim": lambda T: fine_ddim_case(T),
    "ddim, eta 0.5": lambda T: fine_ddim_case(T, eta=0.5),
    "ddim, eta 0": lambda T: fine_ddim_case(T, eta=0.0),
}


def final_std_error(case: Case) -> float:
    """How far the last x' is from the target's std; its mean is exact, since the denoiser is linear."""
    (*_, (centre, spread)) = propagate(case, MEAN, VARIANCE)
    mean, variance = case.marginal(len(case.table), MEAN, VARIANCE)
    assert centre == pytest.approx(mean, abs=1e-12)
    return math.sqrt(spread) - math.sqrt(variance)


@pytest.mark.parametrize("sampler", GAUSSIAN)
def test_the_marginals_of_a_gaussian_converge_to_the_first_order(sampler):
    errors = [abs(final_std_error(GAUSSIAN[sampler](T))) for T in (8, 16, 32, 64, 128)]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    # 2 in the limit; at 8 steps the second order still has a part of it
    assert all(1.6 < ratio < 2.4 for ratio in ratios), ratios
    assert ratios[-1] > 1.8
    assert errors[0] < 0.2 and errors[-1] < 0.02


@pytest.mark.parametrize("noise_level", [0.5, 0.7, 0.9])
def test_flow_sde_leaves_an_error_of_its_first_steps(noise_level):
    """Its g^2 h does not fall with h at t = 1, where g^2 = noise_level^2 t / (1 - t). The wrong variance of those steps
    is forgotten as exp(-integral of g^2) = h^(noise_level^2), slower than the first order."""
    fine = [final_std_error(flow_case(T, sde="flow", noise_level=noise_level)) for T in (256, 512, 1024, 2048)]
    # without the first order
    left = [2 * half - whole for whole, half in pairwise(fine)]
    for coarse, finer in pairwise(left):
        assert math.log2(coarse / finer) == pytest.approx(noise_level**2, abs=0.05)


def test_flow_sde_with_much_noise_is_of_first_order():
    errors = [final_std_error(flow_case(T, sde="flow", noise_level=1.5)) for T in (512, 1024, 2048)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1) and errors[1] / errors[2] == pytest.approx(2, abs=0.05)


def test_cps_narrows_a_gaussian_at_any_number_of_steps():
    """It renews a fixed part of the noise in every step, so it does not become an SDE, and the std keeps an error."""
    errors = [final_std_error(flow_case(T, sde="cps", noise_level=0.5)) for T in (128, 512, 2048)]
    assert -0.06 < errors[0] < errors[1] < errors[2] < -0.03


@pytest.mark.parametrize("num_steps", [8, 16])
@pytest.mark.parametrize("sampler", [*GAUSSIAN, "cps"])
def test_samples_of_a_gaussian_agree_with_the_propagated_moments(sampler, num_steps):
    make = GAUSSIAN.get(sampler, lambda T: flow_case(T, 3.0, sde="cps", noise_level=0.8))
    case = make(num_steps)
    for x, moments in zip(sample(case, MEAN, VARIANCE), propagate(case, MEAN, VARIANCE), strict=True):
        check_marginal(x, *moments)


WINDOWS = {
    "flow": lambda **k: flow_case(10, 3.0, sde="flow", noise_level=0.5, **k),
    "dance": lambda **k: flow_case(10, 3.0, sde="dance", noise_level=0.5, **k),
    "cps": lambda **k: flow_case(10, 3.0, sde="cps", noise_level=0.5, **k),
    "ddim": lambda **k: ddim_case(10, credit="proportionate", **k),
}


@pytest.mark.parametrize("family", WINDOWS)
def test_the_full_window_is_the_sampler_and_the_empty_one_the_ode(family):
    make = WINDOWS[family]
    full, whole, empty = make(), make(window=(0, 10)), make(window=(4, 4))
    assert all(map(torch.equal, sample(full, MEAN, VARIANCE), sample(whole, MEAN, VARIANCE)))
    ode = ddim_case(10, eta=0.0) if family == "ddim" else flow_case(10, 3.0, noise_level=0.0)
    assert all(map(torch.equal, sample(empty, MEAN, VARIANCE), sample(ode, MEAN, VARIANCE)))
    *_, stochastic = sample(full, MEAN, VARIANCE)
    *_, deterministic = sample(empty, MEAN, VARIANCE)
    assert not torch.allclose(stochastic, deterministic, atol=0.1)


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_is_the_ode_outside_and_the_sampler_inside(family):
    make = WINDOWS[family]
    case, full, ode = make(window=(3, 6)), make(), make(window=(0, 0))
    states = [case.marginal(0, MEAN, VARIANCE)[0] + torch.zeros(SHAPE), *sample(case, MEAN, VARIANCE)]
    for k in range(1, 10):
        slope, offset = case.output(k, MEAN, VARIANCE)
        table = (full if 3 <= k < 6 else ode).table
        x = sampler_step(slope * states[k] + offset, states[k], table, k, key(SEED)).prev_sample
        assert torch.equal(x, states[k + 1])
        drawn_anew = sampler_step(slope * states[k] + offset, states[k], case.table, k, key(SEED + 1)).prev_sample
        assert torch.equal(drawn_anew, x) == (not 3 <= k < 6)


@pytest.mark.parametrize(("column", "factor"), [("std", 1.04), ("output_coef", 0.97)])
def test_the_checks_see_a_wrong_sampler(column, factor):
    case = flow_case(10, sde="cps", noise_level=0.8)
    wrong = dataclasses.replace(case.table, **{column: factor * getattr(case.table, column)})
    broken = Case(wrong, torch.tensor(case.signal), torch.tensor(case.noise), "velocity")
    with pytest.raises(AssertionError):
        for k, x in enumerate(sample(broken, POINT, 0.0)):
            check_marginal(x, *case.marginal(k + 1, POINT, 0.0))
