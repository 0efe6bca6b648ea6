"""Artifacts appear whole or not at all, say why they do not fit, and notice every change on disk."""

import multiprocessing
import os
import shutil
import socket
import threading
import time
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import artifacts
from prefpipe.artifacts import Plan, differences
from prefpipe.errors import ArtifactError
from prefpipe.records import Completion, Prompt, ScoredCompletion, prompt_id, row_reader

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier, Semaphore


def prompts(count: int, start: int = 0) -> list[Prompt]:
    texts = [[{"role": "user", "content": f"question {i}"}] for i in range(start, start + count)]
    return [Prompt(prompt_id=prompt_id(m), messages=m, source="test") for m in texts]


def plan(**uses: object) -> Plan:
    return Plan("prepare", Prompt.schema, uses=uses)


def write(out: Path, records: list[Prompt], **uses: object) -> None:
    with artifacts.draft(out, plan(**uses)) as draft:
        if not draft.is_current:
            draft.commit(0, records, rows_in=len(records), rows_out=len(records))


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path / "a", prompts(7))
    assert list(artifacts.read(tmp_path / "a", Prompt, key="inputs.prompts")) == prompts(7)
    manifest = artifacts.manifest(tmp_path / "a")
    assert (manifest["schema"], manifest["num_records"]) == ("prompt/1", 7)
    assert set(manifest["versions"]) >= {"python", "torch", "transformers"}


def test_rows_are_read_as_the_constructor_would():
    (first,) = prompts(1)
    scored = {"completion_id": "c", "text": "t", "scores": {"s": 1.0}}
    whole = orjson.loads(orjson.dumps(first)) | scored
    every = {field.name: getattr(ScoredCompletion(**whole), field.name) for field in fields(ScoredCompletion)}
    for row in (whole, every):
        made = row_reader(ScoredCompletion)(dict(row))
        assert made == ScoredCompletion(**row)
        assert hash(made.prompt_id) == hash(first.prompt_id)
    with pytest.raises(FrozenInstanceError):
        made.text = "other"
    with pytest.raises(TypeError, match="unexpected keyword argument 'texts'"):
        row_reader(ScoredCompletion)({**{k: v for k, v in every.items() if k != "text"}, "texts": "t"})
    with pytest.raises(ValueError, match="score 's' of completion c is nan"):
        row_reader(ScoredCompletion)({**every, "scores": {"s": float("nan")}})


def test_nothing_appears_before_the_end(tmp_path):
    with pytest.raises(RuntimeError, match="crash"), artifacts.draft(tmp_path / "a", plan()) as draft:
        draft.commit(0, prompts(3), rows_in=3, rows_out=3)
        raise RuntimeError("crash")
    assert not artifacts.is_complete(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"inputs\.x=.*half-finished a\.partial is there"):
        artifacts.manifest(tmp_path / "a", key="inputs.x")


def test_a_killed_run_goes_on_after_its_last_part(tmp_path):
    with pytest.raises(RuntimeError), artifacts.draft(tmp_path / "a", plan()) as draft:
        draft.commit(0, prompts(3), rows_in=3, rows_out=3)
        raise RuntimeError("crash")
    with artifacts.draft(tmp_path / "a", plan()) as draft:
        assert draft.has(0)
        assert not draft.has(1)
        draft.commit(1, prompts(2, start=3), rows_in=2, rows_out=2)
    write(tmp_path / "b", prompts(3))
    assert list(artifacts.read(tmp_path / "a", Prompt, key="k")) == prompts(5)


def test_a_torn_part_is_made_again(tmp_path):
    with pytest.raises(RuntimeError), artifacts.draft(tmp_path / "a", plan()) as draft:
        draft.commit(0, prompts(3), rows_in=3, rows_out=3)
        raise RuntimeError("crash")
    part = tmp_path / "a.partial" / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    with artifacts.draft(tmp_path / "a", plan()) as draft:
        assert not draft.has(0)
        draft.commit(0, prompts(3), rows_in=3, rows_out=3)
    assert list(artifacts.read(tmp_path / "a", Prompt, key="k")) == prompts(3)


def test_parts_of_other_settings_are_not_taken_over(tmp_path):
    with pytest.raises(RuntimeError), artifacts.draft(tmp_path / "a", plan(seed=0)) as draft:
        draft.commit(0, prompts(3), rows_in=3, rows_out=3)
        raise RuntimeError("crash")
    with artifacts.draft(tmp_path / "a", plan(seed=1)) as draft:
        assert not draft.has(0)
        draft.commit(0, prompts(1), rows_in=1, rows_out=1)


