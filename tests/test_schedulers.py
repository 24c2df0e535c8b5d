"""Tables of diffusers' diffusion schedulers, and the door that both families share."""

import itertools
import re
import subprocess
import sys

import pytest
import torch
from sampler_cases import CREDITS, EPS, SD, equal, sd_steps, sd_table

from pcpo_fast.samplers import StepTable


def build_scheduler(name: str, **settings):
    diffusers = pytest.importorskip("diffusers")
    defaults: dict = dict(SD)
    if name in ("DDIMScheduler", "DDPMScheduler"):
        defaults["clip_sample"] = False
    if name == "PNDMScheduler":
        defaults["skip_prk_steps"] = True
    if name in ("DDIMScheduler", "PNDMScheduler"):
        defaults["set_alpha_to_one"] = False
    return getattr(diffusers, name)(**{**defaults, **settings})


SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")


# the scheduler's own final alpha, in its own terms
FINAL_ALPHA = {
    "DDIMScheduler": lambda scheduler: scheduler.final_alpha_cumprod,
    "DDPMScheduler": lambda scheduler: scheduler.one,
    "PNDMScheduler": lambda scheduler: scheduler.final_alpha_cumprod,
    "EulerDiscreteScheduler": lambda scheduler: 1 / (1 + scheduler.sigmas[-1].double() ** 2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [50, 30, 7])
@pytest.mark.parametrize(
    "spacing",
    [
        {},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
    ],
    ids=lambda s: s.get("timestep_spacing", "default"),
)
def test_timesteps_are_the_scheduler_s_own(name, num_steps, spacing):
    scheduler = build_scheduler(name, **spacing)
    table = StepTable.from_scheduler(scheduler, num_steps)
    scheduler.set_timesteps(num_steps)
    # PLMS evaluates one timestep twice; Euler's linspace lies between training timesteps
    own = list(dict.fromkeys(scheduler.timesteps.tolist()))
    assert len(table) == len(own) == num_steps
    if name == "EulerDiscreteScheduler":
        assert max(abs(a - b) for a, b in zip(table.timesteps.tolist(), own, strict=True)) <= 0.5
    else:
        assert table.timesteps.tolist() == own
    # and its alphas
    final = float(FINAL_ALPHA[name](scheduler))
    direct = StepTable.ddim(scheduler.alphas_cumprod, table.timesteps, final_alpha_cumprod=final)
    assert torch.equal(table.rows, direct.rows)


@pytest.mark.parametrize(
    ("name", "settings", "first_alpha"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False}, True),
        ("DDIMScheduler", {"set_alpha_to_one": True}, False),
        ("PNDMScheduler", {"set_alpha_to_one": False}, True),
        ("PNDMScheduler", {"set_alpha_to_one": True}, False),
        ("DDPMScheduler", {}, False),
        ("EulerDiscreteScheduler", {}, False),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, True),
    ],
)
def test_final_alpha_is_the_scheduler_s_own(name, settings, first_alpha):
    scheduler = build_scheduler(name, steps_offset=1, timestep_spacing="leading", **settings)
    table = StepTable.from_scheduler(scheduler, 20)
    scheduler.set_timesteps(20)
    own = float(FINAL_ALPHA[name](scheduler))
    assert own == pytest.approx(float(scheduler.alphas_cumprod[0]) if first_alpha else 1.0, rel=1e-6)
    # with epsilon-prediction a = sqrt(ap / at)
    at = scheduler.alphas_cumprod[table.timesteps].double()
    assert float((table.sample_coef**2 * at)[-1]) == pytest.approx(own, rel=1e-6)
    assert bool(table.trainable[-1]) == first_alpha


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_s_configuration_gives_its_table(name):
    scheduler = build_scheduler(name, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    table = StepTable.from_scheduler(scheduler, 50)
    assert torch.equal(table.timesteps, sd_steps(50))
    # 1 - alpha is 1e-3 at the last steps, where the scheduler's float32 leaves 6e-5 of it
    torch.testing.assert_close(table.std[:-1], sd_table(50).std[:-1], rtol=1e-3, atol=0)
    # the other arguments reach the table
    settings = {"credit": "proportionate", "target_weight": 0.6, "eta": 0.9}
    passed_on = StepTable.from_scheduler(scheduler, 50, **settings)
    final = float(FINAL_ALPHA[name](scheduler))
    direct = StepTable.ddim(scheduler.alphas_cumprod, sd_steps(50), final_alpha_cumprod=final, **settings)
    assert torch.equal(passed_on.rows, direct.rows)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_the_scheduler_s_own(name, prediction_type):
    if name == "EulerDiscreteScheduler" and prediction_type == "sample":
        pytest.skip("Euler-discrete knows no sample-prediction")
    scheduler = build_scheduler(name, prediction_type=prediction_type, timestep_spacing="trailing")
    table = StepTable.from_scheduler(scheduler, 10)
    direct = StepTable.ddim(
        scheduler.alphas_cumprod,
        table.timesteps,
        prediction_type=prediction_type,
        final_alpha_cumprod=float(FINAL_ALPHA[name](scheduler)),
    )
    assert torch.equal(table.rows, direct.rows)


ZERO_SNR = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")


def zero_terminal_snr(name: str, prediction_type: str = "v_prediction", spacing: str = "trailing"):
    settings = {"timestep_spacing": spacing, "prediction_type": prediction_type}
    if name != "PNDMScheduler":
        return build_scheduler(name, rescale_betas_zero_snr=True, **settings)
    # it has no such setting, but takes the betas
    betas = build_scheduler("DDIMScheduler", rescale_betas_zero_snr=True).betas
    return build_scheduler(name, trained_betas=betas.numpy(), **settings)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_rows_with_zero_terminal_snr_are_the_step_of_diffusers(prediction_type):
    scheduler = zero_terminal_snr("DDIMScheduler", prediction_type)
    assert float(scheduler.alphas_cumprod[-1]) == 0
    # at eta = 1 the first step forgets x; diffusers' own step may round into the root of a negative number there
    table = StepTable.from_scheduler(scheduler, 20)
    assert bool(torch.isfinite(table.rows).all())
    assert float(table.std[0] ** 2) == pytest.approx(1 - float(scheduler.alphas_cumprod[949]), rel=4 * EPS)
    assert float(table.sample_coef[0]) == pytest.approx(0, abs=1e-7)
    table = StepTable.from_scheduler(scheduler, 20, eta=0.9)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(20)
    x, m, z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(m, timestep, x, eta=0.9, variance_noise=z, return_dict=False)[0]
        ours = table.sample_coef[row] * x + table.output_coef[row] * m + table.std[row] * z
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ZERO_SNR)
@pytest.mark.parametrize("credit", CREDITS)
def test_zero_terminal_snr_leaves_the_credit_of_the_other_steps_alone(credit, name):
    scheduler = zero_terminal_snr(name)
    assert float(scheduler.alphas_cumprod[-1]) < 1e-7
    table = StepTable.from_scheduler(scheduler, 20, credit=credit)
    native = StepTable.from_scheduler(scheduler, 20, credit="native")
    assert int(table.timesteps[0]) == 999 and bool(table.rows.isfinite().all())
    assert float(table.weight[0]) == float(native.weight[0]) and float(table.std[0]) == float(native.std[0])
    others = table.epsilon_weight[1:][table.trainable[1:]]
    # the first step would make 26 of it
    assert 0.8 < float(others.mean()) < 1.3
    if credit in ("constant", "proportionate"):
        assert bool(((others / others.mean() - 1).abs() < 1e-12).all())
        assert table.target_weight == pytest.approx(float(native.epsilon_weight[1:][table.trainable[1:]].mean()))


