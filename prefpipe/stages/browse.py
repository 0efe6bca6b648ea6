"""artifacts → a page each to look through their rows: one HTML file, nothing fetched, model text inert."""

import hashlib
import heapq
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prefpipe import artifacts
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.grouping import ID, grouped
from prefpipe.records import RECORDS, Completion, Demonstration, Pair, Prompt
from prefpipe.report.browser import Cutter, Source, group_items, items, write_page
from prefpipe.settings import BrowseConfig

log = logging.getLogger(__name__)

UNITS: dict[type[Any], str] = {Prompt: "prompts", Pair: "pairs", Demonstration: "demonstrations"}


def browse(found: Mapping[str, Path], out: Path, *, settings: BrowseConfig, seed: int) -> Iterator[Path]:
    """Write a page for each artifact into the folder `out`; yields each file when it is there.

    found: title, which names the file → artifact of prompts, completions, scored, pairs or demonstrations.
    seed: of the sample where an artifact has more than settings.max_rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    for title, path in found.items():
        page = out / f"{title}.html"
        temporary = page.with_name(f"{page.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                num = _write(file, title, path, settings, seed)
            temporary.rename(page)
        finally:
            temporary.unlink(missing_ok=True)
        log.info("%s: %d cards, %d kB", page, num, page.stat().st_size // 1000)
        yield page


def _write(file: BinaryIO, title: str, path: Path, settings: BrowseConfig, seed: int) -> int:
    manifest = artifacts.manifest(path)
    record: type[Any] | None = RECORDS.get(manifest["schema"])
    if record is None or not issubclass(record, Prompt | Completion | Pair | Demonstration):
        raise ArtifactError(
            f"{path} holds {manifest['schema']}, and stage=browse shows rows of prompts, completions, scored, pairs or "
            f"demonstrations; stage=report shows the rest"
        )
    cut = Cutter(settings.max_characters)
    notes: list[str] = []
    kept = _sample(path, manifest, settings.max_rows, seed, notes)
    grouping = issubclass(record, Completion)
    source = Source(
        title,
        path,
        manifest["schema"],
        artifacts.digest(path),
        "pair" if record is Pair else "other",
        "prompts" if grouping else UNITS[record],
        notes,
    )
    if not grouping:
        rows: Iterator[Any] = enumerate(artifacts.read(path, record, key="browse"))
        chosen = ((number, row) for number, row in rows if kept is None or row.prompt_id in kept)
        return write_page(file, source, items(chosen, cut), cut, settings)
    groups = grouped([path], Completion, key="browse")
    shown = (group for group in groups if kept is None or group[0].prompt_id in kept)
    return write_page(file, source, group_items(shown, cut), cut, settings)


def _sample(path: Path, manifest: Mapping[str, Any], max_rows: int, seed: int, notes: list[str]) -> set[str] | None:
    """Ids of prompts whose rows are at most max_rows together, drawn by a hash with `seed`; None where all fit.

    Whole prompts, so that completions which belong together stay so. Memory: a number for each prompt that is kept.
    """
    total = int(manifest["num_records"])
    if total <= max_rows:
        return None
    counts: Counter[str] = Counter()
    heap: list[tuple[int, str]] = []
    bound, size = 2**64, 0
    for line in artifacts.read_rows(path, manifest["schema"], key="browse", verified=False):
        prompt = line[ID].decode()
        rank = int.from_bytes(hashlib.sha256(f"{seed}/{prompt}".encode()).digest()[:8], "big")
        if rank >= bound:  # it went before, or would go at once
            continue
        if prompt not in counts:
            heapq.heappush(heap, (-rank, prompt))
        counts[prompt] += 1
        size += 1
        while size > max_rows:
            highest, gone = heapq.heappop(heap)
            bound, size = -highest, size - counts.pop(gone)
    if not counts:
        raise ConfigError(f"browse.max_rows={max_rows} is less than one prompt of {path} has rows; raise it")
    notes.append(
        f"A sample: {size:,} of {total:,} rows, all those of {len(counts):,} prompts drawn with seed {seed} "
        f"(browse.max_rows={max_rows}). Ranges, order and search are over the sample."
    )
    return set(counts)
