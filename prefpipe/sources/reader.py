"""Bytes to rows: files, globs, hub data sets and the built-in problems, streamed, each row with its file and line.

Nothing is skipped but blank lines: what cannot be parsed is a row too, with a BadRow in place of its data.
"""

import csv
import glob
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import orjson

from prefpipe.errors import ConfigError, DataError
from prefpipe.settings import SourceConfig
from prefpipe.sources.arithmetic import arithmetic_problems
from prefpipe.sources.codes import BadRow

MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_FAULT_BYTES = 64 * 1024
HUB, BUILTIN = "hub:", "builtin:"
ARITHMETIC = "builtin:arithmetic"
BOM = b"\xef\xbb\xbf"
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stood in its file.

    file: as given in the config. line: counted from 1; in a JSON array, a Parquet file or a hub data set it is the
        number of the row. raw: the row's own bytes, b"" where it was never text; of a faulty row the first
        MAX_FAULT_BYTES. data: the parsed row, or its fault.
    """

    file: str
    line: int
    raw: bytes
    data: dict[str, object] | BadRow


def read_rows(source: SourceConfig, *, seed: int = 0) -> Iterator[Row]:
    """All rows of a source, at most source.num of them, from the head.

    Raises DataError when a file is missing or damaged as a whole, ConfigError when the path cannot be one.
    """
    return itertools.islice(_all_rows(source, seed), source.num)


def input_files(source: SourceConfig) -> list[Path]:
    """The local files of a source, sorted; none for hub data sets and built-in problems."""
    if source.path.startswith((HUB, BUILTIN)):
        return []
    path = Path(source.path)
    if path.is_dir():
        raise ConfigError(f"source.path={path} is a folder; name its files, e.g. '{path}/*.jsonl'")
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(source.path, recursive=True))]
    if not files:
        raise DataError(f"source.path={source.path}: no such file; a data set of the hub is written {HUB}{source.path}")
    for file in files:
        _format_of(file)
    return files


def _all_rows(source: SourceConfig, seed: int) -> Iterator[Row]:
    if source.path == ARITHMETIC:
        if source.num is None:
            raise ConfigError(f"source.path={ARITHMETIC} has no end; say how many rows with num, e.g. num=1000")
        for number, problem in enumerate(arithmetic_problems(seed), 1):
            yield Row(ARITHMETIC, number, b"", dict(problem))
    elif source.path.startswith(BUILTIN):
        raise ConfigError(f"source.path={source.path}: the only built-in source is {ARITHMETIC}")
    elif source.path.startswith(HUB):
        yield from _hub_rows(source)
    else:
        for file in input_files(source):
            yield from _file_rows(file)


def _file_rows(file: Path) -> Iterator[Row]:
    read = READERS[_format_of(file)]
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield from read(cast(BinaryIO, stream), str(file))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: the gzip file is cut or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None


def _format_of(file: Path) -> str:
    """The file's ending without .gz: which of READERS reads it."""
    ending = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    if ending not in READERS or (ending == ".parquet" and file.suffix == ".gz"):
        raise ConfigError(
            f"source.path={file}: its name must end in {', '.join(READERS)}, or .gz after one of the text ones"
        )
    return ending


def _parsed(file: str, line: int, raw: bytes) -> Row:
    """A row of JSON text."""
    try:
        return Row(file, line, raw, _parse(raw))
    except BadRow as fault:
        return Row(file, line, raw[:MAX_FAULT_BYTES], fault)


def _parse(raw: bytes) -> dict[str, object]:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise BadRow("ENC", f"byte {error.start + 1} of the row, {raw[error.start]:#04x}, is not UTF-8") from None
    if len(raw) > MAX_ROW_BYTES:
        raise _too_big()
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _json_fault(raw, str(error)) from None
    if not isinstance(data, dict):
        raise BadRow("TYP", f"a row must be an object with keys, this is a {type(data).__name__}")
    return data


def _json_fault(raw: bytes, error: str) -> BadRow:
    """Why strict JSON refuses a row: half a surrogate pair and NaN have codes of their own."""
    if "surrogate" in error:
        return BadRow("CTL", f"half a surrogate pair ({error})")
    constants: list[str] = []
    try:
        json.loads(raw, parse_constant=constants.append)
    except (ValueError, RecursionError):
        constants.clear()
    if constants:
        return BadRow("NAN", f"{constants[0]} is no JSON number; write null or leave the row out")
    return BadRow("NAN" if "infinity" in error else "JSN", error)


def _too_big() -> BadRow:
    return BadRow("BIG", f"longer than {MAX_ROW_BYTES // 1024**2} MiB")


# ------------------------------------------------------------------------------------------------ one function a format