@pytest.mark.parametrize("name", ZERO_SNR)
@pytest.mark.parametrize("credit", CREDITS)
def test_zero_terminal_snr_has_no_epsilon(credit, name):
    message = r"zero terminal SNR.*v-prediction.*rescale_betas_zero_snr=False or timestep_spacing='leading'"
    with pytest.raises(ValueError, match=message):
        StepTable.from_scheduler(zero_terminal_snr(name, "epsilon"), 20, credit=credit)
    # both are ways out
    StepTable.from_scheduler(zero_terminal_snr(name, "epsilon", "leading"), 20, credit=credit)
    StepTable.from_scheduler(build_scheduler(name, timestep_spacing="trailing"), 20, credit=credit)


# a refusal names one of these
NAMED = r"zero terminal SNR|steps_offset=\d|every step is deterministic|eta=1.0 asks for more variance"


def textbook(alpha, next_alpha, prediction_type, x, m, z):
    """A DDPM-variance DDIM step from the predicted sample and noise, in float64."""
    a, b = alpha**0.5, (1 - alpha) ** 0.5
    if prediction_type == "epsilon":
        sample, noise = (x - b * m) / a, m
    elif prediction_type == "v_prediction":
        sample, noise = a * x - b * m, a * m + b * x
    else:
        sample, noise = m, (x - a * m) / b
    variance = (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
    # the root of 1 - next_alpha - variance, without their difference
    direction = (1 - next_alpha) * (alpha / next_alpha / (1 - alpha)) ** 0.5
    return next_alpha**0.5 * sample + direction * noise + variance**0.5 * z


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_at_their_limits_are_the_textbook_or_refused(name, zero_snr):
    """Every spacing, offset, last alpha and prediction, with one step, some and all of them."""
    x, m, z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    finals = {
        "DDIMScheduler": [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}],
        "PNDMScheduler": [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}],
        "EulerDiscreteScheduler": [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}],
    }
    betas = build_scheduler("DDIMScheduler", rescale_betas_zero_snr=zero_snr).betas.numpy()
    predictions = ["epsilon", "v_prediction"] + (["sample"] if name != "EulerDiscreteScheduler" else [])
    spacings, counts = ("leading", "trailing", "linspace"), (1, 2, 7, 1000)
    tried = refused = 0
    for spacing, offset, final, prediction_type in itertools.product(
        spacings, (0, 1), finals.get(name, [{}]), predictions
    ):
        scheduler = build_scheduler(
            name,
            timestep_spacing=spacing,
            steps_offset=offset,
            prediction_type=prediction_type,
            trained_betas=betas,
            **final,
        )
        alphas = scheduler.alphas_cumprod.double()
        ends_at_one = final.get("set_alpha_to_one", final.get("final_sigmas_type", "zero") == "zero")
        last = 1.0 if ends_at_one else float(alphas[0])
        for count in counts:
            tried += 1
            try:
                table = StepTable.from_scheduler(scheduler, count, credit="native")
            except ValueError as error:
                assert re.search(NAMED, str(error)), (spacing, offset, final, prediction_type, count, str(error))
                refused += 1
                continue
            assert len(table) == count
            at = [float(alphas[index]) for index in table.timesteps]
            for row in {0, 1, count // 2, count - 2, count - 1} & set(range(count)):
                expected = textbook(at[row], [*at, last][row + 1], prediction_type, x, m, z)
                ours = table.sample_coef[row] * x + table.output_coef[row] * m + table.std[row] * z
                # the table takes that difference: where it is 0, the root of its last digit is left
                torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-7)
            assert bool(table.rows.isfinite().all()) and bool((table.std >= 0).all())
            # nearly-zero alphas take part in no mean
            assert not bool((table.epsilon_weight.abs() > 50)[[alpha < 1e-6 for alpha in at]].any())
    assert 0 < refused < tried / 2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample=True.*clip_sample=False"),
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample=True.*clip_sample=False"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding=True.*thresholding=False"),
        (
            "DDPMScheduler",
            {"variance_type": "learned_range"},
            "variance_type='learned_range'.*variance_type='fixed_small'",
        ),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned'.*variance_type='fixed_small'"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas=True.*use_karras_sigmas=False"),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True.*_sigmas=False"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas=True.*use_beta_sigmas=False"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type='continuous'.*='discrete'"),
    ],
)
def test_schedulers_that_are_not_affine_are_refused(name, settings, message):
    if "use_beta_sigmas" in settings:
        pytest.importorskip("scipy")
    with pytest.raises(ValueError, match=rf"{name} has {message}"):
        StepTable.from_scheduler(build_scheduler(name, **settings), 20)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_fixed_variances_are_accepted(variance_type):
    assert len(StepTable.from_scheduler(build_scheduler("DDPMScheduler", variance_type=variance_type), 20)) == 20


