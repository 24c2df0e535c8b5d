"""The sampler that the settings of a run ask for, and a sampler of one's own."""

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sampler_cases import FLOW_SDES, SD, equal

from pcpo_fast.errors import SettingError
from pcpo_fast.samplers import Schedule, StepTable, build, build_for_evaluation, shifted_sigmas

diffusers = pytest.importorskip("diffusers")


def settings_of(**given) -> SimpleNamespace:
    defaults = {
        "num_inference_steps": 10,
        "sampler": None,
        "eta": None,
        "noise_level": None,
        "shift": None,
        "credit": "constant",
        "target_weight": None,
        "normalized_log_prob": True,
    }
    return SimpleNamespace(**{**defaults, **given})


def diffusion(**config) -> Schedule:
    # the policies hand over the number of patches in both families
    scheduler = diffusers.DDIMScheduler(**{**SD, "clip_sample": False, **config})
    return Schedule(scheduler, image_seq_len=64)


def flow(**config) -> Schedule:
    return Schedule(diffusers.FlowMatchEulerDiscreteScheduler(**config))


def test_a_diffusion_model_is_sampled_with_ddim():
    schedule = diffusion()
    wanted = StepTable.from_scheduler(schedule.scheduler, 10)
    for sampler in (None, "ddim"):
        assert equal(build(settings_of(sampler=sampler), schedule), wanted)
    given = {"eta": 0.6, "credit": "proportionate", "target_weight": 4.0}
    table = build(settings_of(**given, normalized_log_prob=False), schedule, window=(1, 4))
    assert equal(table, StepTable.from_scheduler(schedule.scheduler, 10, **given, normalized=False, window=(1, 4)))


def test_a_flow_model_is_sampled_with_an_sde():
    schedule = flow(shift=3.0)
    wanted = StepTable.from_scheduler(schedule.scheduler, 10, sde="flow", noise_level=0.7)
    for sampler in (None, "flow"):
        assert equal(build(settings_of(sampler=sampler), schedule), wanted)
    for sde in FLOW_SDES:
        given = {"noise_level": 0.4, "credit": "proportionate", "target_weight": 4.0}
        table = build(settings_of(sampler=sde, **given, normalized_log_prob=False), schedule, window=(1, 4))
        direct = StepTable.from_scheduler(schedule.scheduler, 10, sde=sde, **given, normalized=False, window=(1, 4))
        assert equal(table, direct)


def test_the_pipeline_s_own_noise_levels():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = np.linspace(1, 1 / 10, 10).tolist()
    of_steps = {10: sigmas}.get
    table = build(settings_of(), Schedule(scheduler, sigmas=of_steps, image_seq_len=1024))
    assert equal(table, StepTable.from_scheduler(scheduler, 10, sigmas=sigmas, image_seq_len=1024))


@pytest.mark.parametrize("sde", FLOW_SDES)
def test_a_shift_replaces_the_schedule_of_the_pipeline(sde):
    schedule = flow(shift=7.0, num_train_timesteps=500)._replace(sigmas=lambda steps: [0.5])
    given = {"noise_level": 0.4, "credit": "proportionate"}
    table = build(settings_of(sampler=sde, shift=3.0, **given), schedule, window=(0, 2))
    direct = StepTable.flow(shifted_sigmas(10, 3.0), sde=sde, window=(0, 2), num_train_timesteps=500, **given)
    assert equal(table, direct)


def test_evaluation_is_the_same_schedule_without_noise_or_credit():
    given = {"credit": "proportionate", "target_weight": 4.0}
    for shift in (None, 3.0):
        schedule = flow()
        table = build_for_evaluation(settings_of(sampler="dance", noise_level=0.9, shift=shift, **given), schedule)
        trained = build(settings_of(sampler="dance", noise_level=0.9, shift=shift, **given), schedule)
        assert torch.equal(table.timesteps, trained.timesteps) and torch.equal(table.interval, trained.interval)
        assert bool((table.sample_coef == 1).all()) and torch.equal(table.output_coef, -table.interval)
        assert not bool(table.trainable.any())
    schedule = diffusion()
    table = build_for_evaluation(settings_of(eta=0.6, **given), schedule)
    assert equal(table, StepTable.from_scheduler(schedule.scheduler, 10, eta=0.6, credit="native"))


