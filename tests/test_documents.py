"""Files that a user wrote: encodings, line ends, formats; and errors that name the file and the line."""

import json
import os
import re

import pytest
from pipelines import command, records

from pcpo_fast.config import read_config
from pcpo_fast.errors import SettingError
from pcpo_fast.prompts import load_prompts
from pcpo_fast.study.plan import read_plan
from pcpo_fast.train import main

pytest_plugins = "pipelines"
pytestmark = pytest.mark.usefixtures("one_thread")

READERS = {
    "prompts.txt": ("prompts", lambda path: load_prompts(str(path))),
    "prompts.jsonl": ("prompts", lambda path: load_prompts(str(path))),
    "config.json": ("config", read_config),
    "config.yaml": ("config", read_config),
    "study.yaml": ("study", read_plan),
}


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    """A path that ends as the reader wants it, what reads it, and the name of its errors."""
    setting, read = READERS[request.param]

    def refused(reason):
        return pytest.raises(SettingError, match=rf"^{setting}: cannot read {re.escape(str(path))}: {reason}")

    path = tmp_path / request.param
    return path, lambda: read(path), refused


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: 1\nb: \xe9t\xe9\n", "line 2 is not UTF-8; save it with that encoding"),
        ("a\nb\n".encode("utf-16"), "line 1 is not UTF-8; save it with that encoding"),
        ("a\nb\n".encode("utf-16-le"), "line 1 holds a zero byte; save it as text"),
        (b"", "it is empty"),
        (b"\xef\xbb\xbf \r\n\t\n", "it is empty"),
    ],
)
def test_what_is_no_text_is_refused(reader, content, reason):
    path, read, refused = reader
    path.write_bytes(content)
    with refused(reason):
        read()


