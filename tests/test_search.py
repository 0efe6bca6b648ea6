"""sweep=optuna: what it refuses, what it tries, and that no kill loses a trial or runs one twice."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from command_line import Prefpipe
from hydra.core.override_parser.overrides_parser import OverridesParser
from search_killed import SPACE, SWEEP, run, value

from prefpipe import artifacts
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.records import EvalResult
from prefpipe.search_space import values_of
from prefpipe.trials import Choices, Interval, open_trials

SEARCH = ("-m", "sweep=optuna", "sweep.objective=accuracy/accuracy", "stage=loop", "recipe=tune")


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("loss.beta=0.1,0.3", "sweep.objective=accuracy/acuracy"), "is no metric of task=[accuracy]; there are accu"),
        (("loss.beta=0.1,0.3", "sweep.objective=null"), "must be given; there are accuracy/accuracy, accuracy/no_an"),
        (("loss.beta=0.1,0.3", "stage=train"), "stage=train evaluates nothing, and sweep=optuna reads accuracy/accu"),
        ((), "sweep=optuna needs values to choose from, e.g. loss.beta=0.1,0.3"),
        (("inputs.pairs=a,b",), "inputs.pairs cannot be searched"),
        (("loss.beta=0.1,0.3",), "sweep.trials=20, but the space has no more than 2 points"),
        (("loss.beta=interval(0.1,1)", "sweep.direction=up"), "sweep.direction=up must be one of maximize, minimize"),
        (("sweep.space={loss.beta: 0.1}",), "sweep.space={'loss.beta': 0.1} must be a mapping"),
        (("sweep.space={loss.beta: '0.1'}",), "sweep.space: loss.beta=0.1 is one value; give several"),
        (("sweep.space={loss.betta: '0.1,0.2'}",), "no such config key: loss.betta; nearest: loss.beta"),
        # The corners of the space are checked, not its first point alone.
        (
            ("loss.beta=interval(0.1,9)", "training.warmup_fraction=interval(0,2)"),
            "training.warmup_fraction=2.0 must be",
        ),
        (("loss=simpo,dpo", "loss.gamma=interval(1,2)"), "gamma belongs to loss=simpo; you chose loss=dpo"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(
    prefpipe: Prefpipe, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    replaced = {line.partition("=")[0] for line in args}
    result = prefpipe(*(word for word in SEARCH if word.partition("=")[0] not in replaced), *args)
    assert result.code == 2, result
    assert message in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,0.3", Choices(("0.1", "0.3"))),
        ("choice(a,'b c',a)", Choices(("a", r"b\ c"))),
        ("shuffle(choice(b,a))", Choices(("a", "b"))),
        ("range(0,1,0.25)", Choices(("0.0", "0.25", "0.5", "0.75"))),
        ("range(1,9,3)", Interval(1, 7, whole=True, step=3)),
        ("range(9,1,-3)", Interval(3, 9, whole=True, step=3)),
        ("tag(log,range(1,64))", Interval(1, 63, whole=True, log=True)),
        ("interval(0.5,2)", Interval(0.5, 2.0)),
        ("int(interval(1,8))", Interval(1, 8, whole=True)),
        ("tag(log,interval(1e-6,1e-5))", Interval(1e-6, 1e-5, log=True)),
        ("interval(2,1)", "key=interval(2,1): the interval must rise"),
        ("tag(log,interval(0,1))", "must rise, and with the tag log be above 0"),
        ("tag(cubic,interval(1,2))", "sweep=optuna knows the tag log alone, not cubic"),
        ("tag(log,choice(1,2))", "the tag log is for an interval, or a range of whole numbers"),
        ("tag(log,range(2,64,2))", "a range must be above 0, and its step 1"),
        ("range(3,3)", "key=range(3,3) holds no value"),
    ],
)
def test_a_space_is_typed_as_hydras_sweeps_are(text: str, values: Choices | Interval | str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"key={text}"])
    if not isinstance(values, str):
        assert values_of(override) == values
        return
    with pytest.raises(ConfigError, match=re.escape(values)):
        values_of(override)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sweep=optuna",), "sweep=optuna would be ignored, as it acts on sweeps only: add -m"),
        (("-m", "sweep.trials=3", "seed=1,2"), "sweep.trials=3 would be ignored with sweep=grid"),
        (("-m", "loss.beta=interval(0,1)"), "loss.beta=interval(0,1): an interval is for sweep=optuna"),
    ],
)
def test_a_sweep_without_search_takes_nothing_of_a_searchs(
    prefpipe: Prefpipe, args: tuple[str, ...], message: str
) -> None:
    result = prefpipe("stage=train", *args)
    assert result.code == 2
    assert message in result.err


def test_the_plan_of_a_search_runs_nothing(prefpipe: Prefpipe, tmp_path: Path) -> None:
    space = '\'{loss.beta: "0.1,0.3", training.num_epochs: "range(1,9,2)"}\''
    result = prefpipe(*SEARCH, f"sweep.space={space[1:-1]}", "seed=int(interval(0,9))", "plan=true")
    assert result.code == 0, result
    assert "0 of 20 trials finished" in result.out
    lines = [line.strip() for line in result.out.splitlines()]
    assert {"loss.beta in 0.1,0.3", "training.num_epochs in 1..7 (step 2, whole)", "seed in 0..9 (whole)"} < {*lines}
    assert re.search(r"points/\S*loss.beta=0.1,\S*seed=0", result.out)
    assert not (tmp_path / "runs" / "default" / "points").exists()


# ------------------------------------------------------------------------------------------------ trials


def test_a_search_killed_at_every_write_of_its_journal_ends_as_one_that_ran_through(tmp_path: Path) -> None:
    with open_trials(tmp_path / "whole", SWEEP, SPACE, {}) as trials:
        run(trials)
        whole = trials.all()
    script = Path(__file__).with_name("search_killed.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 10  # kills
    with open_trials(tmp_path / "killed", SWEEP, SPACE, {}) as trials:
        assert trials.all() == whole
        best = trials.best()
    assert [trial.state for trial in whole].count("complete") == 14
    assert [trial.number for trial in whole if trial.state == "failed"] == [5, 12]
    assert best is not None
    assert best.value == max(v for trial in whole if (v := value(trial)) is not None)


def test_values_lie_in_their_space_and_a_failed_trial_has_none(tmp_path: Path) -> None:
    space = {"a": Interval(1e-6, 1e-4, log=True), "b": Interval(2, 8, whole=True, step=3), "c": Choices(("x", "y"))}
    with open_trials(tmp_path, SWEEP, space, {}) as trials:
        batch = trials.batch(40)
        small = sum(float(trial.values["a"]) < 1e-5 for trial in batch)
        assert 10 <= small <= 30  # by its logarithm, half of the interval
        assert {trial.values["b"] for trial in batch} == {"2", "5", "8"}
        assert {trial.values["c"] for trial in batch} == {"x", "y"}
        with pytest.raises(ValueError, match="nan"):
            trials.finish(batch[0], float("nan"))
        trials.fail(batch[0], "no memory")
        trials.finish(batch[1], -3.0)
        assert trials.best() == trials.all()[1]
        assert trials.of("failed")[0].error == "no memory"
        assert len(trials.batch(5)) == 38  # the others of the batch first


def test_a_search_is_of_one_space_and_one_process(tmp_path: Path) -> None:
    with (
        open_trials(tmp_path, SWEEP, SPACE, {"loss.beta": 0.1}),
        pytest.raises(ArtifactError, match="another process searches there"),
        open_trials(tmp_path, SWEEP, SPACE, {"loss.beta": 0.1}),
    ):
        pass
    for space, settings, change in (
        (SPACE, {"loss.beta": 0.2}, "loss.beta 0.1 -> 0.2"),
        ({**SPACE, "beta": Choices(("0.1",))}, {"loss.beta": 0.1}, "sweep.space.beta '0.1,0.3' -> '0.1'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(change)), open_trials(tmp_path, SWEEP, space, settings):
            pass
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(b"not json\n" + journal.read_bytes())
    with pytest.raises(ArtifactError, match=r"journal.jsonl:1 is damaged"), open_trials(tmp_path, SWEEP, SPACE, {}):
        pass


# ------------------------------------------------------------------------------------------------ whole searches

EVALUATION = (
    *("-m", "sweep=optuna", "sweep.objective=accuracy/accuracy", "sweep.direction=maximize", "stage=evaluate"),
    *("inputs.checkpoint=base", "generator.max_new_tokens=int(interval(1,60))", "hardware=cpu"),
    *("hardware.num_threads=1", "task.accuracy.max_prompts=6", "inputs.prompts=runs/data/prompts", "exp_name=s"),
)
"""Of a model that is not trained: how many tokens does it need to come to an answer?"""


@pytest.fixture
def data(prefpipe: Prefpipe) -> None:
    result = prefpipe("stage=prepare", "exp_name=data", "data_mixer.sources.arithmetic.num=30")
    assert result.code == 0, result


def found(tmp_path: Path) -> list[dict[str, Any]]:
    return orjson.loads((tmp_path / "runs" / "s" / "search" / "trials.json").read_bytes())["trials"]


@pytest.mark.usefixtures("data")
def test_a_search_goes_on_to_its_target_and_a_failed_trial_is_no_score(prefpipe: Prefpipe, tmp_path: Path) -> None:
    args = (*EVALUATION, "model.path=builtin:tiny,nowhere", "sweep.max_failures=20")
    first = prefpipe(*args, "sweep.trials=1")
    assert first.code == 0, first
    before = found(tmp_path)
    assert [trial["state"] for trial in before].count("complete") == 1
    points = tmp_path / "runs" / "s" / "points"
    made = {file: file.stat().st_mtime_ns for file in points.rglob("manifest.json")}
    second = prefpipe(*args, "sweep.trials=3")
    assert second.code == 0, second
    after = found(tmp_path)
    assert after[: len(before)] == before
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert [trial["state"] for trial in after].count("complete") == 3
    assert {trial["state"] for trial in after} == {"complete", "failed"}
    best = max(trial["value"] for trial in after if trial["state"] == "complete")
    assert (
        f"best: trial {next(t['number'] for t in after if t['value'] == best)}, accuracy/accuracy {best:g}"
        in second.out
    )
    for trial in after:
        if trial["values"]["model.path"] == "nowhere":
            assert trial["state"] == "failed"
            assert trial["value"] is None
            assert "model.path=nowhere is no local folder" in trial["error"]
            continue
        name = ",".join(sorted(f"{key}={value}" for key, value in trial["values"].items()))
        (folder,) = [folder for folder in points.iterdir() if folder.name.startswith(name.split(":")[0][:40])]
        results = {r.metric: r.value for r in artifacts.read(folder / "base" / "evals", EvalResult, key="evals")}
        assert trial["value"] == results["accuracy"]
    other = prefpipe(*args, "sweep.trials=3", "seed=7")
    assert other.code == 2
    assert "begun with other settings: seed 0 -> 7" in other.err


@pytest.mark.usefixtures("data")
def test_a_search_with_failures_alone_gives_up(prefpipe: Prefpipe, tmp_path: Path) -> None:
    result = prefpipe(*EVALUATION, "model.path=nowhere", "sweep.max_failures=1")
    assert result.code == 1
    assert "2 trials failed, more than sweep.max_failures=1; of trial 1: model.path=nowhere" in result.err
    assert [trial["state"] for trial in found(tmp_path)] == ["failed", "failed"]


@pytest.mark.usefixtures("data")
def test_a_search_killed_while_its_jobs_run_goes_on_with_them(prefpipe: Prefpipe, tmp_path: Path) -> None:
    """Two at once, in processes of their own, which outlive the one that is killed."""
    args = (*EVALUATION, "sweep.trials=2", "sweep.parallel=2", "hydra/launcher=submitit_local")
    command = [sys.executable, "-m", "prefpipe", *args]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    attempts = tmp_path / "runs" / "s" / "attempts"
    deadline = time.monotonic() + 300
    while not list(attempts.rglob("*.0001.json")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    begun = found(tmp_path)
    result = prefpipe(*args)
    assert result.code == 0, result
    trials = found(tmp_path)
    assert [trial["state"] for trial in trials] == ["complete"] * 2
    assert [(trial["number"], trial["state"]) for trial in begun] == [(0, "running"), (1, "running")]
    assert [trial["values"] for trial in trials[:2]] == [trial["values"] for trial in begun]
    for folder in (tmp_path / "runs" / "s" / "attempts").iterdir():
        outcomes = [orjson.loads(file.read_bytes())["outcome"] for file in folder.glob("*.[0-9]*.json")]
        assert "failed" not in outcomes


def test_points_of_a_sweep_share_their_data_and_one_reference_pass(prefpipe: Prefpipe, tmp_path: Path) -> None:
    rows = ({"prompt": f"{i} + 1?", "chosen": f"#### {i + 1}", "rejected": f"#### {i}"} for i in range(12))
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    data = prefpipe("stage=prepare", "data_mixer=files", "data_mixer.spec=pairs.jsonl:1.0", "exp_name=data")
    assert data.code == 0, data
    step = ("training=debug", "training.max_steps=1", "hardware=cpu", "hardware.num_threads=1")
    cache = f"paths.cache={tmp_path / 'cache'}"
    sweep = ("-m", "stage=train", "loss.beta=0.1,0.3", "inputs.pairs=runs/data/pairs")
    result = prefpipe(*sweep, *step, cache)
    assert result.code == 0, result
    points = sorted((tmp_path / "runs" / "default" / "points").iterdir())
    assert len(points) == 2
    checkpoints = [artifacts.manifest(point / "round_0" / "checkpoint") for point in points]
    assert checkpoints[0]["parents"] == checkpoints[1]["parents"]
    assert list((tmp_path / "runs" / "default").rglob("pairs")) == []
    logs = [(point / "logs" / "train-round_0.log").read_text() for point in points]
    known = sorted(re.findall(r"reference: (\d+) of (\d+) completions are in the cache", "".join(logs)))
    assert len(known) == 2
    assert known[0][0] == "0"
    assert known[1][0] == known[1][1] == known[0][1]
    (folder,) = (tmp_path / "cache" / "reference_logps").iterdir()
    assert len(list(folder.glob("part-*.safetensors"))) == 1
    tables = [(point / "round_0" / "checkpoint" / "reference_logps.csv").read_bytes() for point in points]
    assert tables[0] == tables[1]
