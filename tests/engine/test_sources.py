"""The page of the sources names every line that states something, functions that exist, and tests that exist."""

import ast
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "engine"
SOURCES = (DOCS / "sources.md").read_text()

KEYS = (
    *("L46-55", "L52", "L63", "L66-71", "S24-34", "S34", "S42", "B207,211", "B185,201", "L81-83", "L85", "L86"),
    *("L95-102", "D3-4", "D1", "D32", "D33", "B145-153", "B155-174", "B178", "B195-252", "B260", "B278"),
    *("B14,24", "B17", "B39", "B48-67", "B78", "B86-90", "B100-108", "B114-116", "B118-122", "B128", "S262"),
    *("S276 MLP", "S276 transformer", "S292", "S312-314", "S270,300", "S13"),
    *("L114", "D10-12", "B307", "L118", "D7-16", "B313-317", "S210", "S329", "L142", "D19-23", "B329-345", "S340-368"),
    *("L152", "B353-357", "S392-398", "S466", "L200-206", "D25-26", "D19/D25", "D28", "S408-420", "S418", "S400"),
    *("B441-525", "B517-521", "B532,540", "B534", "B415", "B548"),
    *("L166", "B369", "S442", "L176", "L180", "B384-388", "L194", "B393-408", "B420-432", "L208", "S428-454", "B281"),
    *("S57-99", "S110-126", "S128-134", "S136", "S482"),
    *("S140-210", "S158", "S200-214", "S226-254", "D29-31"),
    *("L124-156", "B359", "B46", "B371-375", "B440", "B538", "D5", "D8", "D17"),
)
"""Lines of the documents that state a formula, an algorithm, an example or a claim."""

KEY = re.compile(r"`([LBDS]\d[^`]*)`")
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
NAME = re.compile(r"`(pgengine(?:\.\w+)+)")


def rows() -> list[list[str]]:
    """Cells of the rows that begin with lines of a document."""
    table = [line.strip("| ").split(" | ") for line in SOURCES.splitlines() if line.startswith("| `")]
    assert all(len(cells) == 4 for cells in table), [cells for cells in table if len(cells) != 4]
    return table


@cache
def functions_of(file: str) -> frozenset[str]:
    if not (HERE / file).exists():
        return frozenset()
    tree = ast.parse((HERE / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def find(path: str) -> object:
    """What a dotted name stands for: as much of it as is a module, and attributes from there."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not path.startswith(error.name):
                raise
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def test_every_line_that_states_something_is_in_the_table_once() -> None:
    named = [key for cells in rows() for key in KEY.findall(cells[0])]
    assert sorted(named) == sorted(KEYS)
    assert len(set(KEYS)) == len(KEYS)


def test_every_row_says_what_it_is_and_what_proves_it() -> None:
    for lines, claim, where, proof in rows():
        assert claim, lines
        assert where, lines
        assert TEST.search(proof) or re.match(r"none: \w+", proof), lines
        assert NAME.search(where) or "nothing to implement" in where or "not offered" in where or "errata" in where, (
            lines
        )
        # nothing in the proof but tests
        assert proof.startswith("none: ") or not re.sub(TEST, "", proof).strip(", "), lines


@pytest.mark.parametrize("path", sorted(set(NAME.findall(SOURCES))))
def test_every_name_can_be_imported(path: str) -> None:
    assert find(path) is not None


@pytest.mark.parametrize("page", ["sources.md", "errata.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    text = (DOCS / page).read_text()
    named = TEST.findall(text)
    assert len(named) >= 20
    # a name that the pattern does not read would be held by nobody
    assert text.count("::") == len(named)
    missing = [f"{file}::{name}" for file, name in named if name not in functions_of(file)]
    assert not missing


def test_the_errata_name_the_documents_and_a_test_for_each_error() -> None:
    text = (DOCS / "errata.md").read_text()
    for author in ("Lin", "Bereyhi", "Sun", "log-derivative trick"):
        assert author in text
    with_tests = text.split("## Slips")[0]
    entries = [line for line in with_tests.splitlines() if re.match(r"\| (Lin|Bereyhi|Sun|Log-derivative)", line)]
    assert len(entries) >= 25
    assert all(TEST.search(entry) for entry in entries), [entry for entry in entries if not TEST.search(entry)]