def test_the_same_again_is_a_no_op_and_a_change_is_named(tmp_path):
    write(tmp_path / "a", prompts(3), loss={"beta": 0.1}, seed=0)
    before = (tmp_path / "a" / "provenance.json").read_bytes()
    write(tmp_path / "a", prompts(9), loss={"beta": 0.1}, seed=0)
    assert (tmp_path / "a" / "provenance.json").read_bytes() == before
    with pytest.raises(ArtifactError, match=r"loss\.beta 0\.1 -> 0\.2.*overwrite=true"):
        write(tmp_path / "a", prompts(3), loss={"beta": 0.2}, seed=0)
    with artifacts.draft(tmp_path / "a", plan(loss={"beta": 0.2}, seed=0), overwrite=True) as draft:
        draft.commit(0, prompts(1), rows_in=1, rows_out=1)
    assert artifacts.manifest(tmp_path / "a")["num_records"] == 1
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["a"]


def test_a_changed_parent_is_named(tmp_path):
    write(tmp_path / "parent", prompts(3))
    child = Plan("score", Prompt.schema, uses={}, parents={"prompts": [tmp_path / "parent"]})
    with artifacts.draft(tmp_path / "child", child) as draft:
        draft.commit(0, prompts(3), rows_in=3, rows_out=3)
    shutil.rmtree(tmp_path / "parent")
    write(tmp_path / "parent", prompts(4))
    with (
        pytest.raises(ArtifactError, match="its input 'prompts' has other content"),
        artifacts.draft(tmp_path / "child", child),
    ):
        pass


def test_differences_name_keys_that_came_and_went():
    assert differences({"uses": {"a": 1, "b": 2}}, {"uses": {"b": 2, "c": [1]}}) == ["a was 1", "c is now [1]"]


def test_lost_rows_are_an_error(tmp_path):
    with (
        pytest.raises(AssertionError, match="rows lost: 3 in, 1 out"),
        artifacts.draft(tmp_path / "a", plan()) as draft,
    ):
        draft.commit(0, prompts(1), rows_in=3, rows_out=1, filtered={"tie": 1})


def test_filtered_and_quarantined_rows_are_counted_by_reason(tmp_path):
    bad = [{"code": "KEY", "file": "a.jsonl", "line": 3, "message": "no chosen"}]
    with artifacts.draft(tmp_path / "a", plan()) as draft:
        draft.commit(0, prompts(1), rows_in=4, rows_out=1, filtered={"tie": 2}, quarantined=bad)
    manifest = artifacts.manifest(tmp_path / "a")
    assert manifest["counts"] == {"rows_in": 4, "rows_out": 1, "filtered": {"tie": 2}, "quarantined": {"KEY": 1}}
    (entry,) = manifest["quarantine"]
    assert orjson.loads((tmp_path / "a" / entry["name"]).read_bytes()) == bad[0]


def test_a_file_in_place_of_an_artifact_is_refused_with_the_way_to_make_one(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    message = rf"inputs\.pairs={file} is a file, .* stage=prepare data_mixer=files data_mixer\.spec='{file}:1\.0'"
    with pytest.raises(ArtifactError, match=message):
        artifacts.manifest(file, key="inputs.pairs")
    assert not artifacts.is_complete(file)


def test_another_schema_is_refused_with_both_names(tmp_path):
    write(tmp_path / "a", prompts(3))
    with pytest.raises(ArtifactError, match=r"inputs\.completions=.*holds prompt/1, but completion/1 is read"):
        list(artifacts.read(tmp_path / "a", Completion, key="inputs.completions"))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_change_to_a_published_artifact_is_noticed(tmp_path_factory, data):
    """Cut, flip, insert, swap, drop: no reader may finish on a changed artifact."""
    out = tmp_path_factory.mktemp("mutated") / "a"
    with artifacts.draft(out, plan()) as draft:
        for index in range(2):
            draft.commit(index, prompts(4, start=4 * index), rows_in=4, rows_out=4)
    parts = sorted(out.glob("part-*.jsonl"))
    part = data.draw(st.sampled_from(parts))
    content = part.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "swap", "drop", "append"]))
    if kind == "cut":
        part.write_bytes(content[:position])
    elif kind == "flip":
        part.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    elif kind == "insert":
        part.write_bytes(content[:position] + b"\x00" + content[position:])
    elif kind == "append":
        part.write_bytes(content + content.splitlines(keepends=True)[0])
    elif kind == "swap":
        first, second = (p.read_bytes() for p in parts)
        parts[0].write_bytes(second)
        parts[1].write_bytes(first)
    else:
        part.unlink()
    with pytest.raises((ArtifactError, orjson.JSONDecodeError, TypeError, UnicodeDecodeError)):
        list(artifacts.read(out, Prompt, key="inputs.prompts"))
    with pytest.raises(ArtifactError):
        artifacts.verify(out)


