"""Tables of diffusers' flow schedulers."""

import logging
import math

import numpy as np
import pytest
import torch
from sampler_cases import FLOW_SDES, equal

from pcpo_fast.samplers import NOISE_LEVELS, StepTable


def scheduler_of(**settings):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def linear(num_steps: int) -> list[float]:
    """What FLUX's pipeline hands over."""
    return np.linspace(1.0, 1 / num_steps, num_steps).tolist()


VARIANTS = {
    "plain": ({}, {}, {}),
    "shift": ({"shift": 3.0}, {}, {}),
    "shift, a list": ({"shift": 3.0}, {"sigmas": linear(10)}, {"sigmas": linear(10)}),
    "dynamic": ({"use_dynamic_shifting": True}, {"image_seq_len": 1024}, {"mu": 0.63}),
    "dynamic, a list": (
        {"use_dynamic_shifting": True, "shift": 3.0},
        {"image_seq_len": 4096, "sigmas": linear(10)},
        {"mu": 1.15, "sigmas": linear(10)},
    ),
    "dynamic, linear": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"image_seq_len": 256},
        {"mu": 0.5},
    ),
    "dynamic, other ends": (
        {
            "use_dynamic_shifting": True,
            "base_shift": 0.2,
            "max_shift": 0.9,
            "base_image_seq_len": 100,
            "max_image_seq_len": 800,
        },
        {"image_seq_len": 300},
        {"mu": 0.4},
    ),
    "terminal": ({"shift_terminal": 0.02, "shift": 3.0}, {"sigmas": linear(10)}, {"sigmas": linear(10)}),
    "karras": ({"use_karras_sigmas": True, "shift": 3.0}, {}, {}),
    "exponential": ({"use_exponential_sigmas": True}, {}, {}),
    "beta": ({"use_beta_sigmas": True, "shift": 3.0}, {}, {}),
    "stochastic": ({"stochastic_sampling": True, "shift": 3.0}, {}, {}),
    "500 steps of training": ({"num_train_timesteps": 500, "shift": 2.0}, {}, {}),
    "no length needed": ({"shift": 3.0}, {"image_seq_len": 4096}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sde", FLOW_SDES)
def test_sigmas_and_timesteps_are_the_scheduler_s_own(sde, variant):
    config, given_to_us, given_to_it = VARIANTS[variant]
    if "use_beta_sigmas" in config:
        pytest.importorskip("scipy")
    scheduler = scheduler_of(**config)
    table = StepTable.from_scheduler(scheduler, 10, sde=sde, noise_level=NOISE_LEVELS[sde], **given_to_us)
    scheduler.set_timesteps(10, **given_to_it)
    assert torch.equal(table.timesteps, scheduler.timesteps) and table.timesteps.dtype == torch.float32
    assert torch.equal(table.interval, -scheduler.sigmas.double().diff())
    direct = StepTable.flow(scheduler.sigmas, sde=sde, noise_level=NOISE_LEVELS[sde])
    assert equal(table, direct, leave_out=("timesteps",))


def test_sigmas_are_not_made_from_the_rounded_timesteps():
    scheduler = scheduler_of(shift=3.0)
    table = StepTable.from_scheduler(scheduler, 16, noise_level=0.7, sigmas=linear(16))
    t = [*(table.timesteps.double() / 1000).tolist(), 0.0]
    assert not torch.equal(table.interval, -torch.tensor(t, dtype=torch.float64).diff())


def test_dynamic_shifting_is_that_of_the_pipelines():
    pytest.importorskip("transformers")
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    for length in (16, 256, 1024, 3600, 4096, 9000):
        scheduler = scheduler_of(use_dynamic_shifting=True)
        table = StepTable.from_scheduler(scheduler, 8, sigmas=linear(8), image_seq_len=length, noise_level=0.7)
        scheduler.set_timesteps(8, sigmas=linear(8), mu=flux.calculate_shift(length))
        torch.testing.assert_close(table.timesteps, scheduler.timesteps, rtol=1e-6, atol=0)


def test_the_arguments_reach_the_table():
    scheduler = scheduler_of(shift=3.0)
    settings = {"sde": "dance", "noise_level": 0.4, "credit": "proportionate", "target_weight": 7.0}
    settings |= {"window": (1, 4), "normalized": False}
    table = StepTable.from_scheduler(scheduler, 8, **settings)
    scheduler.set_timesteps(8)
    direct = StepTable.flow(scheduler.sigmas, **settings)
    assert equal(table, direct) and (table.target_weight, table.normalized) == (7.0, False)
    settings = {"noise_level": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], "last_step": "noise", "steps": [0, 7]}
    table = StepTable.from_scheduler(scheduler, 8, **settings)
    assert equal(table, StepTable.flow(scheduler.sigmas, **settings))
    assert table.trainable.nonzero().flatten().tolist() == [0, 7]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scheduler_is_left_as_it_was(variant):
    config, arguments, own = VARIANTS[variant]
    if "use_beta_sigmas" in config:
        pytest.importorskip("scipy")
    scheduler = scheduler_of(**config)
    scheduler.set_timesteps(3, **{name: value for name, value in own.items() if name != "sigmas"})
    before = {name: value.clone() if torch.is_tensor(value) else value for name, value in vars(scheduler).items()}
    StepTable.from_scheduler(scheduler, 10, noise_level=0.7, **arguments)
    for name, value in vars(scheduler).items():
        same = torch.equal(value, before[name]) if torch.is_tensor(value) else value == before[name]
        assert same, name


