"""Reference log-probabilities as a CSV: one row a pair, sums over tokens, for exchange with other programs.

When2RL trained from such a file (`--precompute_file_path`). Its sums serve losses of sums and of means; it holds no
single tokens, which ReferenceCache does.
"""

import csv
import logging
import math
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from prefpipe.errors import DataError
from prefpipe.records import Demonstration, Pair, Split
from prefpipe.training.reference_parts import MAX_LOGP
from prefpipe.training.selection import pair_id

log = logging.getLogger(__name__)
P = TypeVar("P", bound=Pair | Demonstration)


class PairSums(NamedTuple):
    """Reference log-probabilities of one pair. The fields are the columns of the CSV.

    full_id: the pair's name, unique within its split. reference_chosen_logps, reference_rejected_logps: nats, summed
    over completion tokens. chosen_tokens, rejected_tokens: how many were summed.
    """

    full_id: str
    split: str
    reference_chosen_logps: float
    reference_rejected_logps: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def name(self) -> tuple[str, str]:
        return self.full_id, self.split


class PairNames:
    """The full_id of each pair of a run: that of its meta; its pair_id where the data have none.

    A full_id that a pair lacks, or that two pairs share, names nothing: then every pair goes by its pair_id.
    """

    def __init__(self) -> None:
        self._given: list[str] = []
        self._ids: list[str] = []

    def seen(self, pairs: Iterable[P]) -> Iterator[P]:
        """Pass pairs on, and remember what they are called."""
        for pair in pairs:
            self._given.append(str(pair.meta.get("full_id", "")))
            self._ids.append(pair_id(pair))
            yield pair

    @cached_property
    def by_row(self) -> list[str]:
        """The name of each pair, in the order in which they were seen: all of them must have been."""
        unique = len(set(zip(self._given, self._ids, strict=True))) == len(set(self._given))
        if any(self._given) and not (unique and all(self._given)):
            log.warning("meta.full_id is missing in some pairs, or is that of two; reference_logps.csv has pair ids")
        return self._given if unique and all(self._given) else self._ids


def write_csv(path: Path, rows: Iterable[PairSums]) -> None:
    """Write sums, one row per pair, under a header, UTF-8; every float64 keeps its bits.

    Raises:
        DataError: two rows have one full_id and split, or a value is not what `read_csv` accepts.
    """
    seen: set[tuple[str, str]] = set()
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writerow(PairSums._fields)
            for row in rows:
                _pair_sums(f"{path}: row {len(seen) + 1}", [str(value) for value in row])
                if row.name in seen:
                    raise DataError(f"{path}: full_id={row.full_id}, split={row.split} names two pairs; make it unique")
                seen.add(row.name)
                writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def read_csv(path: Path) -> dict[int, PairSums]:
    """Read sums back, every value checked: line → row. The order of the columns is free.

    Raises:
        DataError: a column is missing, unknown or doubled, a pair is doubled, a row is too short or long, a sum is no
            finite number of at most 0, a count is no whole number of at least 1, or the file is not CSV in UTF-8.
    """
    found: dict[tuple[str, str], int] = {}
    rows: dict[int, PairSums] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if sorted(header) != sorted(PairSums._fields):
                raise DataError(
                    f"{path}:1: the columns are {','.join(header)}, expected are exactly {','.join(PairSums._fields)}; "
                    f"add, rename or drop some (with pandas: index=False)"
                )
            order = [header.index(name) for name in PairSums._fields]
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} cells, but the header has {len(header)}; write the row again"
                    )
                row = _pair_sums(where, [cells[column] for column in order])
                if row.name in found:
                    raise DataError(
                        f"{where}: full_id={row.full_id}, split={row.split} is in line {found[row.name]} too; drop one"
                    )
                found[row.name] = reader.line_num
                rows[reader.line_num] = row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not CSV in UTF-8 ({error}); export it again") from None
    return rows


def match_sums(
    path: Path, rows: Mapping[int, PairSums], pairs: Sequence[tuple[str, int, int]], known: Container[str]
) -> NDArray[np.float64]:
    """The sums of a CSV in the order of the pairs of a run.

    Args:
        rows: of `read_csv(path)`; only those of split=train are used.
        pairs: those that are trained on: full_id, number of chosen and of rejected tokens after truncation.
        known: the full_id of every pair that the run was given, also of those that it leaves out.

    Returns:
        [2, len(pairs)], nats, chosen then rejected.

    Raises:
        DataError: a pair has no row, a row no pair, or a pair was summed over another number of tokens.
    """
    lines = {row.full_id: line for line, row in rows.items() if row.split == Split.train}
    for full_id, line in lines.items():
        if full_id not in known:
            raise DataError(
                f"{path}:{line}: full_id={full_id} is of no pair of inputs.pairs; drop the row, or train on the pairs "
                f"that the file was made of"
            )
    log.info("%s: %d rows of split=train, %d of other splits are not read", path, len(lines), len(rows) - len(lines))
    sums = np.empty((2, len(pairs)))
    for number, (full_id, *tokens) in enumerate(pairs):
        if full_id not in lines:
            last = max(rows, default=1)
            raise DataError(
                f"{path}:{last}: the file ends without a row of full_id={full_id}, split=train; add it, leave the pair "
                f"out, or drop inputs.reference_logps to have all of them computed"
            )
        row = rows[lines[full_id]]
        if [row.chosen_tokens, row.rejected_tokens] != tokens:
            raise DataError(
                f"{path}:{lines[full_id]}: full_id={full_id} was summed over {row.chosen_tokens} chosen and "
                f"{row.rejected_tokens} rejected tokens, but has {tokens[0]} and {tokens[1]} here; use the same "
                f"tokenizer, chat template, training.max_tokens and max_prompt_tokens, or drop inputs.reference_logps"
            )
        sums[:, number] = row.reference_chosen_logps, row.reference_rejected_logps
    return sums


def _pair_sums(where: str, cells: Sequence[str]) -> PairSums:
    """One row, checked. cells: in the order of the fields."""
    counts = []
    for name, cell in zip(PairSums._fields[4:], cells[4:], strict=True):
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", cell):
            raise DataError(
                f"{where}: {name}={cell!r} is not a whole number of at least 1; give the number of tokens summed"
            )
        counts.append(int(cell))
    sums = []
    for name, cell, tokens in zip(PairSums._fields[2:4], cells[2:4], counts, strict=True):
        number = _float(cell)
        if not (math.isfinite(number) and number <= MAX_LOGP * tokens):
            raise DataError(
                f"{where}: {name}={cell!r} is not a finite number of at most 0; give the summed log-probability in nats"
            )
        sums.append(number)
    if not cells[0]:
        raise DataError(f"{where}: full_id is empty; give every pair a name")
    return PairSums(cells[0], cells[1], *cast(tuple[float, float], tuple(sums)), *cast(tuple[int, int], tuple(counts)))


def _float(text: str) -> float:
    """NaN where the text is no decimal number; Python alone would take `1_0`."""
    try:
        return float("nan" if "_" in text else text)
    except ValueError:
        return math.nan
