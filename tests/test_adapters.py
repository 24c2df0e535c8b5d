"""Adapters to start from: what they start, what the KL term pulls towards, and those that do not fit."""

import json
import shutil

import pytest
import torch
from pipelines import FAMILIES, command, make_trainer, records
from safetensors.torch import load_file, save_file

from pcpo_fast.config import Config, ModelSettings
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import find_model, load_policy
from pcpo_fast.train import main

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

FILE = "pytorch_lora_weights.safetensors"


def settings(model, **given):
    return ModelSettings(**{"model": str(model), "resolution": 64, "guidance_scale": 1.0} | given)


def make_policy(model, *, keep_reference=False, **given):
    torch.manual_seed(0)
    return load_policy(settings(model, **given), decode_batch=2, keep_reference=keep_reference)


def move(policy, seed):
    """Moves every trained weight, as updates would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.trainable_parameters():
            weight += torch.randn(weight.shape, generator=generator) / 5
    return policy


@torch.no_grad()
def outputs(policy, reference=False):
    sample = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    predict = policy.predict_reference if reference else policy.predict
    return predict(sample, torch.tensor([900, 300]), policy.encode(["cat", "dog"]))


@pytest.fixture(scope="session")
def adapters(models, tmp_path_factory):
    """The folders of an adapter of each family, which were saved by its policy."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in FAMILIES:
        move(make_policy(models[name], lora_rank=2, lora_alpha=6), 1).save(folder / name)
    return {name: folder / name for name in FAMILIES}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_at_the_adapter(models, adapters, family, dtype):
    """Its rank and scale are its own, whatever the settings for new ones are."""
    base = make_policy(models[family], dtype=dtype)
    trained = make_policy(models[family], dtype=dtype, lora_rank=2, lora_alpha=6)
    trained.load(adapters[family])
    start = make_policy(models[family], dtype=dtype, lora_path=str(adapters[family]))
    assert torch.equal(outputs(start), outputs(trained))
    assert not torch.equal(outputs(start), outputs(base))
    for ours, theirs in zip(start.trainable_parameters(), trained.trainable_parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kl_term_pulls_towards_the_start_or_the_base(models, adapters, family):
    given = {"lora_path": str(adapters[family]), "keep_reference": True}
    base = outputs(make_policy(models[family]))
    start, towards_base = (
        make_policy(models[family], **given),
        make_policy(models[family], **given, kl_reference="base"),
    )
    before, key = outputs(start), start.capture_key()
    weights = move(start, 2).trainable_parameters()
    kept = [weight.detach().clone() for weight in weights]
    assert torch.equal(outputs(start, reference=True), before)
    assert not torch.equal(outputs(start), before)
    # they are where and what they were
    assert all(torch.equal(weight, value) for weight, value in zip(weights, kept, strict=True))
    assert start.capture_key() == key
    assert torch.equal(outputs(move(towards_base, 2), reference=True), base)
    # a new adapter changes nothing before it is trained: both are one
    fresh = make_policy(models[family], kl_reference="start")
    assert torch.equal(outputs(move(fresh, 2), reference=True), base)


def test_the_start_is_kept_only_if_asked_for(models, adapters):
    policy = make_policy(models["sd15"], lora_path=str(adapters["sd15"]))
    with pytest.raises(ValueError, match="were not kept; make the policy with keep_reference=True"):
        outputs(policy, reference=True)


def test_gradients_pass_the_reference(models, adapters):
    """The reference is computed between the forward and the backward pass of the trained model."""
    policy = move(make_policy(models["sd15"], lora_path=str(adapters["sd15"]), keep_reference=True), 2)
    sample = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    inputs = sample, torch.tensor([900, 300]), policy.encode(["cat", "dog"])
    found = []
    for between in (lambda: None, lambda: policy.predict_reference(*inputs)):
        output = policy.predict(*inputs)
        between()
        found.append(torch.autograd.grad(output.square().mean(), policy.trainable_parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_folder_and_its_file_are_the_same(models, adapters):
    policies = [make_policy(models["sd15"], lora_path=str(adapters["sd15"] / name)) for name in ("", FILE)]
    assert torch.equal(*map(outputs, policies))


def test_an_adapter_without_a_configuration_has_the_scale_of_diffusers(models, adapters, tmp_path):
    """diffusers takes the rank for alpha where no file tells it; ranks may differ."""
    tensors = load_file(adapters["sd15"] / FILE)
    layer = sorted(tensors)[0].removesuffix(".lora_A.weight")
    for name in ("A", "B"):
        tensor = tensors[f"{layer}.lora_{name}.weight"]
        tensors[f"{layer}.lora_{name}.weight"] = (tensor[:1] if name == "A" else tensor[:, :1]).contiguous()
    save_file(tensors, tmp_path / "bare.safetensors")
    policy = make_policy(models["sd15"], lora_path=str(tmp_path / "bare.safetensors"))
    pipeline = make_policy(models["sd15"], lora_rank=1).pipeline
    pipeline.unet.delete_adapters(["default"])
    pipeline.load_lora_weights(tmp_path / "bare.safetensors", adapter_name="default")
    sample = torch.randn(1, *policy.latent_shape)
    embeddings = policy.encode(["cat"]).embeddings
    with torch.no_grad():
        theirs = pipeline.unet(sample, 500, embeddings).sample
        ours = policy.denoiser(sample, 500, embeddings).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_saved_comes_back(models, adapters, tmp_path):
    given = {"lora_path": str(adapters["sd15"])}
    policy = move(make_policy(models["sd15"], **given), 2)
    policy.save(tmp_path / "saved")
    again = make_policy(models["sd15"], **given)
    again.load(tmp_path / "saved")
    assert torch.equal(outputs(again), outputs(policy))
    # and is an adapter to start from
    assert torch.equal(outputs(make_policy(models["sd15"], lora_path=str(tmp_path / "saved"))), outputs(policy))


def rewrite(change):
    """A damage: saves the tensors again after `change`."""

    def damage(folder):
        tensors = load_file(folder / FILE)
        change(tensors, sorted(tensors))
        save_file(tensors, folder / FILE)

    return damage


def configured(**entries):
    """A damage: a configuration in PEFT's form."""

    def damage(folder):
        save_file(load_file(folder / FILE), folder / "adapter_model.safetensors")
        (folder / FILE).unlink()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6} | entries))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "cannot be read as an adapter: .* give a folder that pipeline.save_lora_weights or PEFT's"),
        (lambda folder: (folder / FILE).write_bytes(b"{"), "cannot be read as an adapter: "),
        (
            rewrite(lambda tensors, names: tensors.pop(names[0])),
            "have unexpected layers: .*lora_B.weight; give an ada",
        ),
        (
            rewrite(lambda tensors, names: tensors.pop(names[1])),
            "lack layers: .*lora_B.weight; give an adapter of this",
        ),
        (
            rewrite(lambda tensors, names: tensors.update({"unet.x.to_q.lora_A.weight": torch.zeros(2, 8)})),
            "has layers that UNet2DConditionModel lacks: x.to_q; give an adapter of this model",
        ),
        (
            rewrite(lambda tensors, names: tensors.update({names[0]: torch.zeros(2, 999)})),
            r"does not fit this model: .* has shape \[2, 999\] and the model wants \[2, \d+\]",
        ),
        (
            rewrite(lambda tensors, names: tensors.update({"text_encoder.q_proj.lora_A.weight": torch.zeros(2, 8)})),
            "holds text_encoder.q_proj.lora_A.weight, and an adapter to start from holds LoRA layers of the unet alone",
        ),
        (
            rewrite(
                lambda tensors, names: tensors.update({names[0].replace("lora_A", "lora_magnitude"): torch.ones(2)})
            ),
            "holds .*lora_magnitude.weight, and an adapter to start from holds LoRA layers",
        ),
        (
            rewrite(lambda tensors, names: [tensors.pop(name) for name in names]),
            "holds nothing, and an adapter to start from",
        ),
        (
            rewrite(lambda tensors, names: tensors.update({"lora_unet_x.lora_down.weight": torch.ones(2)})),
            "holds lora_unet_x.lora_down.weight, .* convert another trainer's with pipeline.load_lora_weights",
        ),
        (configured(use_dora=True), "was saved with use_dora=True, and plain LoRA layers alone are trained here"),
        (configured(lora_bias=True), "was saved with lora_bias=True"),
        (configured(bias="all"), "was saved with bias='all'"),
        (configured(init_lora_weights="pissa"), "was saved with init_lora_weights='pissa'"),
        (configured(peft_type="LOHA"), "was saved with peft_type='LOHA'"),
        (configured(modules_to_save=["conv_in"]), r"was saved with modules_to_save=\['conv_in'\]"),
        (configured(megatron_config={}, megatron_core="evil"), "was saved with megatron_core='evil'"),
        (configured(r=0), "cannot be added to this model|does not fit this model"),
        (configured(r=3), r"does not fit this model: .* has shape \[2, "),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_weights_are_read(bare, adapters, tmp_path, damage, message):
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["sd15"], folder)
    damage(folder)
    with pytest.raises(SettingError, match=f"^lora_path: .*{message}"):
        find_model(settings(bare("sd15"), lora_path=str(folder)))


