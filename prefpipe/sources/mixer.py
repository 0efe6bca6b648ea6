"""Which rows of which source are taken, how often, and in which order: a function of the config and the seed alone."""

import random
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefpipe.errors import ConfigError
from prefpipe.settings import DataMixerConfig, SourceConfig

EXAMPLE = "data_mixer.spec='a.jsonl:0.5;b.json.gz:1000'"


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a source is taken: a number of rows, or a weight (0.5 is half of it, 2.5 is twice and half again)."""

    key: str
    weight: float = 1.0
    num_rows: int | None = None

    def counts(self, available: int) -> tuple[int, int]:
        """(copies of every row, rows of which there is one more), of `available` rows.

        Raises ConfigError when there are too few rows, or when the share of some rows is none.
        """
        if self.num_rows is not None:
            if self.num_rows > available:
                raise ConfigError(f"{self.key} asks for {self.num_rows} rows, but only {available} can be used")
            return divmod(self.num_rows, available) if available else (0, 0)
        copies = int(self.weight)
        # From the whole product: 2.1 - 2 is not 0.1.
        extra = round(self.weight * available) - copies * available
        if available and not copies and not extra and self.weight:
            raise ConfigError(
                f"{self.key}: {self.weight} of {available} rows is no row; raise it, or leave the source out"
            )
        return copies, extra

    def described(self, available: int) -> str:
        """What was taken, in words, for the log and the manifest."""
        copies, extra = self.counts(available)
        if self.num_rows is not None:
            return f"{self.num_rows} is a number of rows: {self.num_rows} of {available}, chosen by seed"
        if not self.weight:
            return f"0 takes none of {available} rows: read for data_mixer.decontaminate alone"
        if not copies:
            return f"{self.weight} is a fraction: {extra} of {available} rows, chosen by seed"
        if (copies, extra) == (1, 0):
            return f"{self.weight} is a fraction: all {available} rows"
        more = f" and {extra} of them, chosen by seed, once more" if extra else ""
        return f"{self.weight} is a weight: all {available} rows {copies} times{more}"


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A source of a mixture."""

    name: str
    source: SourceConfig
    share: Share


def ingredients(mixer: DataMixerConfig) -> list[Ingredient]:
    """The sources of a mixture: the named ones by name, then the files of `spec` as they stand there."""
    found = [
        Ingredient(name, mixer.sources[name], Share(f"data_mixer.weights.{name}", mixer.weights.get(name, 1.0)))
        for name in sorted(mixer.sources)
    ]
    entries = list(_spec_entries(mixer.spec))
    file_names = Counter(Path(path).name for path, _ in entries)
    for path, share in entries:
        # Two files of one name keep their folders, so that the counts can tell them apart.
        name = path if file_names[Path(path).name] > 1 or ":" in path else Path(path).name
        source = SourceConfig(path=path, format=mixer.format, columns=mixer.columns)
        if name in {other.name for other in found}:
            raise ConfigError(f"data_mixer.spec: two sources are named {name}; take the file once, with a larger share")
        found.append(Ingredient(name, source, share))
    if not found:
        raise ConfigError(f"data_mixer={mixer.name} has no sources; name files, e.g. {EXAMPLE}")
    return found


def _spec_entries(spec: str) -> Iterator[tuple[str, Share]]:
    for entry in filter(None, (part.strip() for part in spec.split(";"))):
        path, colon, amount = entry.rpartition(":")
        key = f"data_mixer.spec {entry!r}"
        if re.fullmatch(r"[0-9]+", amount) and int(amount) > 0:
            share = Share(key, num_rows=int(amount))
        elif re.fullmatch(r"[0-9]*\.[0-9]*", amount) and amount != "." and float(amount) > 0:
            share = Share(key, weight=float(amount))
        else:
            raise ConfigError(
                f"{key}: after the last ':' must stand how much of the file to take, above 0: with a point a fraction "
                f"(1.0 is all), without one a number of rows; e.g. {EXAMPLE}"
            )
        if not colon or not path:
            raise ConfigError(f"{key} names no file; e.g. {EXAMPLE}")
        yield path, share


def mixed_order(shares: Mapping[str, Share], available: Mapping[str, int], *, seed: int) -> "array[int]":
    """Row numbers in the order of the mixture, repeats included; 8 bytes each.

    Args:
        shares: source → its share. available: source → how many rows it has; they are numbered on, source by source,
            in the order of this mapping.
    """
    order: array[int] = array("Q")
    start = 0
    for name, total in available.items():
        copies, extra = shares[name].counts(total)
        for _ in range(copies):
            order.extend(range(start, start + total))
        # From the name as well, so that a source's choice does not depend on which other sources there are.
        chosen = random.Random(f"{seed}/select/{name}").sample(range(total), extra)
        order.extend(start + row for row in sorted(chosen))
        start += total
    random.Random(f"{seed}/mix").shuffle(order)
    return order


def is_heldout(prompt_id: str, fraction: float) -> bool:
    """Whether a prompt is held out. Of its id alone, so that it does not change with the other data or the seed."""
    return int(prompt_id, 16) < fraction * 2**64
