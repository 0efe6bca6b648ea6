"""Statistics of artifacts in one pass and bounded memory: histograms, curves, and samples drawn with a seed."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson

from prefpipe.artifacts import read
from prefpipe.records import Message, Pair, ScoredCompletion
from prefpipe.statistics import bootstrap_mean

T = TypeVar("T")


class Histogram:
    """Counts of values: exact up to `limit` different ones, then in bins just wide enough to stay below it."""

    def __init__(self, limit: int = 4096) -> None:
        self.limit, self.width, self.num, self.total = limit, 0.0, 0, 0.0
        self.counts: Counter[float] = Counter()

    def add(self, value: float) -> None:
        self.counts[self._bin(value)] += 1
        self.num += 1
        self.total += value
        if len(self.counts) > self.limit:
            spread = max(self.counts) - min(self.counts)
            self.width = max(2 * self.width, 4 * spread / self.limit)
            merged: Counter[float] = Counter()
            for middle, count in self.counts.items():
                merged[self._bin(middle)] += count
            self.counts = merged

    def _bin(self, value: float) -> float:
        return value if self.width == 0 else round(value / self.width) * self.width

    @property
    def mean(self) -> float | None:
        """Exact, whatever the bins are."""
        return self.total / self.num if self.num else None

    def quantile(self, share: float) -> float | None:
        """The smallest value that at least this share of all values do not exceed."""
        seen = 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= share * self.num:
                return value
        return None


class Curve:
    """Values over steps: exact up to `limit` points, then means over equally many steps each."""

    def __init__(self, limit: int = 1024) -> None:
        self.limit, self.stride = limit, 1
        self.sums: dict[int, tuple[float, int]] = {}

    def add(self, step: int, value: float) -> None:
        total, count = self.sums.get(step // self.stride, (0.0, 0))
        self.sums[step // self.stride] = total + value, count + 1
        if len(self.sums) > self.limit:
            self.stride *= 2
            merged: dict[int, tuple[float, int]] = {}
            for index, (total, count) in self.sums.items():
                sum_so_far, count_so_far = merged.get(index // 2, (0.0, 0))
                merged[index // 2] = sum_so_far + total, count_so_far + count
            self.sums = merged

    def points(self) -> list[tuple[float, float]]:
        """(step, mean value), in order of steps; the step is the middle of its stride."""
        middle = (self.stride - 1) / 2
        return [(index * self.stride + middle, total / count) for index, (total, count) in sorted(self.sums.items())]


class Reservoir(Generic[T]):
    """A uniform sample of at most `size` of the values seen (Vitter's algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seen, self.kept = size, 0, list[T]()
        self.rng = random.Random(seed)

    def add(self, value: T) -> None:
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(value)
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.kept[place] = value


# ------------------------------------------------------------------------------------------------ training


@dataclass
class Training:
    """One round's metrics.jsonl and timing.jsonl. bad_steps: metric → steps where it was no finite number."""

    curves: dict[str, Curve] = field(default_factory=dict)
    bad_steps: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0
    last_step: int = 0
    seconds: float = 0.0
    tokens: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds and self.tokens else None


def read_training(folder: Path) -> Training | None:
    """The training of a checkpoint's folder, finished or not; None when it holds no metrics."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    training = Training()
    for row in _json_lines(folder / "metrics.jsonl"):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        training.num_steps += 1
        training.last_step = max(training.last_step, step)
        for name, value in row.items():
            if not name.startswith("train/"):
                continue
            if isinstance(value, int | float):
                training.curves.setdefault(name, Curve()).add(step, float(value))
            elif value is None:  # orjson writes NaN and infinity as null
                training.bad_steps[name] += 1
    for row in _json_lines(folder / "timing.jsonl"):
        seconds, rate = row.get("seconds"), row.get("tokens_per_second")
        if isinstance(seconds, int | float):
            training.seconds += seconds
            training.tokens += seconds * rate if isinstance(rate, int | float) else 0.0
    return training


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log that a killed run may have left with a torn line."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row


# ------------------------------------------------------------------------------------------------ pairs


@dataclass
class PairStatistics:
    """Of one or several pair artifacts. Lengths are characters: words and tokens differ by language and model."""

    num: int = 0
    ties: int = 0
    identical: int = 0
    chosen_longer: int = 0
    chosen_lengths: Histogram = field(default_factory=Histogram)
    rejected_lengths: Histogram = field(default_factory=Histogram)
    margins: Histogram = field(default_factory=Histogram)
    samples: list[Pair] = field(default_factory=list)


def read_pairs(paths: Iterable[Path], *, num_samples: int, seed: int) -> PairStatistics:
    """Statistics and a sample of pairs, streamed."""
    found, samples = PairStatistics(), Reservoir[Pair](num_samples, seed)
    for path in paths:
        for pair in read(path, Pair, key="pairs"):
            found.num += 1
            found.identical += pair.chosen == pair.rejected
            found.chosen_longer += len(pair.chosen) > len(pair.rejected)
            found.chosen_lengths.add(len(pair.chosen))
            found.rejected_lengths.add(len(pair.rejected))
            if pair.chosen_score is not None and pair.rejected_score is not None:
                found.ties += pair.chosen_score == pair.rejected_score
                found.margins.add(pair.chosen_score - pair.rejected_score)
            samples.add(pair)
    found.samples = samples.kept
    return found


# ------------------------------------------------------------------------------------------------ before and after


@dataclass(frozen=True)
class Shown:
    """One held-out prompt with the text before and after; right is None where no scorer says."""

    kind: str
    messages: list[Message]
    answer: str | None
    before: str | None
    before_right: bool | None
    after: str | None
    after_right: bool | None


@dataclass
class Side:
    """The evaluation samples of one model. correct: prompt id → (sum of correctness, completions, first one right)."""

    correct: dict[str, tuple[float, int, bool]] = field(default_factory=dict)
    num: int = 0
    cut: int = 0
    lengths: Histogram = field(default_factory=Histogram)

    @property
    def cut_share(self) -> float:
        return self.cut / self.num if self.num else 0.0


@dataclass
class Comparison:
    """Before and after on the same prompts. gain: mean of the differences per prompt, with its paired interval."""

    before: Side
    after: Side
    counts: dict[str, int]
    num: int = 0
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    shown: list[Shown] = field(default_factory=list)


KINDS = ("improved", "worsened", "both wrong", "both right", "right", "wrong")


def correctness(completion: ScoredCompletion) -> float | None:
    """The score "correct"; failing that, the only score when it is a verdict."""
    scores = completion.scores
    if "correct" in scores:
        return scores["correct"]
    values = list(scores.values())
    return values[0] if len(values) == 1 and 0 <= values[0] <= 1 else None


def is_accuracy_sample(completion: ScoredCompletion) -> bool:
    """Whether the sample belongs to the accuracy task; samples of other tasks say so in their meta."""
    return bool(completion.meta.get("task", "accuracy") == "accuracy")


def compare(before: Path | None, after: Path | None, *, per_kind: dict[str, int], seed: int) -> Comparison:
    """Join two sets of evaluation samples by prompt: verdicts first, texts only of those that are shown.

    Memory grows with the number of held-out prompts (an id and two numbers each), not with their texts.
    """
    old, new = _read_side(before), _read_side(after)
    result = Comparison(old, new, counts=dict.fromkeys(KINDS, 0))
    kinds: dict[str, list[str]] = {}
    differences = []
    for prompt in sorted(new.correct or old.correct):
        was, is_ = old.correct.get(prompt), new.correct.get(prompt)
        if was is not None and is_ is not None:
            differences.append(is_[0] / is_[1] - was[0] / was[1])
        kind = _kind(was and was[2], is_ and is_[2])
        result.counts[kind] += 1
        kinds.setdefault(kind, []).append(prompt)
    result.num = len(differences)
    if differences:
        result.gain = sum(differences) / len(differences)
        result.low, result.high = bootstrap_mean(differences, seed=seed)
    rng = random.Random(seed)
    chosen = {
        prompt: kind
        for kind in KINDS
        for prompt in rng.sample(kinds.get(kind, []), min(per_kind.get(kind, 0), len(kinds.get(kind, []))))
    }
    result.shown = _show(before, after, chosen)
    return result


def _kind(was: bool | None, is_: bool | None) -> str:
    if was is None or is_ is None:
        return "right" if was or is_ else "wrong"
    return {(False, True): "improved", (True, False): "worsened", (False, False): "both wrong"}.get(
        (was, is_), "both right"
    )


def _read_side(path: Path | None) -> Side:
    side = Side()
    for completion in _samples(path):
        side.num += 1
        side.cut += completion.finish_reason == "length"
        side.lengths.add(len(completion.text))
        value = correctness(completion)
        if value is not None:
            total, count, first = side.correct.get(completion.prompt_id, (0.0, 0, value >= 0.5))
            side.correct[completion.prompt_id] = total + value, count + 1, first
    return side


def _show(before: Path | None, after: Path | None, chosen: dict[str, str]) -> list[Shown]:
    old, new = _first_of(before, chosen.__contains__), _first_of(after, chosen.__contains__)
    shown = []
    for prompt, kind in chosen.items():
        was, is_ = old.get(prompt), new.get(prompt)
        either = is_ or was
        if either is not None:
            shown.append(Shown(kind, either.messages, either.answer, *_text(was), *_text(is_)))
    return shown


def _text(completion: ScoredCompletion | None) -> tuple[str | None, bool | None]:
    if completion is None:
        return None, None
    value = correctness(completion)
    return completion.text, None if value is None else value >= 0.5


def _first_of(path: Path | None, wanted: Callable[[str], bool]) -> dict[str, ScoredCompletion]:
    found: dict[str, ScoredCompletion] = {}
    for completion in _samples(path):
        if wanted(completion.prompt_id) and correctness(completion) is not None:
            found.setdefault(completion.prompt_id, completion)
    return found


def _samples(path: Path | None) -> Iterator[ScoredCompletion]:
    if path is not None:
        yield from filter(is_accuracy_sample, read(path, ScoredCompletion, key="eval_samples"))
