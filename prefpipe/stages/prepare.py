"""sources → prompts, and the pairs, scored completions and demonstrations that came with them."""

import itertools
import logging
import os
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from prefpipe import artifacts
from prefpipe.artifacts import RECORDS_PER_PART, Draft, Plan
from prefpipe.errors import ArtifactError, ConfigError, DataError
from prefpipe.files import sha256_of
from prefpipe.records import Demonstration, Pair, Prompt, ScoredCompletion
from prefpipe.settings import DataMixerConfig
from prefpipe.sources import Quarantined, open_source
from prefpipe.sources.cleaning import Cleaning, clean
from prefpipe.sources.codes import NOT_BAD, BadRow
from prefpipe.sources.evidence import CountTokens, EvidenceLimit, Shortened
from prefpipe.sources.mixer import Ingredient, ingredients, is_heldout, mixed_order
from prefpipe.sources.reader import input_files
from prefpipe.sources.store import RowStore, prompt_number

log = logging.getLogger(__name__)

Companion = Pair | ScoredCompletion | Demonstration
COMPANIONS: dict[str, type[Companion]] = {"pairs": Pair, "scored": ScoredCompletion, "demonstrations": Demonstration}
BAD_ROWS = "prepare.bad_rows.jsonl"
NUM_EXAMPLES = 3


def prepare(
    out_dir: Path,
    *,
    mixer: DataMixerConfig,
    seed: int,
    count_tokens: tuple[str, Callable[[], CountTokens]] | None = None,
    overwrite: bool = False,
) -> None:
    """Read, check, deduplicate, mix and split the sources of a mixture.

    Writes `pairs`, `scored` and `demonstrations` under out_dir where the data has such rows, and last `prompts`: every
    distinct prompt once, whatever kind of row it came in, so that completions can be sampled for preference data too.
    `prompts` is the mark that the stage is done. It also carries the accounting of the input rows and the list of the
    bad ones; the others count the records that they hold. A killed run reads its input again; nothing of it is seen by
    readers.

    Args:
        count_tokens: the tokenizer's name for the manifest, and what makes a counter of it; asked for by sources with
            evidence_tokens.
    Raises:
        ConfigError: the mixture cannot be one. DataError: too many bad rows, listed in out_dir/prepare.bad_rows.jsonl.
    """
    parts = ingredients(mixer)
    uses: dict[str, Any] = {"data_mixer": mixer, "seed": seed, "files": _file_digests(parts)}
    counter: CountTokens | None = None
    if any(part.source.evidence_tokens for part in parts):
        if count_tokens is None:
            raise ConfigError("source.evidence_tokens counts tokens, so stage=prepare needs a tokenizer; choose model=")
        uses["tokenizer"] = count_tokens[0]
    with artifacts.draft(out_dir / "prompts", Plan("prepare", Prompt.schema, uses), overwrite=overwrite) as prompts:
        if prompts.is_current:
            _check_companions(out_dir)
            return
        prompts.notes.clear()  # all parts are written again: they are as good as the reading that made them
        log.info("prepare: %s → %s", ", ".join(f"{part.name} ({part.source.path})" for part in parts), out_dir)
        if count_tokens is not None and "tokenizer" in uses:
            counter = count_tokens[1]()
        with RowStore(prompts.scratch / "rows.jsonl") as store:
            with (prompts.scratch / "bad_rows.jsonl").open("w+b") as bad:
                counts = [_read_source(part, store, bad, mixer=mixer, seed=seed, counter=counter) for part in parts]
                _refuse_bad_rows(counts, bad, out_dir, limit=mixer.max_bad_fraction)
                cleaning = clean(store, mixer)
                kept = _without(store, counts, cleaning, bad)
                bad.seek(0)
                # In memory: no more than max_bad_fraction of the rows, and duplicates, which carry no text.
                quarantined = [orjson.loads(line) for line in bad]
            order = mixed_order(
                {part.name: part.share for part in parts}, {count.name: count.num_good for count in counts}, seed=seed
            )
            _count_used(counts, order)
            order = array("Q", (kept[place] for place in order))
            companions = {}
            for name, kind in COMPANIONS.items():
                plan = Plan("prepare", kind.schema, uses)
                if _write_companion(out_dir / name, plan, store, order, kind, overwrite=overwrite):
                    companions[name] = artifacts.digest(out_dir / name)
            _write_prompts(prompts, store, order, counts, quarantined)
            prompts.extra["unit"] = "rows"
            prompts.extra |= cleaning.report
            prompts.extra["companions"] = companions
            prompts.extra["sources"] = {
                count.name: count.as_data(part) for part, count in zip(parts, counts, strict=True)
            }
            _log_counts(parts, counts, quarantined)


