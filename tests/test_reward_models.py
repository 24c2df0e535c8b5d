"""Rewards with a model, on tiny models of the real structure, against their published definitions."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from pcpo_fast import train
from pcpo_fast.digits.models import build_tokenizer
from pcpo_fast.errors import RewardError, SettingError
from pcpo_fast.prompts import Prompts
from pcpo_fast.reward_settings import RewardSettings
from pcpo_fast.rewards import MODELS, RewardSet, clip
from pcpo_fast.rewards.clip import Aesthetic, ClipScore, ModelOptions, PickScore
from pcpo_fast.rewards.ocr import text_of

# not square, so that the crop counts
IMAGES = torch.rand(5, 3, 40, 56, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a seven", "the digit three", "a seven", "zero", "a very long prompt " * 20]
AESTHETIC_WIDTHS = (16, 1024, 128, 64, 16, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP model with its processor, and LAION's head, as a user has them on disk."""
    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("clip"), build_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": 32, "patch_size": 8}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text | size, vision_config=vision | size, projection_dim=16)
    model = CLIPModel(config)
    # as initialised, all texts have nearly the same vector
    for name, parameter in model.named_parameters():
        if "projection" in name or "embedding" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    head = {}
    for layer, (inputs, outputs) in zip((0, 2, 4, 6, 7), itertools.pairwise(AESTHETIC_WIDTHS), strict=True):
        head[f"layers.{layer}.weight"] = torch.randn(outputs, inputs) / math.sqrt(inputs)
        head[f"layers.{layer}.bias"] = torch.randn(outputs)
    torch.save(head, path / "sac+logos+ava1-l14-linearMSE.pth")
    return path


@pytest.fixture(scope="module")
def vectors(folder, tmp_path_factory):
    """The model's own embeddings of each image, read from a PNG file, and its prompt; one at a time."""
    files, model = tmp_path_factory.mktemp("files"), CLIPModel.from_pretrained(folder)
    processor, tokenizer = clip_processor(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for index, prompt in enumerate(PROMPTS):
        Image.fromarray(np.uint8(np.rint(IMAGES[index].permute(1, 2, 0).numpy() * 255))).save(files / f"{index}.png")
        pixels = processor(images=Image.open(files / f"{index}.png"), return_tensors="pt")
        tokens = tokenizer([prompt], padding=True, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            output = model(**pixels, **tokens)
        rows.append((output.image_embeds[0], output.text_embeds[0]))
    images, texts = (torch.stack(part) for part in zip(*rows, strict=True))
    return images, texts, model.logit_scale.exp().item()


def clip_processor(folder):
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", CLIPImageProcessor).from_pretrained(folder)


def published(name, folder, vectors):
    images, texts, scale = vectors
    cosines = (images * texts).sum(1)
    if name == "aesthetic":
        head, x = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth"), images
        for layer in (0, 2, 4, 6, 7):
            x = x @ head[f"layers.{layer}.weight"].T + head[f"layers.{layer}.bias"]
        return x.squeeze(1)
    return {"clip_score": 100 * cosines, "pickscore": scale * cosines / 26}[name]


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("name", ["clip_score", "pickscore", "aesthetic"])
def test_scores_are_those_of_the_published_definition(folder, vectors, name, batch_size):
    rewards = RewardSet([f"{name}:{folder}"], options=RewardSettings(reward_batch_size=batch_size))
    total, _ = rewards(IMAGES, PROMPTS)
    expected = published(name, folder, vectors)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    # it tells images, and prompts, apart by much more
    assert expected.std() > 0.01
    moved = (rewards(IMAGES, PROMPTS[::-1])[0] - expected).abs().max()
    assert moved < 1e-5 if name == "aesthetic" else moved > 0.01


def test_images_are_rounded_as_for_a_file(folder):
    pixels = (IMAGES * 255).round()
    offset = torch.where(torch.rand(IMAGES.shape) < 0.5, -0.4, 0.4)
    near = ((pixels + offset).clamp(0, 255)) / 255
    for kind in (ClipScore, PickScore, Aesthetic):
        reward = kind(str(folder))
        assert torch.equal(reward(near, PROMPTS), reward(pixels / 255, PROMPTS))


def test_distinct_prompts_are_encoded_once_and_in_batches(folder):
    reward, seen = ClipScore(str(folder), ModelOptions(batch_size=2)), []
    encoder = reward.encoder(IMAGES)

    def texts(prompts):
        seen.append(list(prompts))
        return encoder.texts(prompts)

    def images(pictures):
        seen.append(len(pictures))
        return encoder.images(pictures)

    expected = reward(IMAGES, PROMPTS)
    reward._encoders[IMAGES.device] = dataclasses.replace(encoder, texts=texts, images=images)
    assert torch.equal(reward(IMAGES, PROMPTS), expected)
    assert seen == [PROMPTS[:2], PROMPTS[3:], 2, 2, 1]


def test_precision_and_device_are_settings(folder, vectors):
    options = RewardSettings(reward_dtype="bf16", reward_device="cpu")
    # images elsewhere are fetched
    [(reward, _)] = RewardSet([f"pickscore:{folder}"], options=options).rewards.values()
    scores = reward(IMAGES, PROMPTS)
    assert reward.encoder(IMAGES).images(clip.to_pictures(IMAGES)).dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert 0 < (scores - published("pickscore", folder, vectors)).abs().max() < 0.02
    assert list(reward._encoders) == [torch.device("cpu")]
    with pytest.raises(SettingError, match=r"^reward_device: cuda:99 is not there"):
        RewardSet([f"pickscore:{folder}"], options=RewardSettings(reward_device="cuda:99"))


def test_a_model_is_loaded_lazily_and_once(folder, monkeypatch):
    """Sets of the same settings share it: the check, the trial and the run each make one."""
    loaded, load = [], clip.load_clip
    monkeypatch.setattr(clip, "load_clip", lambda *arguments: loaded.append(arguments) or load(*arguments))
    options = RewardSettings(reward_batch_size=3)
    sets = [RewardSet([f"clip_score:{folder}=2"], options=options) for _ in range(2)]
    assert loaded == []
    first, second = (rewards(IMAGES, PROMPTS)[0] for rewards in sets)
    assert torch.equal(first, second) and len(loaded) == 1


def test_weights_that_lack_layers_are_refused(folder, tmp_path):
    """transformers would draw them at random."""
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingError, match=r"lack visual_projection.weight.*This was a trial before the run"):
        RewardSet([f"clip_score:{tmp_path}"]).try_out(Prompts(PROMPTS, {}), (32, 32), torch.device("cpu"))


def test_a_head_is_never_unpickled(folder, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"layers.0.weight": Harm()}, tmp_path / "head.pth")
    with pytest.raises(SettingError, match="UnpicklingError"):
        RewardSet([f"aesthetic:{tmp_path}"]).try_out(Prompts(PROMPTS, {}), (32, 32), torch.device("cpu"))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("weights", ["/not/there", "./not/there", "there/", ""])