def test_a_shift_that_was_set_later_counts():
    scheduler = scheduler_of(shift=1.0)
    scheduler.set_shift(5.0)
    table = StepTable.from_scheduler(scheduler, 10, noise_level=0.7)
    scheduler.set_timesteps(10)
    assert torch.equal(table.timesteps, scheduler.timesteps)
    assert not torch.equal(table.timesteps, StepTable.from_scheduler(scheduler_of(), 10, noise_level=0.7).timesteps)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stochastic"])
@pytest.mark.parametrize("sde", FLOW_SDES)
def test_rows_of_the_ode_are_the_step_of_diffusers(sde, variant):
    """In float32, in which diffusers rounds sigma' - sigma, its product with v and the sum: one half unit each."""
    config, given_to_us, given_to_it = VARIANTS[variant]
    if "use_beta_sigmas" in config:
        pytest.importorskip("scipy")
    scheduler = scheduler_of(**config)
    table = StepTable.from_scheduler(scheduler, 10, sde=sde, noise_level=0.0, **given_to_us)
    stochastic = StepTable.from_scheduler(scheduler, 10, sde=sde, noise_level=0.5, **given_to_us)
    scheduler.set_timesteps(10, **given_to_it)
    x, v = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    unit = float(np.finfo(np.float32).eps) / 2
    for row, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(v, timestep, x, return_dict=False)[0].double()
        last = row == len(table) - 1
        for rows in [table, stochastic] if last else [table]:
            move = rows.output_coef[row] * v.double()
            ours = rows.sample_coef[row] * x.double() + move
            assert bool(((ours - theirs).abs() <= unit * (2 * move.abs() + ours.abs()) * 1.001).all())


def test_loading_says_nothing(caplog):
    """No warning of diffusers about a setting that is not used."""
    logging.getLogger("diffusers").addHandler(caplog.handler)
    StepTable.from_scheduler(scheduler_of(shift=3.0), 4, noise_level=0.7, sigmas=linear(4))
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("length", [0, -5, 10**7, 2.5])
def test_impossible_image_sizes_are_refused(length):
    scheduler = scheduler_of(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=f"image_seq_len={length} .* give the number of"):
        StepTable.from_scheduler(scheduler, 4, image_seq_len=length, noise_level=0.7)


