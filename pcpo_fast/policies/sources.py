"""The files of a pipeline: found in a folder or on the hub, and refused where loading them would run a program.

Only JSON is read here. What a folder may name is listed in docs/security.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pcpo_fast.errors import SettingError

DIGITS = Path(__file__).parent.parent / "digits"
# the models that come with the package
EMBEDDED = {"digits": DIGITS / "diffusion", "digits-flow": DIGITS / "flow"}
LIBRARIES = ("diffusers", "transformers")
# parts that no policy calls and that are never loaded
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
# a module of diffusers' own, in the files of every Stable Diffusion 1
SAFETY_CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]
# entries with which a file asks for a program
PROGRAMS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
# a single file of weights
WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")


@dataclasses.dataclass(frozen=True)
class Files:
    """The JSON files of a pipeline.

    Attributes:
        folder: where they lie: the pipeline's folder, or the hub's cache.
        location: what `from_pretrained` is given: that folder, or the name on the hub.
        revision: the commit on the hub that was read, so that the weights are those of the same one; None for a folder.
    """

    folder: Path
    location: Path | str
    revision: str | None = None

    def read(self, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            SettingError: if it is missing or damaged.
        """
        path = self.folder / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingError("model", f"{path} could not be read: {error}") from error
        if not isinstance(values, dict):
            raise SettingError("model", f"{path} does not hold a JSON object")
        return values

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Makes errors of files that are missing or damaged, and of the hub, name the model."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, SettingError):
                raise
            reason = None if self.revision is None else _explain(str(self.location), error)
            raise SettingError("model", reason or f"{self.location} could not be loaded: {error}") from error


def open_model(model: str) -> Files:
    """The files of the pipeline with that name: a local folder, a hub name, or an embedded model.

    Raises:
        SettingError: if there is none, or the hub cannot be reached or wants a login.
    """
    folder = EMBEDDED.get(model, Path(model).expanduser())
    single = folder.suffix in WEIGHTS
    # a hub name has the form owner/name and is no path on this machine
    is_path = model in EMBEDDED or model[:1] in ("", ".", "/", "~") or model.count("/") != 1 or folder.parent.exists()
    if not is_path and not single:
        return _open_hub(model)
    if (folder / "model_index.json").is_file():
        return Files(folder, folder)
    if single and not folder.is_dir():
        raise SettingError("model", _single_file(model, folder))
    raise SettingError(
        "model",
        f"{model!r} is not a diffusers pipeline: {model}/model_index.json not found; give a folder that "
        f"DiffusionPipeline.save_pretrained wrote, a hub name (owner/name), or {' or '.join(EMBEDDED)}",
    )


def _open_hub(model: str) -> Files:
    """The files of a pipeline on the hub, which are fetched into its cache.

    Raises:
        SettingError: if the hub cannot be reached, wants a login, or has no such pipeline.
    """
    from huggingface_hub import snapshot_download

    try:
        # tells at once that the hub is not there, where single files would be asked for again and again
        folder = Path(snapshot_download(model, allow_patterns=["model_index.json", "*/*.json", "*/*.py"]))
    except Exception as error:
        reason = _explain(model, error) or f"{model!r} could not be read from the hub: {error}"
        raise SettingError("model", reason) from error
    if not (folder / "model_index.json").is_file():
        raise SettingError(
            "model",
            f"{model!r} on the hub is not a diffusers pipeline: it has no model_index.json; give the name of one that "
            "has, such as its version for diffusers, or a folder (--model ./folder)",
        )
    return Files(folder, model, folder.name)


def check_programs(model: str, files: Files, index: Mapping[str, Any]) -> None:
    """Refuses a pipeline whose files name a program of their own. Nothing of the pipeline was imported before.

    Raises:
        SettingError: for such a file; it names the entry.
    """
    whole = "give a pipeline that DiffusionPipeline.save_pretrained wrote from parts of these"
    for name, part in index.items():
        if name.startswith("_") or part == [None, None]:
            continue
        if name in PROGRAMS:
            raise SettingError("model", f"{model!r} asks for a program, by {name} in model_index.json; {whole}")
        if part is None or isinstance(part, bool | int | float):
            continue
        given = f"{model!r} has the part {name} as {json.dumps(part)} in model_index.json"
        names = isinstance(part, list) and len(part) == 2 and all(isinstance(text, str) for text in part)
        if not name.isidentifier() or not names or not part[1].isidentifier():
            raise SettingError("model", f'{given}; a part is named as ["diffusers" or "transformers", class]: {whole}')
        if part == SAFETY_CHECKER and name == "safety_checker":
            continue
        if part[0] not in LIBRARIES:
            raise SettingError(
                "model",
                f"{given}, and {part[0]!r} is neither diffusers nor transformers: to load it would be to run a program "
                f"that came with the model; {whole}",
            )
        # these read the class from files of their own
        if "Pipeline" in part[1] or (part[1].startswith("Auto") and not part[1].startswith("Autoencoder")):
            raise SettingError("model", f"{given}, a class that chooses others by its own files; {whole}")
        _check_part(model, files.folder / name)


