"""docs/evidence.md stands on docs/evidence/study.json: its tables and numbers are made from it."""

import json
import re
from pathlib import Path

import pytest

from pcpo_fast.study.frames import Study
from pcpo_fast.study.plan import SHIPPED, read_plan
from pcpo_fast.study.tables import all_tables

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "evidence"
# decimals, percentages and intervals: numbers that a text takes from the data
NUMBER = re.compile(r"[-+]?\d+\.\d+%?|[-+]?\d+%|\[[^\]\n]*\d, [^\]\n]*\d\](?!\()")


@pytest.fixture(scope="module")
def study():
    return json.loads((FOLDER / "study.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tables(study):
    return all_tables(study)


def test_the_results_are_those_of_the_shipped_study(study):
    assert study["file"] == read_plan(SHIPPED["evidence"]).file


def test_the_tables_are_made_from_the_results(tables):
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")} == tables


def test_ten_seeds_of_every_algorithm_at_its_best_rate(study):
    whole = Study.of(study)
    for task in ("digits", "flow"):
        cells = whole.best_cells(task)
        whole_cells = {cell.algorithm for cell in cells if len(cell.curves) >= 10}
        assert whole_cells >= {"baseline", "constant", "proportionate"}


@pytest.mark.parametrize("page", ["docs/evidence.md", "README.md"])
def test_every_number_of_the_text_is_in_the_tables(tables, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "README.md":
        text = text.split("<!-- evidence -->")[1]
    # addresses of papers are no findings
    text = re.sub(r"https?://\S+|arXiv \S+", "", text)
    known = "\n".join([*tables.values(), SHIPPED["evidence"].read_text(encoding="utf-8")])
    found, measured = ({number.lstrip("+") for number in NUMBER.findall(words)} for words in (text, known))
    assert found and found - measured == set()


def test_the_page_has_the_table_of_claims(tables):
    table = tables["claims.md"].split("\n\n", 2)[2].strip()
    assert table.startswith("| claim |") and table in (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