def _jsonl_rows(stream: BinaryIO, file: str) -> Iterator[Row]:
    for number in itertools.count(1):
        line = stream.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            _skip_line(stream)
            yield Row(file, number, line[:MAX_FAULT_BYTES], _too_big())
            continue
        raw = line.removeprefix(BOM) if number == 1 else line
        raw = raw.rstrip(b"\r\n")
        if raw.strip():
            yield _parsed(file, number, raw)


def _skip_line(stream: BinaryIO) -> None:
    while rest := stream.readline(MAX_ROW_BYTES):
        if rest.endswith(b"\n"):
            return


def _json_rows(stream: BinaryIO, file: str) -> Iterator[Row]:
    """An array of rows, or JSON lines under the name .json, as many hub data sets have them.

    An array is held in memory as a whole, but parsed element by element, so that a bad one costs only itself.
    """
    start = stream.read(4096)
    while start and not start.removeprefix(BOM).strip():
        start = stream.read(4096)
    if not start.removeprefix(BOM).lstrip().startswith(b"["):
        stream.seek(0)
        yield from _jsonl_rows(stream, file)
        return
    # Bytes that are not UTF-8 survive as surrogates until their own element is encoded again.
    text = (start + stream.read()).decode("utf-8-sig", "surrogateescape")
    for number, element in enumerate(_elements(text, file), 1):
        yield _parsed(file, number, element.encode("utf-8", "surrogateescape"))


def _elements(text: str, file: str) -> Iterator[str]:
    """The texts of an array's elements. Raises DataError where the array itself is broken: what follows is unknown."""
    decoder = json.JSONDecoder(strict=False)

    def after_space(position: int) -> int:
        match = WHITE_SPACE.match(text, position)
        assert match
        return match.end()

    number, position = 0, after_space(text.index("[") + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        number += 1
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(_broken(file, number, str(error))) from None
        yield text[position:end]
        position = after_space(end)
        follows = text[position : position + 1]
        if follows == "]" and after_space(position + 1) == len(text):
            return
        if follows != ",":
            raise DataError(_broken(file, number, f"{follows!r} follows it" if follows else "the file ends there"))
        position = after_space(position + 1)


def _broken(file: str, number: int, why: str) -> str:
    return (
        f"{file}:{number}: the JSON array breaks off at its element {number} ({why}); mend the file, or make it JSONL"
    )


def _csv_rows(stream: BinaryIO, file: str) -> Iterator[Row]:
    """Rows under the names of the first line. Cells are text; nothing is guessed from how they look."""
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""), strict=True)
    header: list[str] | None = None
    while True:
        number = lines.line_num + 1
        try:
            cells = next(lines, None)
        except csv.Error as error:
            fault = _too_big() if "field larger" in str(error) else BadRow("JSN", f"not CSV: {error}")
            yield Row(file, number, b"", fault)
            continue
        if cells is None:
            return
        if header is None:
            header = cells
        elif cells:
            yield _csv_row(file, number, header, cells)


def _csv_row(file: str, number: int, header: list[str], cells: list[str]) -> Row:
    raw = ",".join(cells).encode("utf-8", "surrogateescape")
    if len(cells) != len(header):
        return Row(file, number, raw, BadRow("JSN", f"{len(cells)} cells under a header of {len(header)}"))
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return Row(file, number, raw, BadRow("ENC", f"the byte {raw[error.start]:#04x} is not UTF-8"))
    return Row(file, number, raw, dict(zip(header, cells, strict=True)))


def _parquet_rows(stream: BinaryIO, file: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=256):
            for index in range(batch.num_rows):
                number += 1
                # Row by row: one text that is not UTF-8 would otherwise cost its whole batch.
                try:
                    yield Row(file, number, b"", batch.slice(index, 1).to_pylist()[0])
                except UnicodeDecodeError as error:
                    yield Row(file, number, b"", BadRow("ENC", f"a text is not UTF-8 ({error})"))
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: the Parquet file is damaged after row {number} ({error}); fetch it again") from None


def _hub_rows(source: SourceConfig) -> Iterator[Row]:
    """Rows of a hub data set, streamed by the `datasets` library."""
    import datasets

    name = source.path.removeprefix(HUB)
    try:
        rows = datasets.load_dataset(name, source.subset, split=source.split, revision=source.revision, streaming=True)
        for number, row in enumerate(rows, 1):
            yield Row(source.path, number, b"", row)
    except Exception as error:  # its client raises errors of httpx, of the hub, of the OS and its own; no common base
        raise DataError(
            f"source.path={source.path} (split={source.split}, subset={source.subset}) cannot be read from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Without a network, copy its "
            f"files here and set path to them"
        ) from None


READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
