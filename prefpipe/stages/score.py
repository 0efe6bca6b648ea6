"""completions → scored completions. Scoring twice adds a score."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import ArtifactError
from prefpipe.files import chunks
from prefpipe.records import Completion, ScoredCompletion
from prefpipe.scorers import Scorer

ROWS_PER_PART = 5_000


def score(completions: Sequence[Path], out: Path, *, scorer: Scorer, overwrite: bool = False) -> None:
    """Give every completion the scorer's number. What cannot be scored is left out and counted, never given a zero.

    Args:
        completions: artifacts of completions, or of scored completions, which keep the scores they have.
    """
    plan = Plan("score", ScoredCompletion.schema, uses={"scorer": scorer}, parents={"completions": completions})
    with artifacts.draft(out, plan, overwrite=overwrite) as draft:
        if draft.is_current:
            return
        rows = itertools.chain.from_iterable(_read(path) for path in completions)
        for index, chunk in enumerate(chunks(rows, ROWS_PER_PART)):
            if draft.has(index):
                continue
            scored, left_out = [], Counter[str]()
            for completion, value in zip(chunk, scorer.score(chunk), strict=True):
                if value is None:
                    left_out[f"no_{scorer.name}"] += 1
                else:
                    scored.append(with_score(completion, scorer.name, value))
            draft.commit(index, scored, rows_in=len(chunk), rows_out=len(scored), filtered=left_out)


def with_score(completion: Completion, name: str, value: float) -> ScoredCompletion:
    """The completion with one more score."""
    known = completion.scores if isinstance(completion, ScoredCompletion) else {}
    values = {field.name: getattr(completion, field.name) for field in fields(Completion)}
    return ScoredCompletion(**values, scores={**known, name: value})


def _read(path: Path) -> Iterator[Completion]:
    schema = artifacts.manifest(path, key="inputs.completions")["schema"]
    if schema not in (Completion.schema, ScoredCompletion.schema):
        raise ArtifactError(f"inputs.completions={path} holds {schema}; stage=score reads completion/1 or scored/1")
    record = Completion if schema == Completion.schema else ScoredCompletion
    return artifacts.read(path, record, key="inputs.completions")
