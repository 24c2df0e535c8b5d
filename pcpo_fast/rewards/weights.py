"""What a model of a reward needs: packages, and weights on this machine or on the hub."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

from pcpo_fast.errors import RewardError
from pcpo_fast.terminal import one_line


def need(extra: str, *modules: str) -> None:
    """Imports modules that an extra of this package installs.

    Raises:
        RewardError: if one cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module
            reason = "is not installed" if missing else f"cannot be imported ({type(error).__name__}: {error})"
            raise RewardError(f"needs {module}, which {reason}; pip install 'pcpo-fast[{extra}]'") from error


def find_weights(weights: str, files: Sequence[str]) -> Path | str:
    """A local folder with these files as a path, or the hub name of a repository with them. Nothing is downloaded.

    Raises:
        RewardError: for a folder or a repository without one of them, and for a hub that cannot be reached.
    """
    folder = Path(weights).expanduser()
    # a hub name has the form owner/name and is no path on this machine
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", weights) or folder.exists():
        for name in files:
            if not (folder / name).is_file():
                raise RewardError(
                    f"looks for {weights}/{name}, which is not there; give a folder that holds {', '.join(files)}, or "
                    "a hub name (owner/name)"
                )
        return folder
    for name in files:
        check_hub(weights, name)
    return weights


def check_hub(repository: str, name: str) -> None:
    """Asks whether a file of a repository is in the hub's cache on this machine, or can be fetched.

    Raises:
        RewardError: if it is neither.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(repository, name), str):
            get_hf_file_metadata(hf_hub_url(repository, name))
    except Exception as error:
        # the hub's errors have no class in common
        raise RewardError(
            f"looks for {repository}/{name}, which cannot be fetched from the hub: {type(error).__name__}: "
            f"{one_line(error)}; connect to the hub, log in if the repository asks for it, or give a local path after "
            "the reward's name and a colon"
        ) from error
