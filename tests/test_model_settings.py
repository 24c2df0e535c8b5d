"""Settings of a model: the size of its images, negative prompts, variants of its files, and its scheduler."""

import json
import shutil

import diffusers
import pytest
import torch
from pipelines import FAMILIES, SD15_SCHEDULER, command, edit, records

from pcpo_fast import samplers
from pcpo_fast.config import Config, ModelSettings, SamplerSettings
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import find_model
from pcpo_fast.samplers import StepTable
from pcpo_fast.samplers.schedulers import convert
from pcpo_fast.train import main

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")


def find(model, **given):
    return find_model(ModelSettings(**{"model": str(model), "guidance_scale": 1.0} | given))


def refused(name, message):
    return pytest.raises(SettingError, match=f"^{name}: .*{message}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"resolution": 96}, (96, 96)),
        ({"height": 48, "width": 80}, (48, 80)),
        ({"resolution": 96, "height": 48}, (48, 96)),
        ({"resolution": 96, "width": 48}, (96, 48)),
        ({"width": 96}, (64, 96)),
    ],
)
def test_the_size_of_the_images(bare, family, given, size):
    # FLUX's own size is in no file
    own = 1024 if family == "flux" and given == {"width": 96} else 64
    expected = tuple(own if side == 64 else side for side in size)
    source = find(bare(family), **given)
    assert source.size == expected
    assert source.schedule().image_seq_len == (
        (expected[0] // 8) * (expected[1] // 8) // (1 if family in ("sd15", "sdxl") else 4)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["height", "width"])
def test_sides_that_do_not_divide_are_refused_by_name(bare, family, name):
    multiple, below, above = (8, 56, 64) if family in ("sd15", "sdxl") else (16, 48, 64)
    with refused(name, f"60 is not a multiple of {multiple}, .*; {below} and {above} are"):
        find(bare(family), **{"resolution": 64, name: 60})


def test_sides_that_sd3_has_no_positions_for_are_refused_by_name(bare):
    folder = bare("sd35")
    for name in ("height", "width"):
        with refused(name, "272 is more than the 256 that this model has positions for; lower it"):
            find(folder, **{name: 272})
    assert find(folder, height=256, width=128).size == (256, 128)


@pytest.mark.parametrize(
    ("size", "expected"), [([8, 12], (64, 96)), (None, None), ([8], None), ("8", None), ([8.0, 8], None), (True, None)]
)
def test_a_models_own_size_may_be_two_sides_or_none(bare, size, expected):
    folder = bare("sd15")
    edit(folder / "unet" / "config.json", sample_size=size)
    if expected is not None:
        assert find(folder).size == expected
        assert find(folder, height=32).size == (32, expected[1])
        return
    with refused("resolution", "is not set, and the model's sample_size is .*; give one in pixels"):
        find(folder)
    assert find(folder, height=32, width=48).size == (32, 48)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_training_on_images_that_are_no_squares(models, tmp_path, family):
    """From the command line, resumed, with pictures; the first ratio is 1."""
    given = {"height": 32, "width": 48, "guidance_scale": 2.0}
    assert main(command(models[family], tmp_path / "run", **given, epochs=1)) == 0
    assert main(["--output-dir", str(tmp_path / "run"), "--resume", "--epochs", "2"]) == 0
    for record in records(tmp_path / "run"):
        assert record.get("update/first_abs_log_ratio", 0) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["height"], saved["width"]) == (32, 48)


def test_negative_prompts_that_have_no_effect_are_refused(bare):
    with refused("negative_prompt", "has no effect with guidance_scale 1; leave it out, or raise guidance_scale"):
        Config().replace(negative_prompt="bad", guidance_scale=1.0).resolved()
    with refused(
        "negative_prompt", r"\(FluxPolicy\) has no second output to steer away from: its guidance is an input"
    ):
        find(bare("flux"), negative_prompt="bad", resolution=64)


def as_variant(folder, name="fp16"):
    """Gives all files of weights the variant's name."""
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(f".{name}.safetensors"))


@pytest.mark.parametrize("family", ["sd15", "sd35"])
def test_variants(models, tmp_path, family):
    folder = shutil.copytree(models[family], tmp_path / "model")
    as_variant(folder)
    with refused("variant", "is not set, and only variants are in .*; use --variant fp16"):
        find(folder)
    with refused("variant", "'bf16' is not in .*; use --variant fp16"):
        find(folder, variant="bf16")
    with refused("variant", "'fp16' is not in .*; use none"):
        find(models[family], variant="fp16")
    loaded = [
        find(where, variant=variant, tuning="full").load(decode_batch=1, keep_reference=False)
        for where, variant in ((folder, "fp16"), (models[family], None))
    ]
    ours, plain = (policy.denoiser.state_dict() for policy in loaded)
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in ours)


