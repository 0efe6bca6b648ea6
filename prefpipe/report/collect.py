"""Reads a run's folder: which artifacts are there, whether they are whole and current, and the few numbers they hold.

Reads manifests, provenance and evals only; the large artifacts are streamed elsewhere, when a report needs them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from prefpipe.artifacts import digest, is_complete, manifest, partial_path, read
from prefpipe.errors import ArtifactError
from prefpipe.records import EvalResult

SHARED = ("prompts", "scored", "pairs", "demonstrations", "base/evals", "base/eval_samples")
CHAIN = ("completions", "scored", "pairs", "checkpoint", "evals")
IN_ROUND = (*CHAIN, "demonstrations", "eval_samples")
UNREADABLE = (ArtifactError, OSError, ValueError, TypeError)
STATES = ("failed", "incomplete", "stale", "complete")

Metric = tuple[str, str]


@dataclass(frozen=True)
class Problem:
    """kind: "failed", "missing", "stale", or "note" (worth knowing, but the results stand). where: the artifact."""

    kind: str
    where: str
    text: str


@dataclass(frozen=True)
class Artifact:
    """A published artifact. name: its folder inside the run, e.g. "round_0/pairs"."""

    name: str
    path: Path
    manifest: dict[str, Any]
    provenance: dict[str, Any]
    digest: str

    @property
    def uses(self) -> dict[str, Any]:
        found = self.manifest.get("uses")
        return found if isinstance(found, dict) else {}

    def inputs(self, name: str) -> list[Path]:
        """The folders of its parents under that input name."""
        paths = self.manifest.get("parent_paths", {}).get(name, [])
        return [(self.path / path).resolve() for path in paths]


@dataclass
class Run:
    """One experiment, or one point of a sweep.

    evals: "base" and "round_0", … → (task, metric) → result. loop: what stage=loop wrote down of each stage.
    planned: settings of artifacts that were begun and never published.
    """

    name: str
    path: Path
    point: str = ""
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    rounds: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    evals: dict[str, dict[Metric, EvalResult]] = field(default_factory=dict)
    loop: list[dict[str, Any]] = field(default_factory=list)
    planned: list[dict[str, Any]] = field(default_factory=list)
    points: list["Run"] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name}/{self.point}" if self.point else self.name


def load_run(run_dir: Path) -> Run:
    """Everything small that a run's folder holds, its points included. Raises ArtifactError when there is no folder."""
    if not run_dir.is_dir():
        raise ArtifactError(f"{run_dir}: no run here; a run is a folder under paths.runs, named by exp_name")
    name = run_dir.resolve().name
    run = _load(run_dir, name, "")
    points = run_dir / "points"
    if points.is_dir():
        # A point may itself be nested ("loss=dpo/seed=1"), so take every folder that holds a run.
        run.points = [_load(path, name, path.relative_to(points).as_posix()) for path in _point_dirs(points)]
        for point in run.points:
            _borrow_base(point, run)
    _find_missing(run)
    for point in run.points:
        _find_missing(point)
    return run


