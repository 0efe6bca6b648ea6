"""Sources: any file or data set of preferences, row by row, as typed records or as rows that say why they are bad."""

import base64
import dataclasses
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prefpipe.errors import ConfigError, DataError
from prefpipe.settings import SourceConfig
from prefpipe.sources.adapters import ADAPTERS, recognise
from prefpipe.sources.builders import Record
from prefpipe.sources.codes import BadRow, missing_key
from prefpipe.sources.reader import MAX_FAULT_BYTES, Row, read_rows

log = logging.getLogger(__name__)

SAMPLE_ROWS = 20
MAX_UNREADABLE_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Good:
    """A row that could be used: its records, all of one kind and one prompt."""

    file: str
    line: int
    records: list[Record]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that is kept aside. raw: its text, at most 64 KiB of it; base64 when it is not UTF-8 (code ENC)."""

    source: str
    file: str
    line: int
    code: str
    message: str
    raw: str = ""


def open_source(name: str, source: SourceConfig, *, seed: int) -> tuple[str, Iterator[Good | Quarantined]]:
    """The format of a source, declared or recognised, and every row of it.

    Args:
        name: what records carry as `source`. seed: of built-in problems.
    Raises:
        ConfigError: the format or the path cannot be one. DataError: no format fits, or a file is damaged as a whole.
    """
    rows = read_rows(source, seed=seed)
    if source.format != "auto":
        if source.format not in ADAPTERS:
            raise ConfigError(f"source {name}: format={source.format} must be auto or one of {', '.join(ADAPTERS)}")
        return source.format, (_adapted(name, source, source.format, row) for row in rows)
    sample = _sample(name, rows)
    format_ = _recognised(name, source, sample)
    return format_, (_adapted(name, source, format_, row) for row in itertools.chain(sample, rows))


def renamed(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """A row under our names. `columns` is our name → theirs; our name meta.NAME puts the value into the record's meta.

    Raises BadRow when a column is not there.
    """
    found = {key: value for key, value in row.items() if key not in columns.values()}
    meta: dict[str, object] = {}
    for ours, theirs in columns.items():
        if theirs not in row:
            raise missing_key(theirs, row)
        if ours.startswith("meta."):
            meta[ours.removeprefix("meta.")] = row[theirs]
        else:
            found[ours] = row[theirs]
    if meta:
        given = found.get("meta")
        found["meta"] = {**given, **meta} if isinstance(given, Mapping) else meta
    return found


def _adapted(name: str, source: SourceConfig, format_: str, row: Row) -> Good | Quarantined:
    try:
        if isinstance(row.data, BadRow):
            raise row.data
        records = ADAPTERS[format_](renamed(row.data, source.columns))
    except BadRow as fault:
        where = f"{row.file}:{row.line}"
        return Quarantined(name, row.file, row.line, fault.code, f"{where}: {fault.message}", _shown(row))
    return Good(row.file, row.line, [dataclasses.replace(record, source=name) for record in records])


def _shown(row: Row) -> str:
    """The row as it stood, for the quarantine: text where it is text."""
    raw = row.raw
    if not raw and not isinstance(row.data, BadRow):
        raw = json.dumps(row.data, default=str, ensure_ascii=False).encode("utf-8", "backslashreplace")
    raw = raw[:MAX_FAULT_BYTES]
    if isinstance(row.data, BadRow) and row.data.code == "ENC":
        return base64.b64encode(raw).decode()
    return raw.decode("utf-8", "ignore")  # the cut may fall inside a character


def _sample(name: str, rows: Iterator[Row]) -> list[Row]:
    """The first rows, up to SAMPLE_ROWS that could be parsed."""
    sample: list[Row] = []
    num_parsed = 0
    for row in rows:
        sample.append(row)
        num_parsed += not isinstance(row.data, BadRow)
        if num_parsed == SAMPLE_ROWS:
            break
        if num_parsed == 0 and len(sample) == MAX_UNREADABLE_ROWS:
            first = sample[0]
            raise DataError(
                f"source {name}: none of its first {len(sample)} rows can be read; the first is {_said(first)}"
            )
    return sample


def _said(row: Row) -> str:
    fault = f" {row.data.code}: {row.data.message}" if isinstance(row.data, BadRow) else ""
    return f"{row.file}:{row.line}{fault}"


def _recognised(name: str, source: SourceConfig, sample: list[Row]) -> str:
    """The format of most of the sampled rows. Raises DataError when it is that of none."""
    votes = Counter[str]()
    reasons: list[str] = []
    for row in sample:
        if isinstance(row.data, BadRow):
            continue
        try:
            data = renamed(row.data, source.columns)
        except BadRow as fault:
            reasons.append(f"{row.file}:{row.line}: {fault.code}: {fault.message}")
            continue
        if found := recognise(data):
            votes[found] += 1
        else:
            reasons.append(f"{row.file}:{row.line}: {_unknown_format(data)}")
    if votes:
        format_, num = votes.most_common(1)[0]
        log.info("source %s: recognised as %s by %d of its first %d rows", name, format_, num, len(sample))
        if len(votes) > 1:
            log.warning("source %s: its first rows are of several formats: %s", name, ", ".join(sorted(votes)))
        return format_
    if reasons:
        raise DataError(f"source {name}: {reasons[0]}")
    return "unknown"  # every row there is could not be parsed, and will be quarantined as such


def _unknown_format(row: Mapping[str, object]) -> str:
    """What to do about rows whose keys fit no format: the misspelt key, if one is near to what formats need."""
    for key in ("chosen", "rejected", "prompt", "messages", "conversations", "instruction", "question", "answer"):
        fault = missing_key(key, row)
        if key not in row and "did you mean" in fault.message:
            return f"KEY: these rows are of no known format. {fault.message[0].upper()}{fault.message[1:]}"
    keys = ", ".join(repr(str(key)[:40]) for key in list(row)[:12])
    return (
        f"KEY: rows with the keys {keys} are of no known format. Map columns={{prompt: …, chosen: …, rejected: …}}, "
        f"or declare format as one of {', '.join(ADAPTERS)}"
    )
