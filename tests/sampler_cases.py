"""Schedules to build tables on, and the papers' own formulas of the samplers, in float64.

A tolerance in the tests of samplers is a multiple of float64's roundoff (2.2e-16) times the size of the terms that
cancel.
"""

import math
from typing import get_args

import numpy as np
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st

from pcpo_fast.columns import COLUMNS
from pcpo_fast.samplers import NOISE_LEVELS, Credit, FlowSDE, PredictionType, StepTable, shifted_sigmas

EPS = float(np.finfo(np.float64).eps)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

CREDITS = get_args(Credit)
PREDICTION_TYPES = get_args(PredictionType)
FLOW_SDES = get_args(FlowSDE)

# the same cases every run; the schedules are small, so hundreds of them cost seconds
property_test = settings(max_examples=150, deadline=None, derandomize=True)


def sd_alphas() -> torch.Tensor:
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    return torch.from_numpy(np.cumprod(1 - betas))


def sd_steps(num_steps: int) -> torch.Tensor:
    """Leading spacing, offset 1."""
    return torch.arange(num_steps - 1, -1, -1) * (1000 // num_steps) + 1


def sd_table(num_steps: int = 50, **kwargs) -> StepTable:
    """Native credit unless another one is given."""
    return StepTable.ddim(sd_alphas(), sd_steps(num_steps), **{"credit": "native", **kwargs})


def alpha_pairs(alphas: torch.Tensor, steps: torch.Tensor, final: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    at = alphas.numpy()[steps.numpy()]
    return at, np.append(at[1:], float(alphas[0]) if final is None else final)


def credit_symbols(at: np.ndarray, ap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c1 and b0."""
    return np.sqrt((1 - at) * ap / at), np.sqrt(1 - ap)


def eta_one_std(at: np.ndarray, ap: np.ndarray) -> np.ndarray:
    return np.sqrt((1 - ap) / (1 - at)) * np.sqrt((ap - at) / ap)


def split(x, m, at, prediction_type):
    """(sample, noise) that a model output stands for, from its definition."""
    if prediction_type == "epsilon":
        return (x - np.sqrt(1 - at) * m) / np.sqrt(at), m
    if prediction_type == "v_prediction":
        return np.sqrt(at) * x - np.sqrt(1 - at) * m, np.sqrt(at) * m + np.sqrt(1 - at) * x
    return m, (x - np.sqrt(at) * m) / np.sqrt(1 - at)


def output_for(x, epsilon, at, prediction_type):
    """The model output that stands for `epsilon` at `x`."""
    x0 = (x - np.sqrt(1 - at) * epsilon) / np.sqrt(at)
    return {"epsilon": epsilon, "v_prediction": np.sqrt(at) * epsilon - np.sqrt(1 - at) * x0, "sample": x0}[
        prediction_type
    ]


def ddim_mean(x, m, at, ap, std, prediction_type):
    """Mean of DDIM's step, arXiv 2010.02502 equation 12: the predicted sample, noised again."""
    x0, noise = split(x, m, at, prediction_type)
    return np.sqrt(ap) * x0 + np.sqrt(np.maximum(1 - ap - std**2, 0)) * noise


@st.composite
def schedules(draw):
    """(alphas_cumprod, timesteps, final alpha) of a random schedule with at least one stochastic step."""
    size = draw(st.integers(2, 40))
    start = draw(st.floats(-1.0, 8.0))
    fall = draw(st.lists(st.floats(0.02, 1.0), min_size=size - 1, max_size=size - 1))
    log_snr = start - np.concatenate([[0.0], np.cumsum(fall)])
    # alphas below 1e-6 count as zero terminal SNR
    log_snr = log_snr[log_snr > -13.8]
    alphas = torch.from_numpy(1 / (1 + np.exp(-log_snr)))
    chosen = draw(st.sets(st.integers(0, len(alphas) - 1), min_size=1, max_size=12))
    steps = torch.tensor(sorted(chosen, reverse=True))
    last = float(alphas[steps[-1]])
    final = draw(st.one_of(st.none(), st.just(1.0), st.floats(0.0, 0.99).map(lambda f: last + f * (1 - last))))
    at, ap = alpha_pairs(alphas, steps, final)
    assume(bool((eta_one_std(at, ap) > 0).any()))
    return alphas, steps, final


prediction_types = st.sampled_from(PREDICTION_TYPES)
etas = st.floats(0.05, 1.0)
# None is the default; otherwise a multiple of the smallest weight that some step can have
target_factors = st.one_of(st.none(), st.floats(1.0001, 50.0))


def drawn_table(schedule, eta, prediction_type, credit, factor):
    alphas, steps, final = schedule
    at, ap = alpha_pairs(alphas, steps, final)
    c1, b0 = credit_symbols(at, ap)
    target = None
    if factor is not None and credit != "native":
        stochastic = eta_one_std(at, ap) > 0
        target = float(np.sqrt((c1[stochastic] / b0[stochastic]) ** 2 - 1).min() * factor)
    table = StepTable.ddim(
        alphas,
        steps,
        eta=eta,
        prediction_type=prediction_type,
        final_alpha_cumprod=final,
        credit=credit,
        target_weight=target,
    )
    return table, at, ap, c1, b0


# flow models


def flow_grpo_step(x, v, t, t_next, noise_level, second):
    """arXiv 2505.05470, equation 9 with the sign of its dt: the velocity, less half g^2 times the score."""
    g2 = noise_level**2 * t / (1 - np.where(t == 1, second, t))
    score = -(x + (1 - t) * v) / t
    return x - (t - t_next) * (v - g2 / 2 * score), np.sqrt(g2) * np.sqrt(t - t_next)


def dance_grpo_step(x, v, t, t_next, noise_level, second):
    """arXiv 2505.07818: the score from the predicted sample."""
    predicted = x - t * v
    score = -(x - (1 - t) * predicted) / t**2
    return x + (t_next - t) * (v - noise_level**2 / 2 * score), noise_level * np.sqrt(t - t_next)


def cps_step(x, v, t, t_next, noise_level, second):
    """arXiv 2509.05952: the predicted sample and noise, mixed again at t', with a part of the noise drawn anew."""
    sample, noise = x - t * v, x + (1 - t) * v
    std = t_next * np.sin(noise_level * math.pi / 2)
    kept = t_next * np.cos(noise_level * math.pi / 2)
    return (1 - t_next) * sample + kept * noise, std


FLOW_STEPS = {"flow": flow_grpo_step, "dance": dance_grpo_step, "cps": cps_step}


def flow_rows(sigmas, sde, noise_level):
    """a, b, s by the papers, every row with its noise. The step is linear: (1, 0) and (0, 1) give its coefficients."""
    t, t_next = np.asarray(sigmas)[:-1], np.asarray(sigmas)[1:]
    (a, std), (b, _) = (FLOW_STEPS[sde](x, v, t, t_next, noise_level, sigmas[1]) for x, v in ((1.0, 0.0), (0.0, 1.0)))
    return a, b, np.broadcast_to(std, t.shape)


def flow_table(sde="flow", num_steps=10, shift=3.0, **kwargs) -> StepTable:
    """The papers' noise level and native credit unless others are given."""
    defaults = {"noise_level": NOISE_LEVELS.get(sde), "credit": "native"}
    return StepTable.flow(shifted_sigmas(num_steps, shift), sde=sde, **{**defaults, **kwargs})


@st.composite
def levels(draw, ends=((1.0, 0.0),)):
    """Sigmas of a random schedule of 1 to 12 steps, between one of these pairs of ends."""
    first, last = draw(st.sampled_from(ends))
    gaps = np.array(draw(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=12)))
    inner = 1 - np.cumsum(gaps / gaps.sum())[:-1]
    return last + (first - last) * np.concatenate([[1.0], inner, [0.0]])


def equal(table: StepTable, other: StepTable, rows=slice(None), leave_out=()) -> bool:
    """Bit for bit, in every column."""
    columns = {*COLUMNS, "timesteps", "weight", "native_weight", "interval", "epsilon_scale"} - set(leave_out)
    found = all(torch.equal(_column(table, name)[rows], _column(other, name)[rows]) for name in columns)
    return found and (bool(leave_out) or torch.equal(table.rows[rows], other.rows[rows]))


def _column(table: StepTable, name: str) -> torch.Tensor:
    return getattr(table, name) if hasattr(table, name) else table.rows[:, COLUMNS.index(name)]