@dataclass
class SourceCounts:
    """Where the rows of one source went. num_prompts: good rows that are bare prompts."""

    name: str
    format: str
    rows_in: int = 0
    num_good: int = 0
    num_prompts: int = 0
    used: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    shortened: Shortened | None = None

    @property
    def num_bad(self) -> int:
        # A duplicate loses nothing and says nothing about the file's health: sources of a mixture overlap as a rule.
        return sum(number for code, number in self.quarantined.items() if code not in NOT_BAD)

    def as_data(self, part: Ingredient) -> dict[str, Any]:
        """For the manifest: rows_in = used + not_selected + sum of quarantined."""
        found: dict[str, Any] = {
            "path": part.source.path,
            "format": self.format,
            "rows_in": self.rows_in,
            "used": self.used,
            "not_selected": self.num_good - self.used,
            "quarantined": dict(sorted(self.quarantined.items())),
            "selection": part.share.described(self.num_good),
        }
        return found if self.shortened is None else found | {"shortened_to_evidence": self.shortened.as_data()}


def _file_digests(parts: Sequence[Ingredient]) -> dict[str, str]:
    """sha256 of every input file, so that a changed one is noticed and named. Hub data is pinned by its revision."""
    return {str(file): sha256_of(file) for part in parts for file in input_files(part.source)}


def _check_companions(out_dir: Path) -> None:
    """That what was written together is still there together."""
    for name, digest in artifacts.manifest(out_dir / "prompts").get("companions", {}).items():
        if not artifacts.is_complete(out_dir / name) or artifacts.digest(out_dir / name) != digest:
            raise ArtifactError(
                f"{out_dir / name} is missing or is not the one that was made with {out_dir / 'prompts'}; "
                f"make both again with stage=prepare overwrite=true"
            )


def _read_source(
    part: Ingredient,
    store: RowStore,
    bad: BinaryIO,
    *,
    mixer: DataMixerConfig,
    seed: int,
    counter: CountTokens | None = None,
) -> SourceCounts:
    """Add the good rows of a source to the store, and its bad ones to the list."""
    format_, rows = open_source(part.name, part.source, seed=seed)
    counts = SourceCounts(part.name, format_)
    limit: EvidenceLimit | None = None
    if counter is not None and part.source.evidence_tokens is not None:
        limit = EvidenceLimit(part.source.evidence_tokens, part.source.evidence_reserved_tokens or 0, counter)
        counts.shortened = Shortened()
    last_said = time.monotonic()
    for row in rows:
        counts.rows_in += 1
        try:
            if isinstance(row, Quarantined) or limit is None or counts.shortened is None:
                records = [] if isinstance(row, Quarantined) else row.records
            else:
                records = limit.apply(row.records, counts.shortened)
        except BadRow as wrong:
            row = Quarantined(part.name, row.file, row.line, wrong.code, f"{row.file}:{row.line}: {wrong.message}")
        if isinstance(row, Quarantined):
            fault = row
        else:
            prompt_id = records[0].prompt_id
            # Before selection: a test set keeps its prompts out of training even where only a part of it is taken.
            held = part.source.heldout
            if held == "all" or (held == "by_hash" and is_heldout(prompt_id, mixer.heldout_fraction)):
                store.heldout.add(prompt_number(prompt_id))
            if held == "all":
                store.evaluation.setdefault(prompt_number(prompt_id), part.name)
            if store.add(records, file=row.file, line=row.line):
                counts.num_good += 1
                counts.num_prompts += isinstance(records[0], Prompt)
                continue
            message = f"{row.file}:{row.line}: the same {_kind(records[0])} came before"
            fault = Quarantined(part.name, row.file, row.line, "DUP", message)
        counts.quarantined[fault.code] += 1
        bad.write(orjson.dumps(fault, option=orjson.OPT_APPEND_NEWLINE))
        if time.monotonic() - last_said > 60:
            last_said = time.monotonic()
            log.info("prepare: %s: %d rows read", part.name, counts.rows_in)
    if not counts.rows_in:
        raise DataError(f"source {part.name}: {part.source.path} has no rows")
    return counts


