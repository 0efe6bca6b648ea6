"""Which pairs are trained on, how often, and with what weight: a random subset, or weights used for sampling or loss.

A choice depends on the seed and on the pairs' texts, never on their order; a smaller budget takes a subset of what a
larger one takes. Weights by score difference and the random subset follow When2RL (`preference_config`,
`--max_data_size`), which does not say whether a weight is a sampling probability or a factor of the loss; here
selection.apply does.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prefpipe.errors import DataError
from prefpipe.records import Demonstration, Pair
from prefpipe.settings import OTHER_DIFFERENCES, SelectionConfig

log = logging.getLogger(__name__)

MAX_GROWTH = 100
"""Sampling may repeat pairs up to this many times as many in all; a larger weight is taken for a mistake."""


@dataclass(frozen=True)
class Selection:
    """What is trained on.

    indices: of the pairs, ascending; a repeated pair stands there as often as it is taken.
    weights: of each of them, the factor of its loss; mean 1, and all 1 unless selection.apply=loss.
    counts: how many distinct pairs were taken, how many further copies, how many left out and why.
    """

    indices: list[int]
    weights: list[float]
    counts: Counter[str]


def pair_id(pair: Pair | Demonstration) -> str:
    """16 hex digits of the prompt and the texts; the same whatever the model, its tokenizer, scores and meta."""
    texts = (pair.chosen, pair.rejected) if isinstance(pair, Pair) else (pair.text,)
    text = "\0".join((pair.prompt_id, *texts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def pair_weight(pair: Pair | Demonstration, row: int, selection: SelectionConfig) -> float:
    """The weight that selection gives a pair, before selection.max_weight; infinite only where that will clip it.

    Raises DataError, naming the row, where the pair lacks what the weight is made of, or has no weight of at least 0.
    """
    if selection.name in ("none", "random"):
        return 1.0
    if selection.name == "strength":
        difference = str(rounded(_score_difference(pair, row, selection)))
        return float(selection.strength.get(difference, selection.strength[OTHER_DIFFERENCES]))
    number = _score_difference(pair, row, selection) if selection.name == "margin" else _column(pair, row, selection)
    weight = _transformed(number, selection.transform)
    if weight < 0:
        raise DataError(
            f"row {row} of inputs.pairs would weigh {weight}, but a weight is at least 0; selection.transform=sigmoid "
            f"or exp makes one of any number"
        )
    if math.isinf(weight) and selection.max_weight is None:
        raise DataError(
            f"row {row} of inputs.pairs would weigh e^{number}, which is no finite number; set selection.max_weight"
        )
    return weight


def rounded(difference: float) -> int:
    """The nearest whole number; halves round up, so that every whole number stands for an interval of width 1.

    Rounded to 6 decimals first, because 4.1 - 3.6 is not exactly a half in binary.
    """
    return math.floor(round(difference, 6) + 0.5)


def select(ids: Sequence[str], weights: Sequence[float], selection: SelectionConfig, seed: int) -> Selection:
    """Choose among pairs, as selection says, and log the choice.

    Loss weights are divided by their mean over the pairs taken: equal weights of any size change nothing, so that the
    learning rate keeps its meaning, and in expectation an epoch's gradient points where that of sampling does. As a
    mean over all pairs, not over a batch, a pair's factor does not depend on which others are in its batch.

    Args:
        ids: pair_id of each pair; pairs of one id and one weight are interchangeable copies.
        weights: pair_weight of each.
    Raises:
        DataError: no pair is left, or repeats would grow the data more than MAX_GROWTH times.
    """
    if selection.name == "none":
        return Selection(list(range(len(ids))), [1.0] * len(ids), Counter())
    counts: Counter[str] = Counter()
    bound = math.inf if selection.max_weight is None else selection.max_weight
    counts["selection_clipped"] = sum(weight > bound for weight in weights)
    clipped = [min(weight, bound) for weight in weights]
    allowed = [index for index, weight in enumerate(clipped) if weight > 0]
    counts["selection_left_out_weight_zero"] = len(ids) - len(allowed)
    if not allowed:
        raise DataError(f"selection={selection.name} gives each of the {len(ids)} pairs the weight 0; raise a weight")
    chances = clipped if selection.apply == "sampling" else [1.0] * len(ids)
    draws = _draws(ids, clipped, seed)
    if selection.budget is not None:
        indices = _drawn(allowed, chances, draws, selection.budget)
        counts["selection_left_out_by_budget"] = len(allowed) - len(indices)
        counts["selection_budget_unfilled"] = selection.budget - len(indices)
    else:
        indices = _repeated(allowed, chances, draws, selection)
        counts["selection_left_out_by_chance"] = len(allowed) - len(set(indices))
    counts["selection_taken"] = len(set(indices))
    counts["selection_repeats"] = len(indices) - counts["selection_taken"]
    if not indices:
        raise DataError(
            f"selection={selection.name} takes none of {len(ids)} pairs, as chances are small: their weights sum to "
            f"{math.fsum(chances):g}; raise the weights, set selection.budget, or use selection.apply=loss"
        )
    factors = _over_mean([clipped[index] for index in indices]) if selection.apply == "loss" else [1.0] * len(indices)
    _report(len(ids), clipped, factors, +counts, selection)
    return Selection(indices, factors, +counts)


def _score_difference(pair: Pair | Demonstration, row: int, selection: SelectionConfig) -> float:
    if isinstance(pair, Demonstration):
        raise DataError(
            f"row {row} of inputs.demonstrations has no rejected side, and selection={selection.name} reads the "
            f"difference of two scores; use selection=random or column, or train on pairs with inputs.pairs="
        )
    if pair.chosen_score is None or pair.rejected_score is None:
        raise DataError(
            f"row {row} of inputs.pairs has no chosen_score and rejected_score, and selection={selection.name} reads "
            f"them; score and pair the completions, or use data whose pairs carry them"
        )
    difference = pair.chosen_score - pair.rejected_score
    if not math.isfinite(difference):
        raise DataError(
            f"row {row} of inputs.pairs has the scores {pair.chosen_score} and {pair.rejected_score}, whose difference "
            f"is no finite number; selection={selection.name} reads it; mend or leave out the row"
        )
    return difference


def _column(pair: Pair | Demonstration, row: int, selection: SelectionConfig) -> float:
    return meta_number(pair, row, str(selection.column), key="selection.column")


def meta_number(pair: Pair | Demonstration, row: int, column: str, *, key: str) -> float:
    """The number in meta; CSV cells hold it as text. Raises DataError, naming the config key, where there is none."""
    if column not in pair.meta:
        raise DataError(
            f"row {row} of inputs.pairs has no meta key {key}={column}; it has {sorted(pair.meta)[:12]}; a "
            f"file's column becomes one by data_mixer.columns='{{meta.{column}: COLUMN}}' at stage=prepare"
        )
    value = pair.meta[column]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"row {row} of inputs.pairs: {key}={column} is {str(value)[:40]!r}, not a finite number; mend "
            f"or leave out the row"
        )
    return number


def _transformed(number: float, transform: str | None) -> float:
    if transform == "sigmoid":
        return 1 / (1 + math.exp(-number)) if number >= 0 else math.exp(number) / (1 + math.exp(number))
    if transform == "exp":
        # math.exp raises above 709.78.
        return math.exp(number) if number < 709 else math.inf
    return number


def _draws(ids: Sequence[str], weights: Sequence[float], seed: int) -> list[float]:
    """A random number in (0, 1) for each pair, of the seed and its id; copies are numbered, lighter ones first."""
    copies: Counter[str] = Counter()
    draws = [0.0] * len(ids)
    for index in sorted(range(len(ids)), key=lambda index: (ids[index], weights[index])):
        name = ids[index]
        digest = hashlib.sha256(f"{seed}/select/{name}/{copies[name]}".encode()).digest()
        copies[name] += 1
        # 52 bits, as with more of them the largest would round to 1.
        draws[index] = ((int.from_bytes(digest[:8]) >> 12) + 0.5) / 2**52
    return draws


def _drawn(allowed: Sequence[int], chances: Sequence[float], draws: Sequence[float], budget: int) -> list[int]:
    """At most `budget` of the pairs without replacement, as if drawn one after the other in proportion to chances.

    Those with the largest u^(1 / w) (Efraimidis and Spirakis 2006), in logarithms.
    """
    ranks = {index: math.log(-math.log(draws[index])) - math.log(chances[index]) for index in allowed}
    return sorted(sorted(allowed, key=ranks.__getitem__)[:budget])


def _repeated(
    allowed: Sequence[int], chances: Sequence[float], draws: Sequence[float], selection: SelectionConfig
) -> list[int]:
    """Each pair as often as the whole part of its weight says, and once more with its fraction as the chance."""
    total = sum(chances[index] for index in allowed)
    if total > MAX_GROWTH * len(allowed):
        largest = max(chances)
        remedy = "selection.strength" if selection.name == "strength" else "selection.max_weight"
        raise DataError(
            f"selection={selection.name} would repeat {len(allowed)} pairs to about {total:.3g}, over {MAX_GROWTH} "
            f"times as many, as the largest weight is {largest:.3g}; lower {remedy}, set selection.budget, or use "
            f"selection.apply=loss"
        )
    taken: list[int] = []
    for index in allowed:
        whole = int(chances[index])
        taken += [index] * (whole + (draws[index] < chances[index] - whole))
    return taken


def _over_mean(weights: Sequence[float]) -> list[float]:
    """Each weight divided by the mean of all."""
    largest = max(weights)
    # By the largest first, so that the sum of weights like e^700 is finite.
    scaled = [weight / largest for weight in weights]
    total = math.fsum(scaled)
    return [weight * len(weights) / total for weight in scaled]


def _report(
    num_pairs: int, weights: Sequence[float], factors: Sequence[float], counts: Counter[str], selection: SelectionConfig
) -> None:
    log.info(
        "selection=%s: %d of %d pairs, and %d repeats; %s",
        selection.name,
        counts["selection_taken"],
        num_pairs,
        counts["selection_repeats"],
        dict(counts),
    )
    if selection.apply == "loss":
        effective = len(factors) ** 2 / math.fsum(factor**2 for factor in factors)
        log.info(
            "loss weights: %.3g to %.3g after division by their mean; worth %.1f equal pairs",
            min(factors),
            max(factors),
            effective,
        )
    if counts["selection_budget_unfilled"]:
        log.warning(
            "selection.budget=%d is not filled: only %d pairs have a weight above 0, and each is taken once",
            selection.budget,
            counts["selection_taken"],
        )
    if selection.name != "random" and selection.budget is None and set(weights) == {1.0}:
        log.warning("selection=%s gives every pair the weight 1, so it changes nothing", selection.name)