def test_a_shift_without_a_range_is_refused():
    scheduler = scheduler_of(use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=256)
    with pytest.raises(ValueError, match="base_image_seq_len and max_image_seq_len are both 256"):
        StepTable.from_scheduler(scheduler, 4, image_seq_len=256, noise_level=0.7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"invert_sigmas": True}, {}, "invert_sigmas=True, .*rise.*invert_sigmas=False"),
        ({"use_dynamic_shifting": True}, {}, "use_dynamic_shifting=True.*give image_seq_len, or .*shifting=False"),
        ({}, {"sigmas": linear(3)}, r"sigmas has shape \(3,\) and num_inference_steps is 4; .*linspace\(1, 1 / T, T\)"),
        ({}, {"sigmas": [1.0, 0.6, 0.3, 0.1, 0.0]}, r"shape \(5,\).*without the final 0"),
        ({}, {"sigmas": [[1.0, 0.6, 0.3, 0.1]]}, r"shape \(1, 4\)"),
        ({}, {"sigmas": [0.8, 0.6, 0.7, 0.1]}, r"sigmas \[0.8, 0.6, 0.7, 0.1, 0\].*within \[0, 1\]; change .*sigmas"),
        ({}, {"sigmas": [1.2, 0.6, 0.3, 0.1]}, "decrease strictly within"),
        ({}, {"sigmas": [1.0, 0.6, 0.6, 0.1]}, "decrease strictly"),
        ({}, {"sigmas": [1.0, 0.6, 0.3, 0.0]}, "decrease strictly"),
        ({}, {"sigmas": [1.0, math.nan, 0.3, 0.1]}, "decrease strictly"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number of at least 1"),
        ({"shift_terminal": 0.1}, {"num_inference_steps": 1}, r"\[nan, 0\].*shift_terminal"),
        ({}, {"sde": "euler"}, "sde='euler' is not known; choose one of flow, dance, cps"),
    ],
    ids=str,
)
def test_schedulers_without_a_falling_list_are_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        StepTable.from_scheduler(scheduler_of(**config), **{"num_inference_steps": 4, "noise_level": 0.7, **arguments})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_other_flow_schedulers_are_refused(name, settings):
    diffusers = pytest.importorskip("diffusers")
    message = rf"{name} is a flow scheduler .*FlowMatchEulerDiscreteScheduler.from_config.* sigmas to StepTable.flow"
    with pytest.raises(ValueError, match=message):
        StepTable.from_scheduler(getattr(diffusers, name)(**settings), 10)


def test_options_of_ddim_are_refused():
    message = "eta is DDIM's and FlowMatchEulerDiscreteScheduler is a flow scheduler; leave it out and use noise_level"
    with pytest.raises(ValueError, match=message):
        StepTable.from_scheduler(scheduler_of(), 10, eta=1.0)


def test_a_part_of_a_schedule_for_editing():
    """sigmas that start below 1, as image-to-image has them."""
    table = StepTable.from_scheduler(scheduler_of(), 4, sigmas=[0.6, 0.45, 0.3, 0.15], credit="native")
    assert equal(table, StepTable.flow([*torch.tensor([0.6, 0.45, 0.3, 0.15]).tolist(), 0.0], credit="native"))


def test_a_class_that_derives_from_the_scheduler_is_one():
    derived = type("MyFlowScheduler", (type(scheduler_of()),), {})(shift=3.0)
    assert equal(StepTable.from_scheduler(derived, 10), StepTable.from_scheduler(scheduler_of(shift=3.0), 10))


def test_the_sigmas_that_a_scheduler_is_set_to():
    scheduler = scheduler_of(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler was not set to any timesteps"):
        StepTable.from_scheduler(scheduler, use_current=True)
    scheduler.set_timesteps(10, sigmas=linear(10), mu=0.9)
    table = StepTable.from_scheduler(scheduler, use_current=True, sde="dance")
    assert torch.equal(table.timesteps, scheduler.timesteps)
    assert equal(table, StepTable.flow(scheduler.sigmas, sde="dance"), leave_out=("timesteps",))
    with pytest.raises(ValueError, match="num_inference_steps=9 and the scheduler is set to 10 steps"):
        StepTable.from_scheduler(scheduler, 9, use_current=True)
    with pytest.raises(ValueError, match="sigmas and use_current=True were both given"):
        StepTable.from_scheduler(scheduler, use_current=True, sigmas=linear(10))