def _kind(record: Prompt | Companion) -> str:
    return {Prompt: "prompt", Pair: "pair"}.get(type(record), "prompt and completion")


def _refuse_bad_rows(counts: Sequence[SourceCounts], bad: BinaryIO, out_dir: Path, *, limit: float) -> None:
    """Raise DataError over the limit, or when a source has no good row at all; leave the list of bad rows behind."""
    listed = out_dir / BAD_ROWS
    rows_in, num_bad = sum(c.rows_in for c in counts), sum(c.num_bad for c in counts)
    useless = [c.name for c in counts if c.num_bad == c.rows_in]
    for count in counts:
        if count.num_bad > limit * count.rows_in:
            log.warning("prepare: %s: %d of %d rows are bad", count.name, count.num_bad, count.rows_in)
    if num_bad <= limit * rows_in and not useless:
        listed.unlink(missing_ok=True)
        return
    bad.seek(0)
    faults = (fault for line in bad if (fault := orjson.loads(line))["code"] not in NOT_BAD)
    examples = "; ".join(f"{f['code']} {f['message']}" for f, _ in zip(faults, range(NUM_EXAMPLES), strict=False))
    bad.seek(0)
    with listed.open("wb") as file:
        shutil.copyfileobj(bad, file)
    codes = Counter[str]()
    for count in counts:
        codes.update(count.quarantined)
    found = ", ".join(f"{code} {n}" for code, n in sorted(codes.items()) if code not in NOT_BAD)
    if num_bad > limit * rows_in:
        needed = -(-num_bad * 1000 // rows_in) / 1000
        why = f"more than data_mixer.max_bad_fraction={limit} allows"
        remedy = f"mend them, or accept them with data_mixer.max_bad_fraction={needed}"
    else:
        why = f"among them every row of {', '.join(useless)}"
        remedy = "set format or columns for it, or leave it out"
    raise DataError(
        f"{num_bad} of {rows_in} rows are bad ({num_bad / rows_in:.2%}), {why}: {found}. First: {examples}. "
        f"All are listed in {listed}; {remedy}"
    )


def _without(store: RowStore, counts: Sequence[SourceCounts], cleaning: Cleaning, bad: BinaryIO) -> "array[int]":
    """The rows whose prompts stay; the others are counted as quarantined, and added to the list."""
    kept = array("Q")
    bad.seek(0, os.SEEK_END)
    start = 0
    for count in counts:
        end = start + count.num_good
        for row in range(start, end):
            removal = cleaning.prompts.get(store.prompt(row))
            if removal is None:
                kept.append(row)
                continue
            file, line = store.place(row)
            fault = Quarantined(count.name, file, line, removal.code, f"{file}:{line}: {removal.message}")
            bad.write(orjson.dumps(fault, option=orjson.OPT_APPEND_NEWLINE))
            count.quarantined[removal.code] += 1
            count.num_good -= 1
            count.num_prompts -= store.is_prompt(row)
        start = end
    return kept


def _count_used(counts: Sequence[SourceCounts], order: Sequence[int]) -> None:
    """How many rows of each source are in the mixture, each counted once. order: of the rows that stay."""
    chosen = bytearray(sum(count.num_good for count in counts))
    for row in order:
        chosen[row] = 1
    start = 0
    for count in counts:
        count.used = sum(chosen[start : start + count.num_good])
        start += count.num_good


def _write_companion(
    out: Path,
    plan: Plan,
    store: RowStore,
    order: Sequence[int],
    kind: type[Companion],
    *,
    overwrite: bool,
) -> bool:
    """Write one kind of records; False when the mixture has none, and then there is no artifact."""
    total = store.num_records(order, kind)
    if not total:
        _remove_stale(out, overwrite=overwrite)
        return False
    with artifacts.draft(out, plan, overwrite=overwrite) as draft:
        if not draft.is_current:
            draft.notes.clear()
            _commit_parts(draft, store.records(order, kind), total)
    return True


def _remove_stale(out: Path, *, overwrite: bool) -> None:
    if artifacts.is_complete(out):
        if not overwrite:
            raise ArtifactError(
                f"{out} was made with other settings, whose data had {out.name}; set overwrite=true to remove it, or "
                f"another exp_name to keep both"
            )
        shutil.rmtree(out)
    shutil.rmtree(artifacts.partial_path(out), ignore_errors=True)


def _commit_parts(draft: Draft, records: Iterator[Any], total: int) -> None:
    """Write `total` records in parts, streamed."""
    for index, start in enumerate(range(0, total, RECORDS_PER_PART)):
        size = min(RECORDS_PER_PART, total - start)
        draft.commit(index, itertools.islice(records, size), rows_in=size, rows_out=size)


def _write_prompts(
    draft: Draft,
    store: RowStore,
    order: Sequence[int],
    counts: Sequence[SourceCounts],
    quarantined: Sequence[Mapping[str, Any]],
) -> None:
    """Write the distinct prompts. The first part carries the accounting of all input rows."""
    rows = store.prompt_rows(order)
    splits = Counter[str]()
    for index, start in enumerate(range(0, len(rows), RECORDS_PER_PART)):
        chunk = rows[start : start + RECORDS_PER_PART]
        left_out = sum(c.num_good - c.used for c in counts)
        accounting: dict[str, Any] = {"rows_in": 0, "rows_out": 0}
        if index == 0:
            accounting = {
                "rows_in": sum(c.rows_in for c in counts),
                "rows_out": sum(c.used for c in counts),
                "filtered": {"not_selected": left_out} if left_out else {},
                "quarantined": quarantined,
            }
        draft.commit(index, _counted(store.prompts(chunk), splits), **accounting)
    draft.extra["splits"] = dict(sorted(splits.items()))


def _counted(prompts: Iterator[Prompt], splits: Counter[str]) -> Iterator[Prompt]:
    for prompt in prompts:
        splits[prompt.split.value] += 1
        yield prompt


def _log_counts(
    parts: Sequence[Ingredient], counts: Sequence[SourceCounts], quarantined: Sequence[Mapping[str, Any]]
) -> None:
    for part, count in zip(parts, counts, strict=True):
        codes = ", ".join(f"{code} {n}" for code, n in sorted(count.quarantined.items()))
        said = part.share.described(count.num_good)
        log.info(
            "prepare: %s: %d rows as %s; %s; quarantined: %s",
            part.name,
            count.rows_in,
            count.format,
            said,
            codes or "none",
        )
        if count.num_prompts and part.share.weight > 1:
            log.warning("prepare: %s repeats bare prompts; each is written once all the same", part.share.key)
    for fault in [row for row in quarantined if row["code"] not in NOT_BAD][:NUM_EXAMPLES]:
        log.info("prepare: for example %s %s", fault["code"], fault["message"])
