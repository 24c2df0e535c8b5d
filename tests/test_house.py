"""The house keeps its rules: who imports whom, how long a file is, and that a list is written once."""

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest

import pcpo_fast
from pcpo_fast.columns import COLUMNS

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "pcpo_fast").rglob("*.py"))
OPS = sorted([*(ROOT / "kernels").glob("*.py"), *(ROOT / "reference").glob("*.py")])
BENCH = sorted((ROOT / "bench").glob("*.py"))
EVERYTHING = [*PACKAGE, *OPS, *BENCH, *sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]


def name(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """The modules that a file imports, relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", OPS, ids=name)
def test_kernels_and_reference_know_the_columns_and_nothing_else_of_the_package(path):
    # a single dot stays in the folder
    outside = {module for module in imports(path) if module.startswith(("..", "pcpo_fast", "kernels", "reference"))}
    assert outside <= {"pcpo_fast.columns"}


def test_the_columns_import_nothing():
    assert list(imports(ROOT / "pcpo_fast" / "columns.py")) == []
    assert len(set(COLUMNS)) == len(COLUMNS)


@pytest.mark.parametrize("path", OPS, ids=name)
def test_guard_is_a_table_and_no_branch(path):
    names = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    strings = set(re.findall(r"[\"'](\w+)[\"']", path.read_text(encoding="utf-8")))
    assert not [word for word in names | strings if "guard" in word.lower()]


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_files_can_be_read_in_one_sitting(path):
    longest = 260 if path.name == "trainer.py" else 420
    assert len(path.read_text(encoding="utf-8").splitlines()) <= longest


def test_the_loss_takes_few_arguments():
    """Twelve, and the two that weigh and reduce rows."""
    assert len(inspect.signature(pcpo_fast.policy_loss).parameters) <= 14


@pytest.mark.parametrize("path", BENCH, ids=name)
def test_benchmarks_reach_into_nothing_private(path):
    source = path.read_text(encoding="utf-8")
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pcpo_fast")
        for alias in node.names
    }
    assert not [alias for alias in imported if alias.startswith("_")]
    private = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
    }
    assert not [use for use in private if not use.startswith(("self._", "cls._", "torch."))]


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_a_list_of_names_is_written_once(path):
    """Where a type is a Literal, the names are read from it: there is no tuple of the same strings beside it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    written = [
        tuple(element.value for element in node.elts)
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple | ast.List | ast.Set)
        and len(node.elts) > 1
        and all(isinstance(element, ast.Constant) and isinstance(element.value, str) for element in node.elts)
    ]
    # the arguments of Literal[...] are a tuple in the tree, too
    literals = [
        tuple(element.value for element in node.slice.elts)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value) == "Literal"
        and isinstance(node.slice, ast.Tuple)
    ]
    for literal in set(literals):
        assert written.count(literal) == literals.count(literal) == 1, literal


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_comments_are_sentences(path):
    fragments = re.findall(r"^ *# (?:of|which|what|by|whose) .*", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert fragments == []


# the demo's builder, and the command that also runs where tqdm is missing and prints nothing but repr()
PRINTING = ("terminal.py", "pcpo_fast/__main__.py", "digits/build.py", "digits/training.py")


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_messages_go_through_one_function(path):
    """It keeps escape codes from the terminal."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert path.as_posix().endswith(PRINTING) or not calls & {
        "print",
        "tqdm.write",
        "sys.stdout.write",
        "sys.stderr.write",
    }


def test_the_public_names():
    wanted = {
        *("StepTable", "NoiseKey", "StoredStates", "Guidance", "Reference"),
        *("sampler_step", "step_log_prob", "step_log_ratio", "policy_loss", "sample_noise"),
        *("ratio_stats", "shifted_sigmas"),
    }
    assert wanted <= set(pcpo_fast.__all__)
    for public in pcpo_fast.__all__:
        assert typing.cast(str, getattr(pcpo_fast, public).__doc__), public