@pytest.mark.parametrize("name", ["pickscore", "clip_score", "aesthetic"])
def test_a_wrong_path_is_one_line_before_a_model_is_looked_for(capsys, name, weights):
    arguments = ["--model", "./no-such-model", "--rewards", f"{name}:{weights}", "--eval-rewards"]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    start = f"error: --rewards: the reward '{name}:{weights}' looks for {weights}/config.json, which is not there; give"
    assert error.startswith(start) and error.count("\n") == 1


def test_a_folder_without_a_processor_or_a_head_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(RewardError, match=r"preprocessor_config.json, which is not there; give"):
        PickScore(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    PickScore(str(tmp_path))
    with pytest.raises(RewardError, match=r"which holds 0 \.pth files; put aesthetic-model.pth there"):
        Aesthetic(str(tmp_path))


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "aesthetic", "clip_score:owner/name"])
def test_a_hub_that_cannot_be_reached_is_one_line_before_a_model_is_looked_for(monkeypatch, tmp_path, capsys, name):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert train.main(["--model", "./no-such-model", "--rewards", name, "--eval-rewards"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --rewards: the reward {name!r} looks for ") and error.count("\n") == 1
    assert "config.json, which cannot be fetched from the hub: " in error and "give a local path" in error


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("ocr", "rapidocr", "ocr"), ("hpsv2", "open_clip", "hps"), ("far", "httpx", "http")]
)
def test_a_missing_package_is_one_line_before_a_model_is_looked_for(monkeypatch, capsys, name, module, extra):
    # as if it were not installed
    monkeypatch.setitem(sys.modules, module, None)
    servers = ["--reward-servers", "far=http://127.0.0.1:9"] if name == "far" else []
    assert train.main(["--model", "./no-such-model", "--rewards", name, "--eval-rewards", *servers]) == 2
    error = f"the reward {name!r} needs {module}, which is not installed; pip install 'pcpo-fast[{extra}]'"
    assert capsys.readouterr().err == f"error: --rewards: {error}\n"