def test_other_scheduler_classes_are_refused():
    diffusers = pytest.importorskip("diffusers")
    message = r"LMSDiscreteScheduler has no table; accepted are DDIMScheduler, .*DDIMScheduler.from_config"
    with pytest.raises(ValueError, match=message):
        StepTable.from_scheduler(diffusers.LMSDiscreteScheduler(**SD), 20)


@pytest.mark.parametrize("given", ["ddim", {"num_train_timesteps": 1000}, None, torch.ones(3)], ids=str)
def test_what_is_no_scheduler_is_refused(given):
    with pytest.raises(ValueError, match=r"scheduler is a \w+; give a diffusers scheduler, such as pipeline.scheduler"):
        StepTable.from_scheduler(given, 20)


@pytest.mark.parametrize("num_steps", [0, -3, 2.5, "'20'", True])
def test_step_counts_that_are_none_are_refused(num_steps):
    with pytest.raises(ValueError, match=rf"num_inference_steps={num_steps} must be a whole number of at least 1"):
        StepTable.from_scheduler(build_scheduler("DDIMScheduler"), "20" if num_steps == "'20'" else num_steps)


def test_step_counts_beyond_the_schedule_are_refused():
    with pytest.raises(ValueError, match=r"num_inference_steps=1001 must lie between 1 and .*1000 training"):
        StepTable.from_scheduler(build_scheduler("DDIMScheduler"), 1001)
    with pytest.raises(ValueError, match=r"num_inference_steps is missing; give .*, or use_current=True"):
        StepTable.from_scheduler(build_scheduler("DDIMScheduler"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_class_that_derives_from_a_scheduler_is_one(name):
    scheduler = build_scheduler(name)
    derived = type("My" + name, (type("Between", (type(scheduler),), {}),), {}).from_config(scheduler.config)
    assert equal(StepTable.from_scheduler(derived, 20), StepTable.from_scheduler(scheduler, 20))
    derived = type(derived).from_config(scheduler.config, use_karras_sigmas=True)
    if name == "EulerDiscreteScheduler":
        with pytest.raises(ValueError, match=f"My{name} has use_karras_sigmas=True.*My{name}.from_config"):
            StepTable.from_scheduler(derived, 20)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_timesteps_that_a_scheduler_is_set_to(name, spacing):
    scheduler = build_scheduler(name, timestep_spacing=spacing)
    fresh = StepTable.from_scheduler(scheduler, 20)
    with pytest.raises(ValueError, match=f"this {name} was not set to any timesteps; call its set_timesteps first"):
        StepTable.from_scheduler(scheduler, use_current=True)
    scheduler.set_timesteps(20)
    for current in (
        StepTable.from_scheduler(scheduler, use_current=True),
        StepTable.from_scheduler(scheduler, 20, use_current=True),
    ):
        assert equal(current, fresh)
    with pytest.raises(ValueError, match="num_inference_steps=10 and the scheduler is set to 20 steps"):
        StepTable.from_scheduler(scheduler, 10, use_current=True)


def test_timesteps_of_one_s_own():
    scheduler = build_scheduler("DDPMScheduler")
    scheduler.set_timesteps(timesteps=[999, 640, 31, 7])
    table = StepTable.from_scheduler(scheduler, use_current=True)
    assert table.timesteps.tolist() == [999, 640, 31, 7]
    direct = StepTable.ddim(scheduler.alphas_cumprod, [999, 640, 31, 7], final_alpha_cumprod=1.0)
    assert equal(table, direct)
    scheduler = build_scheduler("EulerDiscreteScheduler", timestep_spacing="linspace")
    scheduler.set_timesteps(20)
    with pytest.raises(ValueError, match="timesteps must be whole numbers"):
        StepTable.from_scheduler(scheduler, use_current=True)


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("noise_level", 0.7),
        ("sde", "flow"),
        ("last_step", "ode"),
        ("sigmas", [1.0, 0.5]),
        ("image_seq_len", 4096),
    ],
)
def test_options_of_flow_samplers_are_refused(option, given):
    message = f"{option} is an option of flow samplers and DDIMScheduler is a diffusion scheduler; leave it out"
    with pytest.raises(ValueError, match=message):
        StepTable.from_scheduler(build_scheduler("DDIMScheduler"), 20, **{option: given})


def test_the_options_of_both_families_reach_the_table():
    scheduler = build_scheduler("DDIMScheduler")
    settings = {"eta": 0.7, "credit": "proportionate", "target_weight": 2.0, "steps": [3, 5], "normalized": False}
    table = StepTable.from_scheduler(scheduler, 20, **settings)
    final = float(scheduler.final_alpha_cumprod)
    assert equal(
        table, StepTable.ddim(scheduler.alphas_cumprod, table.timesteps, final_alpha_cumprod=final, **settings)
    )
    assert table.trainable.nonzero().flatten().tolist() == [3, 5] and not table.normalized


def test_a_scheduler_of_either_family_needs_no_diffusers_until_it_is_used():
    code = "import sys, pcpo_fast.samplers; print([name for name in sys.modules if name.startswith('diffusers')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
