"""Completions of a prompt brought together, as a dict of all rows would, whatever their order and their files."""

import random
from pathlib import Path

import pytest

from prefpipe import artifacts, grouping
from prefpipe.artifacts import Plan
from prefpipe.errors import ArtifactError
from prefpipe.grouping import Runs, grouped
from prefpipe.records import Completion, ScoredCompletion


def rows(num: int, prompts: int, rng: random.Random) -> list[ScoredCompletion]:
    return [
        ScoredCompletion(
            prompt_id=f"{rng.randrange(prompts):016x}",
            completion_id=f"{number:016x}",
            messages=[{"role": "user", "content": "\r\n\u2028 lines \n"}],
            source="test",
            text="x" * rng.randrange(200),
        )
        for number in range(num)
    ]


def write(out: Path, parts: list[list[ScoredCompletion]]) -> Path:
    with artifacts.draft(out, Plan("score", ScoredCompletion.schema, uses={})) as draft:
        for index, part in enumerate(parts):
            draft.commit(index, part, rows_in=len(part), rows_out=len(part))
    return out


@pytest.mark.parametrize("window", [1, 3_000, 2**30])
@pytest.mark.parametrize("order", ["shuffled", "together", "again and again"])
def test_groups_are_those_of_a_dict_in_order_of_first_appearance(tmp_path, monkeypatch, window, order):
    """Five parts in two artifacts, one of them empty; prompts go on over the borders of parts."""
    monkeypatch.setattr(grouping, "WINDOW_BYTES", window)
    found = rows(300, 40, random.Random(0))
    if order != "shuffled":
        places = {
            row.completion_id: sum(other.prompt_id == row.prompt_id for other in found[:i])
            for i, row in enumerate(found)
        }
        by_round = order == "again and again"
        found.sort(key=lambda row: (places[row.completion_id] if by_round else 0, row.prompt_id))
    paths = [
        write(tmp_path / "a", [found[:70], [], found[70:151]]),
        write(tmp_path / "b", [found[151:152], found[152:]]),
    ]
    expected: dict[str, list[Completion]] = {}
    for row in found:
        expected.setdefault(row.prompt_id, []).append(row)
    assert Runs.of(paths, Completion, key="k").together == (order == "together")
    assert list(grouped(paths, Completion, key="k")) == list(expected.values())


def test_nothing_makes_no_groups(tmp_path):
    assert list(grouped([write(tmp_path / "a", [[]])], Completion, key="k")) == []


def test_a_row_that_was_changed_is_refused_before_any_group(tmp_path):
    path = write(tmp_path / "a", [rows(20, 5, random.Random(0))])
    part = path / "part-00000.jsonl"
    for old, new in ((b"lines", b"lynes"), (b'{"prompt_id":"0', b'{"prompt_id":"?')):
        before = part.read_bytes()
        part.write_bytes(before.replace(old, new, 1))
        with pytest.raises(ArtifactError, match="does not match"):
            next(grouped([path], Completion, key="k"))
        part.write_bytes(before)
