"""Embeddings of prompts, in main memory and on the disk."""

import gc
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from pcpo_fast.errors import SettingError
from pcpo_fast.policies import Conditioning
from pcpo_fast.policies.embeddings import Embeddings

ROW = 4 * 7 * 16 + 2 * 5


@pytest.fixture
def embed():
    calls = []

    def one(prompt):
        calls.append(prompt)
        generator = torch.Generator().manual_seed(len(prompt))
        embeddings = torch.randn(1, 16, 7, generator=generator).transpose(1, 2)
        return Conditioning(embeddings=embeddings, pooled=torch.randn(1, 5, generator=generator).half())

    one.calls = calls
    return one


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


PROMPTS = ["a", "bb", "ccc", "", "with/slash\0 and \ud800"]


@pytest.mark.parametrize("fit", [0, 1, 3, 5])
def test_what_lies_on_the_disk_is_what_was_made(embed, temporary, fit):
    embeddings = Embeddings(embed, bound=fit * ROW)
    embeddings.prepare(PROMPTS)
    assert embed.calls == PROMPTS
    files = list(temporary.glob("*/*.safetensors"))
    assert len(files) == len(PROMPTS) - fit
    for order in (PROMPTS, PROMPTS[::-1], ["bb", "bb", ""]):
        found, wanted = embeddings(order), Conditioning.cat([embed(prompt) for prompt in order])
        assert found.tensors().keys() == wanted.tensors().keys()
        for name, tensor in wanted.tensors().items():
            assert torch.equal(found.tensors()[name], tensor) and found.tensors()[name].dtype == tensor.dtype


def test_a_prompt_is_embedded_once(embed, temporary):
    embeddings = Embeddings(embed, bound=ROW)
    for _ in range(3):
        embeddings(["a", "bb", "a"])
        embeddings.prepare(["bb", "a", "bb"])
    assert embed.calls == ["a", "bb"]


def test_the_files_go_with_the_embeddings(embed, temporary):
    embeddings = Embeddings(embed, bound=0)
    kept = embeddings(["a", "bb"])
    assert list(temporary.iterdir())
    del embeddings
    gc.collect()
    assert not list(temporary.iterdir())
    assert torch.equal(kept[:1].embeddings, embed("a").embeddings)


def test_the_disk_is_asked_before_all_prompts_are_embedded(embed, temporary, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 2 * ROW))
    embeddings = Embeddings(embed, bound=2 * ROW)
    with pytest.raises(
        SettingError, match=rf"^prompts: the embeddings of 5 prompts .* go to {temporary}, where"
    ) as error:
        embeddings.prepare(PROMPTS)
    assert "TMPDIR" in str(error.value) and embed.calls == ["a"]
    embeddings.prepare(PROMPTS[:4])
    assert "the embeddings of 3 prompts" in capsys.readouterr().out
    # nothing is said of what fits in main memory
    Embeddings(embed, bound=5 * ROW).prepare(PROMPTS)
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_is_named(embed, temporary):
    embeddings = Embeddings(embed, bound=0)
    embeddings(["a"])
    [folder] = temporary.iterdir()
    shutil.rmtree(folder)
    Path(folder).write_text("in the way")
    with pytest.raises(SettingError, match=rf"^prompts: {folder}.*TMPDIR"):
        embeddings(["bb"])