@pytest.mark.parametrize(
    ("family", "other", "message"),
    [
        ("sd35", "sd15", "an adapter to start from holds LoRA layers of the transformer alone"),
        (
            "sd15",
            "sdxl",
            "has layers that UNet2DConditionModel lacks: .* and [0-9]+ more; give an adapter of this model",
        ),
        ("flux", "sd35", "does not fit this model: .* has shape .*; give an adapter of this model"),
    ],
)
def test_the_adapter_of_another_model_is_refused(models, adapters, family, other, message):
    with pytest.raises(SettingError, match=f"^lora_path: .*{message}"):
        find_model(settings(models[family], lora_path=str(adapters[other])))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tuning": "full"}, "tuning full trains no adapter; leave out one of the two"),
        ({"lora_target_modules": ("to_q",)}, "it has its own lora_target_modules; leave out one of the two"),
    ],
)
def test_settings_that_an_adapter_excludes(given, message):
    with pytest.raises(SettingError, match=f"^lora_path: 'mine' was given, and {message}"):
        Config().replace(model="m", lora_path="mine", **given).resolved()


@pytest.mark.parametrize("kl_reference", ["start", "base"])
def test_a_run_from_an_adapter_is_resumed(models, adapters, tmp_path, capsys, kl_reference):
    """To the same numbers as one that was not cut off."""
    given = {"resolution": 64, "lora_path": str(adapters["sd15"]), "kl_weight": 0.1, "kl_reference": kl_reference}
    assert main(command(models["sd15"], tmp_path / "whole", **given)) == 0
    assert main(command(models["sd15"], tmp_path / "cut", **given, epochs=1)) == 0
    assert main(["--output-dir", str(tmp_path / "cut"), "--resume", "--epochs", "2"]) == 0
    whole, cut = records(tmp_path / "whole"), records(tmp_path / "cut")
    assert whole[-1] == cut[-1]
    assert whole[1]["update/first_abs_log_ratio"] == 0
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["lora_path"] == str(adapters["sd15"])
    capsys.readouterr()
    other = ["--output-dir", str(tmp_path / "cut"), "--resume", "--lora-path", "elsewhere"]
    assert main(other) == 2
    assert "--lora-path: 'elsewhere' was given, and the checkpoints in" in capsys.readouterr().err


def test_the_first_screen_names_the_adapter(models, adapters, tmp_path, capsys):
    given = {"resolution": 64, "lora_path": str(adapters["sd15"]), "epochs": 1}
    assert main(command(models["sd15"], tmp_path / "run", **given)) == 0
    assert f"lora from {adapters['sd15']}" in capsys.readouterr().out


def test_full_tuning_keeps_the_weights_it_starts_at(models, tmp_path):
    trainer = make_trainer(models["sd15"], tmp_path, tuning="full", kl_weight=0.1, resolution=64)
    before = outputs(trainer.policy)
    assert torch.equal(outputs(move(trainer.policy, 2), reference=True), before)
