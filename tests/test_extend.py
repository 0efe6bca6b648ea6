"""A new loss, scorer or source is one class or function and one YAML: each test adds one to a copy and uses it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import orjson
import pytest

from prefpipe import artifacts
from prefpipe.records import Pair, Prompt, ScoredCompletion

ROOT = Path(__file__).resolve().parents[1]


class Copy:
    """prefpipe and its conf in a folder of their own, and its command line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        for name in ("prefpipe", "conf"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "local"))

    def append(self, file: str, text: str) -> None:
        """Add to a file, or make it."""
        path = self.folder / file
        before = path.read_text() if path.exists() else ""
        path.write_text(f"{before}\n\n{dedent(text)}" if before else dedent(text))

    def run(self, *args: str) -> str:
        """`prefpipe ARGS` of the copy; what it logged."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PREFPIPE_RUNS": str(self.runs)}
        command = [sys.executable, "-m", "prefpipe", *args]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines."""

    def write(*rows: object) -> Path:
        file = tmp_path / "rows.jsonl"
        file.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        return file

    return write


def test_a_loss_is_one_class_and_one_yaml(copy, rows_file):
    """A hinge of the summed log-probabilities: with one pair its loss is margin - (chosen - rejected), as logged."""
    copy.append(
        "prefpipe/losses/toy.py",
        '''
        """A hinge."""

        from __future__ import annotations

        from dataclasses import dataclass
        from typing import TYPE_CHECKING, ClassVar

        from prefpipe.components import register
        from prefpipe.losses import Loss, LossOutput, PairScores

        if TYPE_CHECKING:
            from prefpipe.logps import PairLogps


        @register("loss")
        @dataclass
        class Toy(Loss):
            """A hinge: what is missing to a margin, in nats."""

            name: str = "toy"
            margin: float = 1.0
            needs_reference: ClassVar[bool] = False

            def __call__(
                self, policy: PairLogps, reference: PairLogps | None, scores: PairScores | None = None
            ) -> LossOutput:
                missing = (self.margin - policy.chosen + policy.rejected).clamp(min=0)
                return LossOutput(missing, policy.chosen.detach(), policy.rejected.detach())
        ''',
    )
    copy.append("conf/loss/toy.yaml", "defaults:\n  - /schema/loss@_here_: toy\n  - _self_\nmargin: 100.0\n")
    file = rows_file({"prompt": "What is 2 + 2?", "chosen": "2 + 2 = 4\n#### 4", "rejected": "#### 5"})
    copy.run("stage=prepare", "data_mixer=files", f"data_mixer.spec={file}:1.0", "data_mixer.heldout_fraction=0")
    step = ("training=debug", "training.max_steps=1", "training.global_batch_size=1", "training.micro_batch_size=1")
    copy.run("stage=train", "loss=toy", "loss.margin=250", "hardware=cpu", "hardware.num_threads=1", *step)
    checkpoint = copy.runs / "default" / "round_0" / "checkpoint"
    assert artifacts.manifest(checkpoint)["uses"]["loss"] == {"name": "toy", "margin": 250.0}
    (row,) = [orjson.loads(line) for line in (checkpoint / "metrics.jsonl").read_bytes().splitlines()]
    expected = 250 - row["train/logps/chosen"] + row["train/logps/rejected"]
    assert expected > 0
    assert row["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert row["train/grad_norm"] > 0


def test_a_scorer_is_one_class_and_one_yaml(copy, rows_file):
    copy.append(
        "prefpipe/scorers/toy.py",
        '''
        """Vowels as a score."""

        from collections.abc import Sequence
        from dataclasses import dataclass

        from prefpipe.components import register
        from prefpipe.records import Completion
        from prefpipe.scorers import Missing, Score, Scorer, ScoringContext


        @register("scorer")
        @dataclass
        class Toy(Scorer):
            """How many of some letters a completion has."""

            name: str = "toy"
            letters: str = "aeiou"

            def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
                return [float(sum(c in self.letters for c in completion.text)) for completion in completions]
        ''',
    )
    copy.append("conf/scorer/toy.yaml", "defaults:\n  - /schema/scorer@_here_: toy\n  - _self_\n")
    answers = [{"response": "aloe", "overall_score": 3.0}, {"response": "rhythm", "overall_score": 4.5}]
    file = rows_file({"instruction": "Name a plant.", "completions": answers})
    copy.run("stage=prepare", "data_mixer=files", f"data_mixer.spec={file}:1.0", "data_mixer.heldout_fraction=0")
    given = copy.runs / "default" / "scored"
    copy.run("stage=score", "scorer=toy", "scorer.letters=aeo", f"inputs.completions={given}")
    copy.run("stage=pair", "pairer=best_worst", "pairer.score=toy")
    folder = copy.runs / "default" / "round_0"
    scored = artifacts.read(folder / "scored", ScoredCompletion, key="k")
    assert [row.scores for row in scored] == [{"rating": 3.0, "toy": 3.0}, {"rating": 4.5, "toy": 0.0}]
    (pair,) = artifacts.read(folder / "pairs", Pair, key="k")
    assert (pair.chosen, pair.rejected, pair.chosen_score) == ("aloe", "rhythm", 3.0)


def test_a_source_of_unusual_rows_is_one_function_and_one_yaml(copy, rows_file):
    """Its function stands in ADAPTERS, as the losses stand in the register; rows that it refuses are counted."""
    copy.append(
        "prefpipe/sources/adapters.py",
        '''
        def toy(row: Row) -> list[Record]:
            """`dialogue` is "question => better | worse"."""
            question, arrow, answers = text(need(row, "dialogue"), "dialogue").partition(" => ")
            if not arrow:
                raise BadRow("KEY", "dialogue has no =>")
            better, _, worse = answers.partition(" | ")
            return pairs(row, [turn("user", question, "dialogue")], answer(better, "better"), several(worse))


        ADAPTERS["toy"] = toy
        ''',
    )
    lines = [f"question {i} => good {i} | bad {i}" for i in range(49)]
    file = rows_file(*({"dialogue": line} for line in [*lines, "no answer"]))
    yaml = f"defaults:\n  - /schema@_here_: source\n  - _self_\npath: {file}\nformat: toy\n"
    copy.append("conf/source/toy.yaml", yaml)
    settings = ("data_mixer.heldout_fraction=0", "data_mixer.max_bad_fraction=0.02")
    copy.run("stage=prepare", "data_mixer=files", "+source@data_mixer.sources.toy=toy", *settings)
    run = copy.runs / "default"
    pairs = sorted(
        (p.messages[0]["content"], p.chosen, p.rejected) for p in artifacts.read(run / "pairs", Pair, key="k")
    )
    assert pairs == sorted((f"question {i}", f"good {i}", f"bad {i}") for i in range(49))
    assert {p.source for p in artifacts.read(run / "prompts", Prompt, key="k")} == {"toy"}
    counts = artifacts.manifest(run / "prompts")["counts"]
    assert counts == {"rows_in": 50, "rows_out": 49, "filtered": {}, "quarantined": {"KEY": 1}}
    assert artifacts.manifest(run / "prompts")["sources"]["toy"]["format"] == "toy"


def test_a_tracker_is_one_class_and_one_yaml(copy, rows_file):
    """What it is told of a training run, told by its own process, is written to a file."""
    copy.append(
        "prefpipe/tracking/toy.py",
        '''
        """A file as a tracker."""

        import json
        from collections.abc import Mapping, Sequence
        from dataclasses import dataclass

        from prefpipe.components import register
        from prefpipe.tracking import Row, Sink
        from prefpipe.tracking.records import Record


        @register("tracking")
        @dataclass
        class Toy(Sink):
            """Appends every call to a file."""

            name: str = "toy"
            file: str = "toy.jsonl"

            def _append(self, *call: object) -> None:
                with open(self.file, "a") as lines:
                    lines.write(json.dumps(call) + "\\n")

            def open(self, record: Record, parent: str | None) -> str:
                return record.name

            def describe(self, run: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
                self._append("describe", run, params["loss.beta"])

            def log(self, run: str, rows: Sequence[Row], time: int) -> None:
                self._append("log", run, [[row.step, row.values["train/loss"]] for row in rows])

            def set_status(self, run: str, status: str, time: int) -> None:
                self._append("status", run, status)
        ''',
    )
    copy.append("conf/tracking/toy.yaml", "defaults:\n  - /schema/tracking@_here_: toy\n  - _self_\n")
    file = rows_file(*({"prompt": f"{i} + 2?", "chosen": f"#### {i + 2}", "rejected": "#### 1"} for i in range(8)))
    copy.run("stage=prepare", "data_mixer=files", f"data_mixer.spec={file}:1.0", "data_mixer.heldout_fraction=0")
    settings = ("training=debug", "training.max_steps=2", "hardware=cpu", "hardware.num_threads=1")
    copy.run("stage=train", "loss.beta=0.3", *settings, "tracking=toy", "tracking.file=told.jsonl")
    calls = [orjson.loads(line) for line in (copy.folder / "told.jsonl").read_bytes().splitlines()]
    assert ["describe", "default", "0.3"] in calls
    assert calls[-1] == ["status", "default", "FINISHED"]
    metrics = (copy.runs / "default" / "round_0" / "checkpoint" / "metrics.jsonl").read_bytes().splitlines()
    rows = [orjson.loads(line) for line in metrics]
    told = [row for call in calls if call[0] == "log" for row in call[2]]
    assert told == [[row["step"], row["train/loss"]] for row in rows]


def test_help_lists_what_was_added(copy):
    copy.append("conf/loss/toy.yaml", "defaults:\n  - dpo\n  - _self_\nbeta: 0.05\n")
    assert {"dpo*", "toy"} <= set(copy.run("--help").split())
    assert "beta: 0.05" in copy.run("loss=toy", "--cfg", "job", "--package", "loss")
