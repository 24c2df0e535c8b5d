"""A model's files: programs in them are refused before anything is imported, and the hub's errors say what helps."""

import contextlib
import http.server
import shutil
import sys
import threading
from pathlib import Path

import pytest
from pipelines import FAMILIES, edit

from pcpo_fast.config import ModelSettings
from pcpo_fast.errors import SettingError
from pcpo_fast.policies import find_model, load_policy
from pcpo_fast.policies.sources import UNUSED
from pcpo_fast.train import main

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")


def find(model, **settings):
    return find_model(ModelSettings(**{"model": str(model), "resolution": 64, "guidance_scale": 1.0} | settings))


@pytest.fixture
def copy(models, tmp_path):
    """A function that copies the folder of a family."""
    return lambda family="sd15", name="model": Path(shutil.copytree(models[family], tmp_path / name))


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported, and the check that it was not."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "evil.py"
    assert not (tmp_path / "was-here").exists()
    assert "evil" not in sys.modules


PARTS = sorted(
    {(family, name) for family, build in FAMILIES.items() for name in build().components} | {("sd15", "new")}
)


@pytest.mark.parametrize(("family", "name"), PARTS)
def test_a_part_of_another_library_is_refused_whatever_it_is(copy, evil, family, name):
    folder = copy(family)
    edit(folder / "model_index.json", **{name: ["evil", "Evil"]})
    (folder / name).mkdir(exist_ok=True)
    shutil.copy(evil, folder / name / "evil.py")
    with pytest.raises(
        SettingError, match=rf'^model: .* has the part {name} as \["evil", "Evil"\] .* neither diffusers'
    ):
        find(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"unet": ["evil.py", "Evil"]}, r"part unet as \[\"evil.py\", \"Evil\"\]"),
        ({"unet": ["../evil", "Evil"]}, "'../evil' is neither diffusers nor transformers"),
        ({"unet": ["diffusers_modules.local.evil", "Evil"]}, "is neither diffusers nor transformers"),
        ({"unet": ["stable_diffusion", "StableDiffusionSafetyChecker"]}, "is neither diffusers nor transformers"),
        ({"unet": ["diffusers", "a.b"]}, "a part is named as"),
        ({"unet": "evil.py"}, "a part is named as"),
        ({"unet": {"evil": "Evil"}}, "a part is named as"),
        ({"unet": ["diffusers", "UNet2DConditionModel", "evil"]}, "a part is named as"),
        ({"unet": ["diffusers", None]}, "a part is named as"),
        ({"../evil": ["diffusers", "UNet2DConditionModel"]}, "a part is named as"),
        ({"unet": ["diffusers", "AutoModel"]}, "a class that chooses others by its own files"),
        ({"unet": ["diffusers", "DiffusionPipeline"]}, "a class that chooses others by its own files"),
        ({"text_encoder": ["transformers", "AutoModel"]}, "a class that chooses others by its own files"),
        ({"custom_pipeline": "evil"}, "asks for a program, by custom_pipeline in model_index.json"),
        ({"trust_remote_code": True}, "asks for a program, by trust_remote_code in model_index.json"),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "asks for a program, by auto_map in model_index.json"),
        ({"_class_name": ["evil", "Evil"]}, r"is a \['evil', 'Evil'\], for which there is no policy"),
        ({"_class_name": None}, "is a None, for which there is no policy"),
        ({"unet": [None, None]}, "has no unet in its model_index.json, and a StableDiffusionPipeline needs one"),
        ({"scheduler": ["diffusers", "NoScheduler"]}, "has the scheduler NoScheduler, which diffusers has not"),
        ({"scheduler": ["diffusers", "AutoencoderKL"]}, "has the scheduler AutoencoderKL, which diffusers has not"),
    ],
)
def test_a_part_that_is_named_otherwise_is_refused(copy, evil, entries, message):
    folder = copy()
    edit(folder / "model_index.json", **entries)
    shutil.copy(evil, folder / "unet" / "Evil.txt")
    with pytest.raises(SettingError, match=f"^model: .*{message}"):
        find(folder).schedule()


