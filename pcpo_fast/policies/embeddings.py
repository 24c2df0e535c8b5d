"""The embeddings of a run's prompts: each is made once, and those that do not fit in main memory lie on the disk."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from pcpo_fast.errors import SettingError
from pcpo_fast.files import writing
from pcpo_fast.policies import Conditioning
from pcpo_fast.terminal import say

# bytes of embeddings that stay in main memory; SD 1.5 has 118 kB a prompt in bfloat16, FLUX.1 4.2 MB
BOUND = 4 << 30


class Embeddings:
    """Conditionings by prompt, on the CPU: the first `BOUND` bytes in main memory, the others in memory-mapped files.

    The files lie in a temporary folder, which ends with this object. TMPDIR says where that is.

    Args:
        embed: the conditioning of one prompt.
        bound: bytes that stay in main memory.
    """

    def __init__(self, embed: Callable[[str], Conditioning], bound: int = BOUND) -> None:
        self.embed, self.bound = embed, bound
        self.bytes = 0
        # a conditioning in main memory, or the file that holds it
        self._made: dict[str, Conditioning | Path] = {}
        self._folder: Path | None = None

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of N prompts, on the CPU.

        Raises:
            SettingError: if what does not fit in main memory cannot be written.
        """
        return Conditioning.cat([self._one(prompt) for prompt in prompts])

    def prepare(self, prompts: Sequence[str]) -> None:
        """Makes the embeddings of all prompts, with a progress bar.

        Raises:
            SettingError: if the disk has no room for those that main memory has none for.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._made]
        for index, prompt in enumerate(tqdm(new, desc="prompts", leave=False, disable=None)):
            before = self.bytes
            self._one(prompt)
            if index == 0:
                self._estimate(len(new), before, self.bytes - before)

    def _estimate(self, count: int, before: int, each: int) -> None:
        """Says how much disk `count` more prompts take, if any, and whether it is there."""
        total = before + each * count
        if total <= self.bound:
            return
        place = Path(tempfile.gettempdir())
        needed, free = total - max(self.bound, before), shutil.disk_usage(place).free
        text = f"the embeddings of {count} prompts take {_size(each * count)}, of which {_size(needed)} go to {place}"
        if needed > free:
            raise SettingError(
                "prompts", f"{text}, where {_size(free)} are free; set TMPDIR to a larger disk, or give fewer prompts"
            )
        say(f"{text}, where {_size(free)} are free")

    def _one(self, prompt: str) -> Conditioning:
        made = self._made.get(prompt)
        if made is not None:
            return _read(made) if isinstance(made, Path) else made
        found = self.embed(prompt).to(torch.device("cpu"))
        size = sum(tensor.nbytes for tensor in found.tensors().values())
        self.bytes += size
        self._made[prompt] = found if self.bytes <= self.bound else self._write(prompt, found)
        return found

    def _write(self, prompt: str, found: Conditioning) -> Path:
        from safetensors.torch import save_file

        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="pcpo-embeddings-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{hashlib.sha256(prompt.encode('utf-8', 'surrogatepass')).hexdigest()}.safetensors"
        try:
            with writing(path):
                save_file({name: tensor.contiguous() for name, tensor in found.tensors().items()}, path)
        except SettingError as error:
            raise SettingError("prompts", f"{error.reason}; TMPDIR is where embeddings go") from error
        return path


def _read(path: Path) -> Conditioning:
    """The conditioning in a file. Its pages are read when they are used, and the system may drop them again."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return Conditioning(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