@pytest.mark.parametrize(
    ("make", "given", "setting", "message"),
    [
        (
            diffusion,
            {"sampler": "dance"},
            "sampler",
            "'dance' does not fit DDIMScheduler, a diffusion scheduler",
        ),
        (flow, {"sampler": "ddim"}, "sampler", "'ddim' does not fit FlowMatch.*, a flow scheduler; choose flow, dance"),
        (diffusion, {"sampler": "ddmi"}, "sampler", "'ddmi' is not known; choose ddim, or give .* module:function"),
        (flow, {"sampler": ""}, "sampler", "'' is not known; choose flow, dance, cps, or"),
        (
            diffusion,
            {"noise_level": 0.7},
            "noise_level",
            "is for flow models and DDIMScheduler is",
        ),
        (diffusion, {"shift": 3.0}, "shift", "^shift: is for flow models and DDIMScheduler is"),
        (flow, {"eta": 1.0}, "eta", "^eta: is DDIM's and FlowMatch.*; leave it out and use noise_level"),
        (flow, {"eta": 1.0, "shift": 3.0}, "eta", "^eta: is DDIM's and FlowMatch"),
        (diffusion, {"eta": 3.0}, "eta", "^eta: 3.0 asks for more variance than"),
        (flow, {"noise_level": -1.0}, "noise_level", "^noise_level: -1.0 is not a noise level"),
        (flow, {"shift": 0.0}, "shift", "^shift: 0.0 is not a shift"),
        (flow, {"num_inference_steps": 0}, "num_inference_steps", "^num_inference_steps: 0 must be a whole"),
        (diffusion, {"num_inference_steps": 5000}, "num_inference_steps", "5000 must lie between 1 and"),
        (diffusion, {"credit": "fair"}, "credit", "^credit: 'fair' is not known; choose one of native"),
        (flow, {"credit": "fair"}, "credit", "^credit: 'fair' is not known; choose one of native"),
        (
            diffusion,
            {"target_weight": 0.1, "credit": "published"},
            "target_weight",
            "^target_weight: 0.1 is below",
        ),
        (flow, {"target_weight": -1.0}, "target_weight", "^target_weight: -1.0 is not a credit"),
        (flow, {"target_weight": 1e300}, "target_weight", "1e.300 is not a credit; give a finite number"),
        (lambda: diffusion(clip_sample=True), {}, "model", "DDIMScheduler has clip_sample=True"),
        (lambda: flow(invert_sigmas=True), {}, "model", "has invert_sigmas=True"),
        (lambda: Schedule(diffusers.LMSDiscreteScheduler()), {}, "model", "LMSDiscreteScheduler has no table"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_errors_name_the_setting(make, given, setting, message):
    with pytest.raises(SettingError, match=message) as caught:
        build(settings_of(**given), make())
    assert caught.value.name == setting and len(str(caught.value)) < 400


def test_windows_outside_the_table_are_a_matter_of_their_size():
    with pytest.raises(SettingError, match=r"window_size: window=.*does not lie in the table"):
        build(settings_of(), flow(), window=(8, 12))


# a sampler of one's own

MODULE = """
import torch
from pcpo_fast import StepTable

def noisy(settings, schedule):
    steps = torch.arange(settings.num_inference_steps, 0, -1)
    return StepTable(steps, torch.ones(len(steps)), -0.1 * steps, 0.5 / steps)

def by_hand(settings, schedule):
    table = noisy(settings, schedule)
    return StepTable(table.timesteps, table.sample_coef, table.output_coef, table.std, credit=2 * table.weight)

def unnormalized(settings, schedule):
    table = noisy(settings, schedule)
    return StepTable(table.timesteps, table.sample_coef, table.output_coef, table.std, normalized=False)

def nothing(settings, schedule):
    pass

def short(settings, schedule):
    return noisy(settings, schedule)[:3]

def broken(settings, schedule):
    return schedule.nowhere

def picky(settings, schedule):
    from pcpo_fast.errors import SettingError
    raise SettingError("eta", "is not for this sampler")

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the current folder, which Python does not search by itself here."""
    (tmp_path / "own_samplers.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "own_raising.py").write_text("raise RuntimeError('no such file: alphas.pt')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("own_samplers", "own_broken", "own_raising"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("make", [flow, diffusion, lambda: Schedule(None)])
def test_a_function_is_a_sampler(own, make):
    table = build(settings_of(sampler="own_samplers:noisy"), make())
    steps = torch.arange(10, 0, -1)
    assert torch.equal(table.timesteps, steps)
    torch.testing.assert_close(table.std, 0.5 / steps.double())
    # with the credit of the run
    native = 0.1 * steps.double() / (0.5 / steps.double())
    torch.testing.assert_close(table.weight, native.mean().expand(10), rtol=1e-6, atol=0)
    for credit, wanted in (("native", native), ("proportionate", native.mean().expand(10))):
        table = build(settings_of(sampler="own_samplers:noisy", credit=credit), make())
        torch.testing.assert_close(table.weight, wanted, rtol=1e-6, atol=0)
    table = build(settings_of(sampler="own_samplers:noisy", target_weight=7.0, normalized_log_prob=False), make())
    assert bool((table.weight == 7).all()) and not table.normalized
    # evaluated as it is
    assert equal(
        build_for_evaluation(settings_of(sampler="own_samplers:noisy"), make()),
        build(settings_of(sampler="own_samplers:noisy"), make()),
    )


def test_weights_that_a_function_gives_by_hand_are_kept(own):
    table = build(settings_of(sampler="own_samplers:by_hand"), flow())
    assert torch.equal(table.weight, 2 * table.native_weight)
    with pytest.raises(SettingError, match="target_weight: own_samplers:by_hand gives the weights itself"):
        build(settings_of(sampler="own_samplers:by_hand", target_weight=1.0), flow())


def test_a_log_probability_that_a_function_chose_is_kept(own):
    assert not build(settings_of(sampler="own_samplers:unnormalized"), flow()).normalized


@pytest.mark.parametrize(
    ("sampler", "given", "setting", "message"),
    [
        (
            "own_samplers:nothing",
            {},
            "sampler",
            "own_samplers:nothing returned a NoneType; it must return",
        ),
        (
            "own_samplers:short",
            {},
            "num_inference_steps",
            "10 steps were asked for and own_samplers:short",
        ),
        ("own_samplers:broken", {}, "sampler", "own_samplers:broken raised AttributeError: .*nowhere"),
        ("own_samplers:picky", {}, "eta", "^eta: is not for this sampler$"),
        ("own_samplers:missing", {}, "sampler", "the module 'own_samplers' has no function 'missing'"),
        ("own_samplers:number", {}, "sampler", "'own_samplers:number' is a int, which cannot be called"),
        ("nowhere:noisy", {}, "sampler", "'nowhere:noisy' needs the module 'nowhere', .*run from the folder"),
        (
            "own_broken:noisy",
            {},
            "sampler",
            "'own_broken:noisy' needs the module 'nowhere_to_be_found'",
        ),
        ("own_raising:noisy", {}, "sampler", "'own_raising' .*RuntimeError: no such file: alphas.pt"),
        ("own_samplers:", {}, "sampler", "'own_samplers:' names no function; give module:function"),
        (":noisy", {}, "sampler", "':noisy' names no function"),
        ("../own_samplers.py:noisy", {}, "sampler", "names no function; give module:function, such as"),
        (
            "own_samplers:noisy",
            {"credit": "published"},
            "credit",
            "'published' is for the named samplers",
        ),
        ("own_samplers:noisy", {"target_weight": -1.0}, "target_weight", "^target_weight: -1.0 is not a credit"),
    ],
)
def test_errors_of_a_function_name_it(own, sampler, given, setting, message):
    with pytest.raises(SettingError, match=message) as caught:
        build(settings_of(sampler=sampler, **given), flow())
    assert caught.value.name == setting


def test_a_function_has_no_windows(own):
    with pytest.raises(SettingError, match=r"window_size: a window needs .* own_samplers:noisy does not give"):
        build(settings_of(sampler="own_samplers:noisy"), flow(), window=(1, 3))


def test_the_documented_example_is_ddpm_s_sampler(tmp_path, monkeypatch):
    """docs/samplers.md: the mean of DDIM at eta = 1, the variance beta."""
    page = Path(__file__).parents[1] / "docs" / "samplers.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "my_samplers.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", clip_sample=False, variance_type="fixed_large")
    # diffusers computes in the dtype of its alphas
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    scheduler.one = scheduler.one.double()
    settings = settings_of(sampler="my_samplers:ddpm", num_inference_steps=50, credit="native")
    table = build(settings, Schedule(scheduler))
    sys.modules.pop("my_samplers")
    ddim = StepTable.from_scheduler(scheduler, 50)
    assert torch.equal(table.timesteps, ddim.timesteps)
    torch.testing.assert_close(table.sample_coef, ddim.sample_coef, rtol=1e-12, atol=0)
    torch.testing.assert_close(table.output_coef, ddim.output_coef, rtol=1e-9, atol=1e-12)
    assert bool((table.std[:-1] > ddim.std[:-1]).all()) and float(table.std[-1]) == 0

    scheduler.set_timesteps(50)
    x, m = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for row, timestep in enumerate(scheduler.timesteps):
        z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
        own = torch.Generator().manual_seed(row)
        theirs = scheduler.step(m, timestep, x, generator=own, return_dict=False)[0]
        ours = table.sample_coef[row] * x + table.output_coef[row] * m + table.std[row] * z
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_the_documented_example_prints_its_table(tmp_path, capsys):
    page = Path(__file__).parents[1] / "docs" / "samplers.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, "my_samplers.py", "exec"), {"__name__": "__main__"})
    assert len(capsys.readouterr().out.splitlines()) == 11


@dataclasses.dataclass(frozen=True)
class Settings:
    num_inference_steps: int = 10
    sampler: str | None = None
    eta: float | None = None
    noise_level: float | None = None
    shift: float | None = None
    credit: str = "constant"
    target_weight: float | None = None
    normalized_log_prob: bool = True


def test_settings_are_read_and_never_changed():
    for make in (flow, diffusion):
        assert equal(build(Settings(), make()), build(settings_of(), make()))
        build_for_evaluation(Settings(), make())