@pytest.mark.parametrize(
    ("file", "entries", "key"),
    [
        ("unet/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
        ("text_encoder/config.json", {"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ("text_encoder/config.json", {"text_config": {"deep": [{"auto_map": {"A": "evil.E"}}]}}, "auto_map"),
        ("text_encoder/config.json", {"attn_implementation": "owner/kernel"}, "attn_implementation"),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "auto_map"),
        ("tokenizer/tokenizer_config.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("scheduler/scheduler_config.json", {"custom_pipeline": "evil"}, "custom_pipeline"),
        ("vae/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
    ],
)
def test_a_configuration_that_asks_for_a_program_is_refused(copy, evil, file, entries, key):
    folder = copy()
    assert (folder / file).exists()
    edit(folder / file, **entries)
    with pytest.raises(SettingError, match=f"^model: .* has {file}, which asks for a program by {key};"):
        find(folder)


@pytest.mark.parametrize("name", ["diffusers.py", "modeling.py"])
def test_a_program_beside_the_weights_is_refused(copy, evil, name):
    """diffusers before 0.42.1 runs one that has the name of the library."""
    folder = copy()
    shutil.copy(evil, folder / "unet" / name)
    with pytest.raises(SettingError, match=f"^model: .* has unet/{name}, a program;"):
        find(folder)


def test_an_adapter_beside_the_weights_is_refused(copy):
    """transformers would add it to the text encoder, or load another base model that it names."""
    folder = copy()
    edit(folder / "text_encoder" / "adapter_config.json", base_model_name_or_path="owner/other")
    with pytest.raises(SettingError, match=r"^model: .* has text_encoder/adapter_config.json, an adapter that would"):
        find(folder)


def test_words_are_no_programs(copy):
    folder = copy()
    edit(folder / "tokenizer" / "added_tokens.json", auto_map=7)
    edit(folder / "unet" / "config.json", auto_map=None)
    find(folder)


def test_parts_that_nobody_calls_are_not_loaded(copy):
    """Stable Diffusion 1's files name a class of diffusers' own as a library of its own."""
    folder = copy()
    parts = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    assert set(parts) == set(UNUSED)
    edit(folder / "model_index.json", **parts, requires_safety_checker=True)
    pipeline = find(folder).load(decode_batch=1, keep_reference=False).pipeline
    assert [getattr(pipeline, name) for name in parts] == [None] * 3


def test_a_single_file_is_told_how_to_become_a_folder(tmp_path, capsys):
    file = tmp_path / "my.v1.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SettingError, match=r"^model: .* is a single file, and a folder is needed") as error:
        find(file)
    code = error.value.reason.split("`")[3]
    assert (
        code
        == f"StableDiffusionXLPipeline.from_single_file({str(file)!r}).save_pretrained({str(tmp_path / 'my.v1')!r})"
    )
    assert error.value.reason.endswith(f"then --model {tmp_path / 'my.v1'}")
    # whether or not its folder exists
    for missing in (tmp_path / "other.ckpt", "nowhere/other.safetensors"):
        with pytest.raises(SettingError, match="is a single file that does not exist; check its path"):
            find(missing)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers every request with the same status and error code, as the hub's own server does."""

    status, code = 401, ""
    requests = 0

    def do_GET(self):
        type(self).requests += 1
        self.send_response(self.status)
        if self.code:
            self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(status, code=""):
    handler = type("Answer", (Hub,), {"status": status, "code": code})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


ACCOUNT = r"`hf auth login` \(`huggingface-cli login` in older versions\) or set HF_TOKEN"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            401,
            "GatedRepo",
            rf"'owner/name' wants a login: .* accepted its terms at .*/owner/name; .*{ACCOUNT}, or .*--m",
        ),
        (
            403,
            "GatedRepo",
            rf"'owner/name' wants a login: .* accepted its terms at .*/owner/name; .*{ACCOUNT}, or .*--m",
        ),
        (
            401,
            "RepoNotFound",
            rf"'owner/name' does not exist on .*, or is private; .*{ACCOUNT}; .* --model ./owner/name",
        ),
        (
            404,
            "RepoNotFound",
            rf"'owner/name' does not exist on .*, or is private; .*{ACCOUNT}; .* --model ./owner/name",
        ),
        (403, "", rf"'owner/name' wants a login, and the hub refused the one it was given \(403\); .*{ACCOUNT}, or"),
        (400, "", r"the hub answered with an error \(400: .*try again later, or give a folder .*--model ./folder"),
    ],
)
def test_what_the_hub_refuses(cache, monkeypatch, capsys, tmp_path, status, code, message):
    with serving(status, code) as (endpoint, handler):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(SettingError, match=f"(?s)^model: .*{message}"):
            find("owner/name")
        # it is asked once and not again
        assert handler.requests <= 2
        assert main(["--model", "owner/name", "--output-dir", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: --model: ") and "\n" not in printed
    assert not (tmp_path / "run").exists()


def test_a_hub_that_is_not_reached(cache, monkeypatch):
    """It is not asked again and again: nothing sleeps."""
    with serving(200) as (endpoint, _):
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits before another attempt"))
    message = (
        r"the hub was not reached for 'owner/name' \(.*\); check the network .*--model ./folder\).* HF_HUB_OFFLINE=1"
    )
    with pytest.raises(SettingError, match=f"(?s)^model: {message}"):
        find("owner/name")


def test_a_hub_that_must_not_be_asked(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        rf"'owner/name' is not, or not wholly, in the cache {cache}, and HF_HUB_OFFLINE=1 forbids .*--model ./folder"
    )
    with pytest.raises(SettingError, match=f"(?s)^model: {message}"):
        find("owner/name")


def test_a_name_that_the_hub_does_not_take(cache):
    with pytest.raises(SettingError, match=r"(?s)^model: 'own er/name' is no name on the hub: .*give owner/name, or a"):
        find("own er/name")


@pytest.fixture
def cached(cache, models, monkeypatch):
    """A model of the hub in its cache, and no way to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--owner--name"
    shutil.copytree(models["sd15"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_a_model_in_the_cache_needs_no_hub(cached):
    source = find("owner/name", guidance_scale=3.0)
    assert source._files.folder == cached and source._files.revision == cached.name
    assert source.schedule().scheduler.config.num_train_timesteps == 1000
    assert source.load(decode_batch=1, keep_reference=False).encode(["cat"]).tensors()


def test_programs_of_a_model_on_the_hub_are_refused(cached, evil):
    edit(cached / "model_index.json", vae=["evil", "Evil"])
    with pytest.raises(SettingError, match="'evil' is neither diffusers nor transformers"):
        find("owner/name")


def test_what_is_no_pipeline_on_the_hub(cached):
    (cached / "model_index.json").unlink()
    with pytest.raises(
        SettingError, match="'owner/name' on the hub is not a diffusers pipeline: it has no model_index"
    ):
        find("owner/name")


def test_weights_that_are_not_in_the_cache(cached):
    (cached / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    source = find("owner/name")
    with pytest.raises(SettingError, match=r"^model: .*(not wholly, in the cache|could not be loaded)"):
        source.load(decode_batch=1, keep_reference=False)


def test_the_embedded_models_hold_no_programs():
    for name in ("digits", "digits-flow"):
        load_policy(ModelSettings(model=name, guidance_scale=1.0), decode_batch=1, keep_reference=False)
