"""README.md of this folder names every bug once, and only tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent
ABSENT = "does not apply: "


def table() -> list[tuple[int, str]]:
    """(number, last column) of each row."""
    rows = re.findall(r"^\| B(\d\d) \| [^|]+ \| ([^|]+) \|$", (HERE / "README.md").read_text(), re.MULTILINE)
    return [(int(number), cell.strip()) for number, cell in rows]


def node_ids(cell: str) -> list[str]:
    return [] if cell.startswith(ABSENT) else cell.split(", ")


@cache
def functions(file: Path) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]


def test_every_bug_has_one_row_in_order() -> None:
    assert [number for number, _ in table()] == list(range(1, 53))
    assert (HERE / "README.md").read_text().count("\n| B") == 52


def test_every_row_has_tests_that_exist_or_a_reason() -> None:
    for number, cell in table():
        if cell.startswith(ABSENT):
            assert len(cell) > len(ABSENT) + 20, number
            continue
        named = node_ids(cell)
        assert named, number
        assert len(named) == len(set(named)), number
        for node in named:
            file, _, name = node.partition("::")
            assert name.startswith("test_"), node
            assert functions(TESTS / file).count(name) == 1, node


def test_every_test_of_this_folder_stands_in_the_row_of_its_number() -> None:
    rows = {number: node_ids(cell) for number, cell in table()}
    found = 0
    for file in sorted(HERE.glob("test_bugs_in_*.py")):
        for name in functions(file):
            if name.startswith("test_"):
                number = re.match(r"test_b(\d\d)_", name)
                assert number, name
                assert f"peer_bugs/{file.name}::{name}" in rows[int(number[1])], name
                found += 1
    assert found == sum(node.startswith("peer_bugs/") for cell in rows.values() for node in cell)