def _hold(out: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with artifacts.draft(out, plan()) as draft:
        ready.set()
        time.sleep(60)
        draft.commit(0, [], rows_in=0, rows_out=0)


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "a", ready))
    holder.start()
    try:
        assert ready.wait(30)
        with (
            pytest.raises(ArtifactError, match=rf"is being written by process {holder.pid} on "),
            artifacts.draft(tmp_path / "a", plan()),
        ):
            pass
    finally:
        holder.kill()
        holder.join()
    write(tmp_path / "a", prompts(2))
    assert artifacts.manifest(tmp_path / "a")["num_records"] == 2


def _race(
    out: Path, start: "Barrier", told: "Semaphore", outcomes: "multiprocessing.Queue[tuple[str, int, str]]"
) -> None:
    """Whoever gets the folder keeps it until the others have been told."""
    start.wait(60)
    try:
        with artifacts.draft(out, plan()) as draft:
            for _ in range(RACERS - 1):
                assert told.acquire(timeout=60)
            draft.commit(0, prompts(50), rows_in=50, rows_out=50)
        outcomes.put(("wrote", os.getpid(), ""))
    except ArtifactError as error:
        outcomes.put(("told", os.getpid(), str(error)))
        told.release()


RACERS = 8


def _one_race(folder: Path) -> None:
    """One of 8 processes on a folder writes; the 7 others name it, and leave nothing behind."""
    context = multiprocessing.get_context("fork")
    outcomes: multiprocessing.Queue[tuple[str, int, str]] = context.Queue()
    shared = (folder / "a", context.Barrier(RACERS), context.Semaphore(0), outcomes)
    racers = [context.Process(target=_race, args=shared) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    found = [outcomes.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * RACERS
    (winner,) = [pid for outcome, pid, _ in found if outcome == "wrote"]
    who = f"{folder / 'a'} is being written by process {winner} on {socket.gethostname()} since "
    assert all(error.startswith(who) for outcome, _, error in found if outcome == "told")
    artifacts.verify(folder / "a")
    assert artifacts.manifest(folder / "a")["num_records"] == 50
    assert sorted(path.name for path in folder.iterdir()) == [".a.lock", "a"]


@pytest.mark.parametrize("race", range(5))
def test_of_8_processes_on_one_folder_exactly_one_writes(tmp_path, race):
    _one_race(tmp_path)


@pytest.mark.soak
def test_100_races_of_8_processes_on_one_folder(tmp_path):
    for race in range(100):
        (tmp_path / str(race)).mkdir()
        _one_race(tmp_path / str(race))


def test_a_holder_that_was_killed_is_not_the_one_that_is_named(tmp_path):
    """Its note outlives it; whoever has the lock now is named once that one has said so."""
    gone = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
    gone.start()
    gone.join()
    (tmp_path / ".a.holder.json").write_bytes(
        orjson.dumps({"host": socket.gethostname(), "pid": gone.pid, "since": "2026-01-01T00:00:00Z", "job": None})
    )
    lock = FileLock(tmp_path / ".a.lock", timeout=0)
    with lock:
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-02T00:00:00Z", "job": "7"}
        says = threading.Timer(0.3, (tmp_path / ".a.holder.json").write_bytes, (orjson.dumps(own),))
        says.start()
        named = rf"process {os.getpid()} on {socket.gethostname()} since 2026-01-02T00:00:00Z, Slurm job 7"
        with pytest.raises(ArtifactError, match=named), artifacts.draft(tmp_path / "a", plan()):
            pass


def test_a_publish_that_was_killed_at_the_last_moment_is_finished(tmp_path):
    with artifacts.draft(tmp_path / "a", plan()) as draft:
        draft.commit(0, prompts(3), rows_in=3, rows_out=3)
    # As if the kill came after the manifest was written, before the rename.
    (tmp_path / "a").rename(tmp_path / "a.partial")
    write(tmp_path / "a", prompts(3))
    assert list(artifacts.read(tmp_path / "a", Prompt, key="k")) == prompts(3)
