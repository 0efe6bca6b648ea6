"""Reading artifacts: their manifests and their records, checked against each other."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson

from prefpipe.errors import ArtifactError
from prefpipe.files import sha256_of
from prefpipe.records import row_reader

R = TypeVar("R")

BUFFER_BYTES = 2**20
"""Read or written at a time; with Python's 8 KiB, system calls take a tenth of the time of stage=pair."""


def partial_path(out: Path) -> Path:
    """Where an artifact lives until it is published."""
    return out.with_name(f"{out.name}.partial")


def is_complete(path: Path) -> bool:
    """Whether an artifact was published here."""
    return (path / "manifest.json").is_file()


def manifest(path: Path, *, key: str = "") -> dict[str, Any]:
    """The manifest of an artifact. Raises ArtifactError, naming `key`, when there is none or it is damaged."""
    prefix = f"{key}={path}" if key else str(path)
    try:
        data = orjson.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        partial = partial_path(path)
        hint = f"; a half-finished {partial.name} is there: run its stage again" if partial.exists() else ""
        raise ArtifactError(f"{prefix}: no artifact here (no manifest.json){hint}") from None
    except NotADirectoryError:
        raise ArtifactError(
            f"{prefix} is a file, not the folder of an artifact; make one of it with stage=prepare data_mixer=files "
            f"data_mixer.spec='{path}:1.0'"
        ) from None
    except orjson.JSONDecodeError as error:
        raise ArtifactError(
            f"{prefix}/manifest.json is not JSON ({error}); delete the folder, run its stage again"
        ) from None
    if not isinstance(data, dict) or "schema" not in data or "parts" not in data:
        raise ArtifactError(f"{prefix}/manifest.json has no schema and parts; delete the folder, run its stage again")
    return data


def digest(path: Path) -> str:
    """What identifies an artifact's content: sha256 over its schema and the digests of its parts."""
    found = manifest(path)
    content = [found["schema"], [[p["name"], p["sha256"]] for p in found["parts"]]]
    return hashlib.sha256(orjson.dumps(content)).hexdigest()


def read_rows(path: Path, schema: str, *, key: str, verified: bool = True) -> Iterator[bytes]:
    """The raw lines of an artifact, verified part by part against the manifest while streaming.

    Args:
        key: the config key that named it, for error messages.
        verified: False leaves the digests alone, for rows that are read twice.
    Raises:
        ArtifactError: the schema is another one, or a part is missing, cut, or changed.
    """
    found = manifest(path, key=key)
    if found["schema"] != schema:
        raise ArtifactError(
            f"{key}={path} holds {found['schema']}, but {schema} is read here; point {key} at the output of the stage "
            f"that writes {schema}"
        )
    for part in found["parts"]:
        file = path / part["name"]
        seen, rows = hashlib.sha256(), 0
        try:
            with file.open("rb", buffering=BUFFER_BYTES) as lines:
                if not verified:
                    yield from lines
                    continue
                for line in lines:
                    seen.update(line)
                    rows += 1
                    yield line
        except FileNotFoundError:
            raise ArtifactError(f"{file} is missing, but {path}/manifest.json lists it") from None
        if seen.hexdigest() != part["sha256"]:
            raise ArtifactError(
                f"{file} does not match its manifest ({rows} rows, {part['num_records']} expected): it was changed "
                f"after it was published; delete {path} and run stage={found['stage']} again"
            )


def read(path: Path, record: type[R], *, key: str, verified: bool = True) -> Iterator[R]:
    """The records of an artifact, in order, streamed; arguments as of `read_rows`."""
    made = row_reader(record)
    for line in read_rows(path, record.schema, key=key, verified=verified):  # type: ignore[attr-defined]
        yield made(orjson.loads(line))


def verify(path: Path) -> None:
    """Check every listed file against its digest. Raises ArtifactError naming the first that is missing or changed."""
    for part in manifest(path)["parts"]:
        file = path / part["name"]
        if not file.is_file():
            raise ArtifactError(f"{file} is missing, but {path}/manifest.json lists it")
        if sha256_of(file) != part["sha256"]:
            raise ArtifactError(f"{file} does not match {path}/manifest.json: it was changed after it was published")