@pytest.mark.parametrize(
    ("make", "reason"), [(os.mkdir, "it is a folder; give a text file"), (os.mkfifo, "it is a pipe or a device; give")]
)
def test_what_is_no_file_is_refused(reader, make, reason):
    path, read, refused = reader
    make(path)
    with refused(reason):
        read()
    if path.suffix == ".txt":
        with pytest.raises(SettingError, match=r"^prompts: cannot read /dev/null: it is a pipe or a device"):
            load_prompts("/dev/null")


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "config.YML"])
@pytest.mark.parametrize("encode", ["\ufeff", "\r\n", "\r"], ids=["mark", "crlf", "cr"])
def test_a_config_may_come_from_another_system(tmp_path, name, encode):
    text = '{"epochs": 3,\n "prompts": "déjà.txt"}\n' if "json" in name else "epochs: 3\nprompts: déjà.txt\n"
    text = encode + text if encode == "\ufeff" else text.replace("\n", encode)
    (tmp_path / name).write_bytes(text.encode())
    assert read_config(tmp_path / name) == {"epochs": 3, "prompts": "déjà.txt"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", '{"epochs": 3,\n "epochs": 4}', "'epochs' is written twice; keep one"),
        ("a.json", '{"epochs": 3,}', ".*line 1 column 1"),
        ("a.json", "[" * 100_000, "it is nested too deeply"),
        ("a.yaml", "epochs: 3\nepochs: 4", "line 2: 'epochs' is written twice"),
        ("a.yaml", "epochs: !!bool 3", "it is not YAML, or holds a value that does not fit its tag: KeyError"),
        ("a.yaml", "epochs: !!timestamp x", "it is not YAML, or holds a value that does not fit its tag"),
        ("a.yaml", "[" * 5_000, "it is not YAML, or holds a value that does not fit its tag"),
        ("a.yaml", "epochs: [", "it is not YAML, .*line 1"),
    ],
)
def test_what_is_not_json_or_yaml_is_refused(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(SettingError) as error:
        read_config(path)
    assert re.match(f"config: cannot read {path}: {reason}", str(error.value), re.DOTALL), str(error.value)


# prompts


def prompts(tmp_path, content, name="prompts.txt"):
    (tmp_path / name).write_bytes(content.encode())
    return load_prompts(str(tmp_path / name))


def test_the_mark_of_the_encoding_is_no_prompt(tmp_path):
    assert prompts(tmp_path, "\ufeffa cat\na dog\n") == ["a cat", "a dog"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_newlines_alone_end_a_prompt(tmp_path, end):
    within = "one\u2028two\u2029three\u0085four\x0cfive\x0bsix\x1cseven"
    assert prompts(tmp_path, f"{within}{end}{end}  a dog {end}") == [within, "a dog"]


def test_every_line_of_a_text_is_a_prompt(tmp_path):
    lines = ["# a cat", "// a dog", '{"prompt": "a bear"}', '"quoted"', "a cat", "a cat"]
    assert prompts(tmp_path, "\n".join(lines)) == lines
    assert prompts(tmp_path, "a cat", "no_suffix") == ["a cat"]


def test_lines_of_json(tmp_path):
    found = prompts(tmp_path, '"a cat"\r\n\n{"prompt": " a dog ", "tag": {"count": 2}}\n"a cat"\n', "prompts.JSONL")
    assert found == ["a cat", "a dog", "a cat"]
    assert found.about(["a dog", "a cat", "a bear"]) == [{"tag": {"count": 2}}, {}, {}]


def test_a_list_of_json(tmp_path):
    found = prompts(tmp_path, '["a cat",\n {"prompt": "a dog", "tag": 1}]', "prompts.json")
    assert found == ["a cat", "a dog"] and found.about(["a dog"]) == [{"tag": 1}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.jsonl", '"a cat"\na dog\n', "{}, line 2 is not JSON: Expecting value"),
        ("p.jsonl", '"a cat"\n\n{"prompt": "a dog"', "{}, line 3 is not JSON: Expecting"),
        ("p.jsonl", '"a cat"\n{"caption": "a dog"}', "{}, line 2 is no prompt; give a text, or an object with a text"),
        ("p.jsonl", '"a cat"\n7', "{}, line 2 is no prompt"),
        ("p.jsonl", '"a cat"\n" "', "{}, line 2 is no prompt"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "{}, line 1 is not JSON: 'prompt' is written twice"),
        ("p.jsonl", '{"prompt": ["a"]}', "{}, line 1 is no prompt"),
        (
            "p.jsonl",
            '{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 2}',
            "{}, line 2 has a prompt that was there before",
        ),
        ("p.jsonl", "[" * 100_000, "{}, line 1 is not JSON: it is nested too deeply"),
        ("p.json", '["a cat",\n"a dog"', "{} is not JSON: Expecting ',' delimiter: line 2"),
        ("p.json", '{"prompt": "a cat"}', "{} holds no list; give a list of texts"),
        ("p.json", '["a cat", null]', "{}, entry 2 is no prompt"),
        ("p.json", "[]", "{} holds no prompt; give at least one"),
    ],
)
def test_prompts_that_are_none_are_refused(tmp_path, name, content, reason):
    with pytest.raises(SettingError) as error:
        prompts(tmp_path, content, name)
    assert error.value.name == "prompts"
    assert error.value.reason.startswith(reason.format(tmp_path / name)), error.value.reason


@pytest.mark.parametrize("name", ["none.txt", "~nobody/prompts.txt", "prompts", "x" * 5000])
def test_prompts_that_are_not_there(name):
    with pytest.raises(SettingError, match=r"is neither a file nor a built-in list; give .* digits, animals$"):
        load_prompts(name)


def test_rewards_get_what_the_file_says_of_a_prompt(model, tmp_path, monkeypatch, capsys):
    """In the trial, in training and in evaluations."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"number {digit}", "about": digit}) for digit in "123"))
    (tmp_path / "with_metadata.py").write_text(
        "def score(images, prompts, metadata):\n"
        "    assert [row['about'] for row in metadata] == [prompt[-1] for prompt in prompts]\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"rewards": ("with_metadata:score",), "eval_rewards": ("with_metadata:score",), "prompts": str(path)}
    assert main(command(model, tmp_path / "run", epochs=1, **own)) == 0, capsys.readouterr().err
    assert [record["epoch"] for record in records(tmp_path / "run")] == [0, 1, 1]