def _check_part(model: str, folder: Path) -> None:
    """Refuses programs in the folder of a part, and files that ask for one."""
    for path in sorted(folder.glob("*")):
        shown = f"{model!r} has {folder.name}/{path.name}"
        if path.suffix == ".py":
            raise SettingError("model", f"{shown}, a program; if the model does not need it, remove it from a copy")
        if path.name == "adapter_config.json":
            raise SettingError(
                "model", f"{shown}, an adapter that would be added unasked; give a pipeline with the adapter fused"
            )
        # files of tokens may hold any words
        if path.suffix != ".json" or "config" not in path.name:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # whoever needs it says so
            continue
        for key, value in _entries(content):
            # the hub's packages of attention kernels have a slash in their names
            kernel = key.endswith("attn_implementation") and "/" in str(value)
            if (key in PROGRAMS and value) or kernel:
                raise SettingError(
                    "model",
                    f"{shown}, which asks for a program by {key}; remove that entry from a copy if you trust it",
                )


def check_variant(folder: Path, variant: str | None) -> None:
    """Refuses a variant that the denoiser's `folder` lacks, and none where it holds nothing but variants.

    Raises:
        SettingError: with the variants that are there.
    """
    parts = [path.name.split(".") for path in folder.glob("*") if path.suffix in WEIGHTS]
    # model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
    found = {name[1].partition("-")[0] if len(name) > 2 else None for name in parts}
    if found and variant not in found:
        there = " or ".join(f"--variant {name}" for name in sorted(filter(None, found)))
        raise SettingError(
            "variant",
            f"{f'{variant!r} is not in' if variant else 'is not set, and only variants are in'} {folder}; use "
            f"{' or '.join(filter(None, ['none' if None in found else '', there]))}",
        )


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(content, dict):
        yield from content.items()
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _entries(inner)


def _single_file(model: str, path: Path) -> str:
    """The way from a single file to a folder."""
    if not path.is_file():
        return f"{model!r} is a single file that does not exist; check its path"
    return (
        f"{model!r} is a single file, and a folder is needed. Convert it once in Python: `from diffusers import "
        f"StableDiffusionXLPipeline` (or the model's own pipeline), `StableDiffusionXLPipeline.from_single_file("
        f"{str(path)!r}).save_pretrained({str(path.with_suffix(''))!r})`; then --model {path.with_suffix('')}"
    )


def _explain(model: str, error: BaseException) -> str | None:
    """What the hub's errors mean and what helps; None for errors of something else."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__

    def find(*kinds: type[BaseException]) -> Any:
        return next((found for found in chain if isinstance(found, kinds)), None)

    login = "log in with `hf auth login` (`huggingface-cli login` in older versions) or set HF_TOKEN"
    folder = "give a folder that was copied to this machine (--model ./folder)"
    status = getattr(getattr(find(errors.HfHubHTTPError), "response", None), "status_code", None)
    if find(errors.GatedRepoError):
        return (
            f"{model!r} wants a login: it is given only to those who accepted its terms at {constants.ENDPOINT}/{model}"
            f"; accept them there and {login}, or {folder}"
        )
    if find(errors.RepositoryNotFoundError):
        return (
            f"{model!r} does not exist on {constants.ENDPOINT}, or is private; check the name. For a private one "
            f"{login}; for a folder write --model ./{model}"
        )
    if find(errors.HFValidationError):
        return f"{model!r} is no name on the hub: {error}; give owner/name, or a folder (--model ./folder)"
    if status in (401, 403):
        return f"{model!r} wants a login, and the hub refused the one it was given ({status}); {login}, or {folder}"
    if status is not None:
        return f"{model!r}: the hub answered with an error ({status}: {error}); try again later, or {folder}"
    if constants.HF_HUB_OFFLINE or find(errors.OfflineModeIsEnabled):
        return (
            f"{model!r} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 forbids to "
            f"ask the hub; unset it once to download the model, or {folder}"
        )
    names = ("ConnectError", "ProxyError", "ConnectTimeout", "ReadTimeout", "NetworkError", "TransportError")
    lost = any(cls.__name__ in names for found in chain for cls in type(found).__mro__)
    if lost or find(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        return (
            f"the hub was not reached for {model!r} ({type(chain[-1]).__name__}: {chain[-1]}); check the network and "
            f"its proxy, or {folder}. Of a model that is in the cache, HF_HUB_OFFLINE=1 uses that"
        )
    return None