def _point_dirs(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            nested = [] if _holds_run(path) else [point for point in _point_dirs(path) if _holds_run(point)]
            yield from nested or [path]


def _holds_run(path: Path) -> bool:
    own = ("prompts", "scored", "pairs", "base", "loop.json")
    return any(child.name in own or re.match(r"round_\d+$|.*\.partial$", child.name) for child in path.iterdir())


def _load(path: Path, name: str, point: str) -> Run:
    run = Run(name=name, path=path, point=point)
    run.rounds = sorted(
        int(match.group(1))
        for child in path.iterdir()
        if child.is_dir() and (match := re.fullmatch(r"round_(\d+)", child.name))
    )
    for place in (*SHARED, *(f"round_{r}/{place}" for r in run.rounds for place in IN_ROUND)):
        _load_artifact(run, place)
    for artifact in run.artifacts.values():
        run.problems += parent_problems(artifact)
    for moment in ("base", *(f"round_{r}" for r in run.rounds)):
        _load_evals(run, moment)
    run.loop = _load_loop(run)
    return run


def _load_artifact(run: Run, place: str) -> None:
    path = run.path / place
    if not is_complete(path):
        partial = partial_path(path)
        if partial.is_dir():
            run.problems.append(Problem("failed", place, "begun but never finished (killed, failed, or still running)"))
            run.planned.append(_read_json(partial / "plan.json").get("uses") or {})
        return
    try:
        found = manifest(path)
        run.artifacts[place] = Artifact(place, path, found, _read_json(path / "provenance.json"), digest(path))
    except (*UNREADABLE, KeyError) as error:
        run.problems.append(Problem("failed", place, f"cannot be read: {error}"))


def parent_problems(artifact: Artifact) -> Iterator[Problem]:
    """Inputs that changed or went away since."""
    for name, entries in artifact.manifest.get("parents", {}).items():
        for entry, path in zip(entries, artifact.inputs(name), strict=False):
            try:
                current = digest(path)
            except UNREADABLE:
                yield Problem("note", artifact.name, f"its input {name} ({path.name}) is no longer there")
                continue
            if current != entry.get("digest"):
                yield Problem(
                    "stale",
                    artifact.name,
                    f"its input {name} ({path.parent.name}/{path.name}) has changed since; "
                    f"run its stage again with overwrite=true",
                )


def _load_evals(run: Run, moment: str) -> None:
    artifact = run.artifacts.get(f"{moment}/evals")
    if artifact is None:
        return
    try:
        run.evals[moment] = {(r.task, r.metric): r for r in read(artifact.path, EvalResult, key="evals")}
    except UNREADABLE as error:
        run.problems.append(Problem("failed", artifact.name, f"cannot be read: {error}"))


def _load_loop(run: Run) -> list[dict[str, Any]]:
    stages = _read_json(run.path / "loop.json").get("stages", [])
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _borrow_base(point: Run, run: Run) -> None:
    """A point without a "before" of its own takes the run's, when both were made from the same model and tasks."""
    shared = run.artifacts.get("base/evals")
    if shared is None or "base" in point.evals or "base" not in run.evals:
        return
    for artifact in point.artifacts.values():
        for key in ("model", "task"):
            if key in artifact.uses and key in shared.uses and artifact.uses[key] != shared.uses[key]:
                return
    point.evals = {"base": run.evals["base"], **point.evals}


def _find_missing(run: Run) -> None:
    """What comes next after the last artifact of each round and is not there. An older round needs no evaluation."""
    if run.points:
        return
    begun = {problem.where for problem in run.problems if problem.kind == "failed"}
    if not run.artifacts and not begun:
        run.problems.append(Problem("failed", run.point or run.name, "nothing was written here"))
        return
    if not run.rounds:
        run.problems.append(Problem("missing", "round_0/checkpoint", "nothing was trained yet"))
    for round_ in run.rounds:
        places = [f"round_{round_}/{place}" for place in (CHAIN if round_ == run.rounds[-1] else CHAIN[:-1])]
        written = {re.sub(r"/demonstrations$", "/pairs", name) for name in run.artifacts}  # for SFT they are its pairs
        there = [place in written or place in begun for place in places]
        last = max((index for index, found in enumerate(there) if found), default=-1)
        if last + 1 < len(places) and places[last] not in begun:
            after = f"comes after {places[last]}" if last >= 0 else "the round's folder is empty"
            run.problems.append(Problem("missing", places[last + 1], f"not there; {after}"))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one: what is read this way is never needed for a result."""
    try:
        data = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


# ------------------------------------------------------------------------------------------- numbers of a run


def state(problems: Sequence[Problem]) -> str:
    """The worst of the problems, in one of STATES."""
    kinds = {problem.kind for problem in problems}
    for kind, name in (("failed", "failed"), ("missing", "incomplete"), ("stale", "stale")):
        if kind in kinds:
            return name
    return "complete"


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def settings(run: Run) -> dict[str, Any]:
    """Dotted settings of all stages together. What training used comes last, so its seed is the seed."""
    ordered = sorted(run.artifacts.values(), key=lambda artifact: artifact.name.endswith("/checkpoint"))
    flat: dict[str, Any] = {}
    for uses in (*run.planned, *(artifact.uses for artifact in ordered)):
        flat |= flatten(uses)
    flat.pop("round", None)
    return flat


def named(flat: Mapping[str, Any], kind: str) -> str | None:
    """The name of a component or model in flat settings."""
    for key in (f"{kind}.name", kind, f"{kind}.path"):
        if flat.get(key) is not None:
            return str(flat[key])
    return None


def seconds(run: Run, round_: int | None = None) -> float | None:
    """Time spent: what the loop measured when it ran, else what the artifacts say. None when nothing says anything."""
    if run.loop:
        times = [s.get("seconds") for s in run.loop if round_ is None or s.get("round") == round_]
    else:
        prefix = "" if round_ is None else f"round_{round_}/"
        # One evaluation writes both evals and eval_samples, so its time would be counted twice.
        twice = {name for name in run.artifacts if name.endswith("/eval_samples")}
        skipped = {name for name in twice if name.replace("eval_samples", "evals") in run.artifacts}
        times = [
            artifact.provenance.get("seconds")
            for name, artifact in run.artifacts.items()
            if name.startswith(prefix) and name not in skipped
        ]
    known = [float(time) for time in times if isinstance(time, int | float)]
    return round(sum(known), 3) if known else None


def training_pairs(run: Run, round_: int) -> list[Path]:
    """The pairs that the round's checkpoint was trained on; before there is one, those that it would be."""
    checkpoint = run.artifacts.get(f"round_{round_}/checkpoint")
    given = [path for path in checkpoint.inputs("pairs") if is_complete(path)] if checkpoint else []
    if given or (checkpoint and checkpoint.inputs("demonstrations")):
        return given
    for place in (f"round_{round_}/pairs", "pairs"):
        if place in run.artifacts:
            return [run.artifacts[place].path]
    return []


def num_pairs(run: Run, round_: int | None = None) -> int | None:
    """Pairs of the round, or of the newest round that has some."""
    for candidate in reversed(run.rounds or [0]) if round_ is None else [round_]:
        paths = training_pairs(run, candidate)
        if paths:
            return sum(int(manifest(path).get("num_records", 0)) for path in paths)
    return None


def moments(run: Run) -> list[str]:
    """Where evals exist, in order of time: "base" before the rounds."""
    return [m for m in ("base", *(f"round_{r}" for r in run.rounds)) if m in run.evals]


def newest(run: Run) -> str | None:
    """The newest round with evals."""
    after = [moment for moment in moments(run) if moment != "base"]
    return after[-1] if after else None


def accuracy(run: Run, moment: str | None) -> EvalResult | None:
    """Metric "accuracy" of task "accuracy"."""
    return run.evals.get(moment, {}).get(("accuracy", "accuracy")) if moment else None


def metric_names(run: Run) -> list[Metric]:
    """Every (task, metric) of the run, accuracy first, the rest in alphabetical order."""
    names = {name for results in run.evals.values() for name in results}
    return sorted(names, key=lambda name: (name != ("accuracy", "accuracy"), name))
