"""What may be searched: values as they are typed, in Hydra's sweep syntax, to a space of trials.py and back."""

import itertools
import math
from collections.abc import Iterator, Mapping

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Sweep

from prefpipe.errors import ConfigError
from prefpipe.trials import Choices, Interval, Space


def values_of(override: Override) -> Choices | Interval:
    """What an override says that its key may be. Raises ConfigError where that is no space."""
    value, line = override.value(), override.input_line
    if not isinstance(value, Sweep):
        raise ConfigError(f"sweep.space: {line} is one value; give several, or set the key itself")
    tags = value.tags - {"log"}
    if tags:
        raise ConfigError(f"{line}: sweep=optuna knows the tag log alone, not {', '.join(sorted(tags))}")
    is_log = "log" in value.tags
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        found = Interval(value.start, value.end, log=is_log, whole=isinstance(value.start, int))
        if not found.low < found.high or (is_log and found.low <= 0):
            raise ConfigError(f"{line}: the interval must rise" + (", and with the tag log be above 0" * is_log))
        return found
    numbers = list(value.range()) if isinstance(value, RangeSweep) else []
    if len(numbers) > 1 and all(isinstance(number, int) for number in numbers):
        low, high, step = min(numbers), max(numbers), abs(int(numbers[1] - numbers[0]))
        if is_log and (low <= 0 or step != 1):
            raise ConfigError(f"{line}: with the tag log a range must be above 0, and its step 1")
        return Interval(low, high, log=is_log, whole=True, step=step)
    if is_log:
        raise ConfigError(f"{line}: the tag log is for an interval, or a range of whole numbers")
    choices = list(dict.fromkeys(override.sweep_string_iterator()))
    if not choices:
        raise ConfigError(f"{line} holds no value")
    shuffled = isinstance(value, ChoiceSweep | RangeSweep) and value.shuffle
    return Choices(tuple(sorted(choices) if shuffled else choices))


def ends(values: Choices | Interval) -> list[str]:
    """Each choice, or both ends."""
    return list(values.values) if isinstance(values, Choices) else [repr(values.low), repr(values.high)]


def low_corner(space: Space) -> dict[str, str]:
    """The first of everything."""
    return {key: ends(values)[0] for key, values in space.items()}


def num_values(values: Choices | Interval) -> float:
    """How many values there are."""
    if isinstance(values, Choices):
        return len(values.values)
    return (values.high - values.low) // values.step + 1 if values.whole else math.inf


def as_overrides(values: Mapping[str, str]) -> list[str]:
    """Of a trial's values."""
    return [f"{key}={value}" for key, value in values.items()]


def corners(space: Space, limit: int) -> Iterator[dict[str, str]]:
    """Points that are legal if all are: every combination of ends, or where these are more than `limit`, one by one."""
    all_ends = {key: ends(values) for key, values in space.items()}
    if math.prod(map(len, all_ends.values())) <= limit:
        yield from (dict(zip(all_ends, corner, strict=True)) for corner in itertools.product(*all_ends.values()))
        return
    low = low_corner(space)
    yield from (low | {key: value} for key, values in all_ends.items() for value in values)