@pytest.mark.parametrize("name", MODELS)
def test_models_are_no_functions_of_the_users_own(name, tmp_path):
    """A file may name them: weights are no program. A function of one's own is refused there."""
    config = tmp_path / "config.json"
    config.write_text(f'{{"rewards": ["{name}:/a/path=2"]}}')
    assert train.parse(["--config", str(config)])[1].data.rewards == (f"{name}:/a/path=2",)
    config.write_text(f'{{"sampler": "{name}:function"}}')
    with pytest.raises(SettingError, match="to import it is to run that program"):
        train.parse(["--config", str(config)])


def word(text, angle=0, size=28):
    """An image of 160x160 pixels with a word in it, float (3, H, W)."""
    picture = Image.new("RGB", (160, 160), (250, 245, 220))
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
    ImageDraw.Draw(picture).text((20, 60), text, fill=(20, 30, 120), font=font)
    pixels = np.asarray(picture.rotate(angle, fillcolor=(250, 245, 220)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


def test_ocr_reads_text():
    """The models of the package itself: right and wrong words, rotated ones, and none."""
    cases = [
        (word("Hello"), 'a sign that says "Hello"', {}, 1),
        (word("Hello", angle=15), 'a sign that says "HELLO"', {}, 1),
        # in capitals, the text is that of the metadata
        (word("Hello"), 'a sign that says "Goodbye"', {"text": "hel lo"}, 1),
        # contained
        (word("Hello"), 'says "ell"', {}, 1),
        # two of five letters are others
        (word("Help"), 'says "Hello"', {}, 1 - 2 / 5),
        (word("Hello"), "says “World”", {}, 1 - 4 / 5),
        # more to change than there are letters
        (word("Goodbye"), 'says "it"', {}, 0),
        (word(""), 'says "Hello"', {}, 0),
    ]
    images, prompts, metadata, expected = zip(*cases, strict=True)
    total, _ = RewardSet(["ocr"])(torch.stack(images), prompts, metadata)
    torch.testing.assert_close(total, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_the_text_of_a_prompt():
    assert text_of('write "Open 24" and "closed"', {}) == "Open 24"
    assert text_of("write “Open”", {"text": None}) == "Open"
    for prompt, metadata in [("no text", {}), ('nothing in ""', {}), ('" "', {}), ('"text"', {"text": 7})]:
        with pytest.raises(RewardError, match="does not say which text to show; put the text into double quotation"):
            text_of(prompt, metadata)
    with pytest.raises(SettingError, match=r"the reward 'ocr' \(setting rewards\): the prompt 'a cat' does not say"):
        RewardSet(["ocr"]).try_out(Prompts(["a cat"], {}), (64, 64), torch.device("cpu"))


def test_hps_scores_are_those_of_the_published_definition(tmp_path, monkeypatch):
    """On ViT-H/14's structure, two layers deep; with the padding of images that are not square."""
    open_clip = pytest.importorskip(
        "open_clip", reason="open_clip needs a torchvision built for this PyTorch", exc_type=Exception
    )
    from pcpo_fast.rewards import hps

    torch.manual_seed(0)
    size = {"width": 64, "layers": 2}
    architecture = {
        "embed_dim": 16,
        "vision_cfg": size | {"image_size": 28, "head_width": 32, "patch_size": 14},
        "text_cfg": size | {"context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, hps.ARCHITECTURE, architecture)
    model = open_clip.create_model(hps.ARCHITECTURE).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    constants_of_clip = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = (torch.tensor(values)[:, None, None] for values in constants_of_clip)
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        picture = Image.fromarray(np.uint8(np.rint(image.permute(1, 2, 0).numpy() * 255)))
        padded = Image.new("RGB", (28, 28))
        padded.paste(picture.resize((28, 20), Image.Resampling.BICUBIC), (0, 4))
        pixels = (torch.from_numpy(np.array(padded)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            features, texts = model.encode_image(pixels[None]), model.encode_text(open_clip.tokenize([prompt]))
        expected.append(F.cosine_similarity(features, texts).item())
    for weights in (tmp_path, tmp_path / "HPS_v2.1_compressed.pt"):
        total, _ = RewardSet([f"hpsv2:{weights}"])(IMAGES, PROMPTS)
        torch.testing.assert_close(total, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    with pytest.raises(SettingError, match=r"HPS_v2.1_compressed.pt, which is not there; give the file"):
        RewardSet([f"hpsv2:{tmp_path.parent}"])