def test_a_folder_with_both_reads_the_one_that_is_named(models, tmp_path):
    folder = shutil.copytree(models["sd15"], tmp_path / "model")
    for path in list(folder.rglob("*.safetensors")):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    for variant in (None, "fp16"):
        find(folder, variant=variant).load(decode_batch=1, keep_reference=False)
    with refused("variant", "'int8' is not in .*; use none or --variant fp16"):
        find(folder, variant="int8")


DIFFUSION = {name: SD15_SCHEDULER[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_a_solvers_configuration_as_ddim(name, prediction_type, spacing):
    """Its table is that of a DDIM scheduler with the same alphas, spacing and prediction."""
    shared = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    scheduler = getattr(diffusers, name)(**DIFFUSION, **shared)
    made = convert(scheduler, "ddim")
    assert torch.equal(made.alphas_cumprod, scheduler.alphas_cumprod)
    direct = diffusers.DDIMScheduler(**DIFFUSION, **shared, clip_sample=False, set_alpha_to_one=True)
    ours, theirs = (StepTable.from_scheduler(each, 20) for each in (made, direct))
    assert torch.equal(ours.rows, theirs.rows) and torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize(
    ("scheduler", "final"),
    [
        (diffusers.DPMSolverMultistepScheduler(**DIFFUSION, final_sigmas_type="sigma_min"), False),
        (diffusers.PNDMScheduler(**DIFFUSION), False),
        (diffusers.PNDMScheduler(**DIFFUSION, set_alpha_to_one=True), True),
        (diffusers.DDIMScheduler(**DIFFUSION), True),
        (diffusers.DDIMScheduler(**DIFFUSION, set_alpha_to_one=False, thresholding=True, clip_sample=True), False),
    ],
)
def test_the_last_alpha_stays_the_schedulers_own(scheduler, final):
    made = convert(scheduler, "ddim")
    assert float(made.final_alpha_cumprod) == (1.0 if final else float(scheduler.alphas_cumprod[0]))
    assert not made.config.clip_sample and not made.config.thresholding


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        (diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0), 3.0),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=2.5), 2.5),
        (
            diffusers.DPMSolverMultistepScheduler(
                use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction"
            ),
            2.0,
        ),
    ],
)
def test_a_solvers_configuration_as_a_flow(scheduler, shift):
    made = convert(scheduler, "flow")
    direct = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ours, theirs = (StepTable.from_scheduler(each, 12) for each in (made, direct))
    assert torch.equal(ours.rows, theirs.rows)
    with pytest.raises(ValueError, match=r"'ddim' was given, and .* is of a flow model; use scheduler flow or model"):
        convert(scheduler, "ddim")


@pytest.mark.parametrize("family", ["ddim", "flow"])
@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "KarrasVeScheduler"])
def test_schedulers_of_distilled_and_other_models_are_not_replaced(name, family):
    with pytest.raises(ValueError, match=f"{family!r} was given, and the configuration of {name} does not tell"):
        convert(getattr(diffusers, name)(), family)


def test_a_flow_scheduler_as_a_flow_is_itself():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    assert convert(scheduler, "flow") is scheduler


def test_a_model_that_comes_with_a_solver(models, tmp_path, capsys):
    """It is refused with the setting that trains it, and trained with it."""
    folder = shutil.copytree(models["sd15"], tmp_path / "model")
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    diffusers.DPMSolverMultistepScheduler(**DIFFUSION).save_pretrained(folder / "scheduler")
    assert main(command(folder, tmp_path / "run", epochs=1)) == 2
    error = capsys.readouterr().err
    assert "--model: DPMSolverMultistepScheduler has no table" in error and "scheduler ddim or flow does that" in error
    assert main(command(folder, tmp_path / "run", epochs=1, scheduler="flow")) == 2
    assert (
        "--scheduler: 'flow' was given, and DPMSolverMultistepScheduler is of a ddim model" in capsys.readouterr().err
    )
    assert main(command(folder, tmp_path / "run", epochs=1, scheduler="ddim")) == 0
    given = ModelSettings(model=str(folder), scheduler="ddim")
    source = find_model(given)
    tables = [
        samplers.build(SamplerSettings(num_inference_steps=5), each.schedule())
        for each in (source, source.load(decode_batch=1, keep_reference=False))
    ]
    assert torch.equal(tables[0].rows, tables[1].rows)
