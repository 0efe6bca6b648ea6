"""completions → scored completions. Scoring twice adds a score."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import DataError
from prefpipe.files import chunks
from prefpipe.grouping import completions as read_completions
from prefpipe.grouping import grouped
from prefpipe.records import Completion, ScoredCompletion, with_scores
from prefpipe.scorers import Missing, Score, Scorer, ScoringContext


def score(
    completions: Sequence[Path], out: Path, *, scorer: Scorer, context: ScoringContext, overwrite: bool = False
) -> None:
    """Give every completion the scorer's numbers. A missing one is treated as scorer.on_missing says, never as a zero.

    Args:
        completions: artifacts of completions, or of scored completions, which keep the scores they have.
        context: what the scorer may need; its work folder is set here.
    """
    uses = {"scorer": scorer, **scorer.identity(context)}
    plan = Plan("score", ScoredCompletion.schema, uses=uses, parents={"completions": completions})
    with artifacts.draft(out, plan, overwrite=overwrite) as draft:
        if draft.is_current:
            return
        work = draft.scratch / "scorer"
        work.mkdir(exist_ok=True)
        context = replace(context, work=work)
        for index, chunk in enumerate(_parts(completions, scorer)):
            if draft.has(index):
                continue
            scored, left_out, kept = [], Counter[str](), Counter[str]()
            context = replace(context, counts=Counter())
            for completion, value in zip(chunk, scorer.score(chunk, context), strict=True):
                if not isinstance(value, Missing):
                    scored.append(with_score(completion, scorer.name, value))
                elif scorer.on_missing == "refuse":
                    raise DataError(
                        f"completion {completion.completion_id} has no score of scorer={scorer.name} "
                        f"({value.reason}); use scorer.on_missing=leave_out or keep"
                    )
                elif scorer.on_missing == "keep":
                    scored.append(with_score(completion, scorer.name, {}))
                    kept[value.reason] += 1
                else:
                    left_out[value.reason] += 1
            draft.commit(
                index,
                scored,
                rows_in=len(chunk),
                rows_out=len(scored),
                filtered=left_out,
                kept=kept,
                measured=context.counts,
            )
        if draft.measured:
            draft.extra["report"] = scorer.report(draft.measured)


def with_score(completion: Completion, name: str, value: Score) -> ScoredCompletion:
    """The completion with one more score, or with several named "<name>.<key>"."""
    if isinstance(value, float | int):
        new = {name: float(value)}
    else:
        new = {f"{name}.{key}": number for key, number in value.items()}
    return with_scores(completion, new)


def _parts(paths: Sequence[Path], scorer: Scorer) -> Iterator[list[Completion]]:
    if scorer.whole_prompts:
        groups = grouped(paths, Completion, key="inputs.completions")
        for part in chunks(groups, scorer.rows_per_part):
            yield list(itertools.chain.from_iterable(part))
        return
    rows = itertools.chain.from_iterable(read_completions(p, Completion, key="inputs.completions") for p in paths)
    yield from chunks(rows, scorer.rows_per_part)
