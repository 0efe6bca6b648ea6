"""stage=score: scores add up, what has no score is counted, nothing is scored twice after a kill."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import completions
import pytest

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import ArtifactError, ConfigError, DataError
from prefpipe.records import Completion, Prompt, ScoredCompletion, prompt_id
from prefpipe.scorers import Missing, Score, ScoringContext
from prefpipe.scorers.exact_answer import ExactAnswer
from prefpipe.scorers.length import Length
from prefpipe.stages.score import score

ROWS_PER_PART = Length.rows_per_part


def completion(text: str, *, question: str = "What is 2 + 2?", answer: str | None = "#### 4") -> Completion:
    sampled = {"token_ids": [5, 6, 2], "logp": -1.25, "finish_reason": "stop", "seed": 7}
    return completions.completion(text, question, answer=answer, meta={"level": 1}, **sampled)


def write(out: Path, records: Sequence[Any]) -> Path:
    with artifacts.draft(out, Plan("generate", records[0].schema, uses={})) as draft:
        draft.commit(0, records, rows_in=len(records), rows_out=len(records))
    return out


def scored(folder: Path) -> list[ScoredCompletion]:
    return list(artifacts.read(folder, ScoredCompletion, key="k"))


def test_scoring_twice_adds_a_score_and_keeps_the_first(tmp_path, context):
    given = [completion("2 + 2 = 4\n#### 4"), completion("#### 5"), completion("four")]
    completions = write(tmp_path / "completions", given)
    score([completions], tmp_path / "scored", scorer=ExactAnswer(), context=context)
    score([tmp_path / "scored"], tmp_path / "both", scorer=Length(target_words=4), context=context)
    assert [row.scores for row in scored(tmp_path / "scored")] == [{"exact_answer": value} for value in (1.0, 0.0, 0.0)]
    assert [row.scores for row in scored(tmp_path / "both")] == [
        {"exact_answer": 1.0, "length": -3.0},  # "2 + 2 = 4 #### 4" has 7 words
        {"exact_answer": 0.0, "length": -2.0},
        {"exact_answer": 0.0, "length": -3.0},
    ]
    for row, before in zip(scored(tmp_path / "both"), given, strict=True):
        assert all(getattr(row, field.name) == getattr(before, field.name) for field in fields(Completion))
    (parent,) = artifacts.manifest(tmp_path / "both")["parents"]["completions"]
    assert parent == {"digest": artifacts.digest(tmp_path / "scored"), "schema": "scored/1"}


def test_scoring_again_with_other_settings_replaces_that_score_only(tmp_path, context):
    completions = write(tmp_path / "completions", [completion("#### 4")])
    score([completions], tmp_path / "a", scorer=ExactAnswer(), context=context)
    score([tmp_path / "a"], tmp_path / "b", scorer=Length(target_words=2), context=context)
    score([tmp_path / "b"], tmp_path / "c", scorer=Length(target_words=12), context=context)
    assert scored(tmp_path / "c")[0].scores == {"exact_answer": 1.0, "length": -10.0}


def test_what_cannot_be_scored_is_left_out_and_counted(tmp_path, context):
    unanswered = [completion("#### 1", answer=None), completion("#### 2", answer="a poem")]
    completions = write(tmp_path / "completions", [completion("#### 4"), *unanswered, completion("no number")])
    score([completions], tmp_path / "scored", scorer=ExactAnswer(), context=context)
    assert [row.text for row in scored(tmp_path / "scored")] == ["#### 4", "no number"]
    counts = artifacts.manifest(tmp_path / "scored")["counts"]
    assert counts == {"rows_in": 4, "rows_out": 2, "filtered": {"no_exact_answer": 2}, "quarantined": {}}


def test_several_artifacts_scored_or_not_are_scored_as_one(tmp_path, context):
    fresh = write(tmp_path / "fresh", [completion("#### 4")])
    score([write(tmp_path / "more", [completion("#### 5")])], tmp_path / "known", scorer=ExactAnswer(), context=context)
    score([tmp_path / "known", fresh], tmp_path / "all", scorer=Length(target_words=2), context=context)
    assert [row.scores for row in scored(tmp_path / "all")] == [{"exact_answer": 0.0, "length": 0.0}, {"length": 0.0}]


def test_other_records_are_refused_by_their_schema(tmp_path, context):
    messages = [{"role": "user", "content": "q"}]
    prompts = write(tmp_path / "prompts", [Prompt(prompt_id=prompt_id(messages), messages=messages, source="t")])
    with pytest.raises(
        ArtifactError, match=r"inputs\.completions=.*prompts holds prompt/1, but completion/1 or scored/1 is read"
    ):
        score([prompts], tmp_path / "scored", scorer=Length(), context=context)


@pytest.mark.parametrize("overwrite", [False, True])
def test_scores_are_never_written_onto_the_rows_they_are_read_from(tmp_path, context, overwrite):
    """It would name a parent that is gone, and the same command again would score once more."""
    out = tmp_path / "scored"
    score([write(tmp_path / "completions", [completion("#### 4")])], out, scorer=ExactAnswer(), context=context)
    before = artifacts.digest(out)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ArtifactError, match=r"inputs\.completions=.* is also where stage=score writes; .*point=NAME"):
        score([tmp_path / "link"], out, scorer=Length(), context=context, overwrite=overwrite)
    assert artifacts.digest(out) == before


@dataclass
class Dies(Length):
    """Length that remembers how much it scored, and dies in one part."""

    seen: ClassVar[list[int]] = []
    dies_at: ClassVar[int | None] = None

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        if len(self.seen) == self.dies_at:
            raise RuntimeError("killed")
        self.seen.append(len(completions))
        return super().score(completions, context)


def test_a_killed_run_goes_on_after_its_last_part(tmp_path, context, monkeypatch):
    rows = [completion(f"text {i}") for i in range(2 * ROWS_PER_PART + 1)]
    completions = write(tmp_path / "completions", rows)
    score([completions], tmp_path / "whole", scorer=Length(), context=context)
    monkeypatch.setattr(Dies, "seen", [])
    monkeypatch.setattr(Dies, "dies_at", 2)
    with pytest.raises(RuntimeError, match="killed"):
        score([completions], tmp_path / "scored", scorer=Dies(), context=context)
    monkeypatch.setattr(Dies, "dies_at", None)
    score([completions], tmp_path / "scored", scorer=Dies(), context=context)
    assert Dies.seen == [ROWS_PER_PART, ROWS_PER_PART, 1]
    assert artifacts.digest(tmp_path / "scored") == artifacts.digest(tmp_path / "whole")


def test_a_row_without_a_score_is_kept_or_refused_when_told(tmp_path, context):
    given = [completion("#### 4"), completion("#### 1", answer=None)]
    completions = write(tmp_path / "completions", given)
    score([completions], tmp_path / "kept", scorer=ExactAnswer(on_missing="keep"), context=context)
    assert [row.scores for row in scored(tmp_path / "kept")] == [{"exact_answer": 1.0}, {}]
    counts = artifacts.manifest(tmp_path / "kept")["counts"]
    assert counts["kept"] == {"no_exact_answer": 1}
    assert (counts["rows_in"], counts["rows_out"]) == (2, 2)
    with pytest.raises(DataError, match=rf"completion {given[1].completion_id} has no score of scorer=exact_answer"):
        score([completions], tmp_path / "refused", scorer=ExactAnswer(on_missing="refuse"), context=context)
    with pytest.raises(ConfigError, match=r"scorer\.on_missing=zero must be leave_out, keep or refuse"):
        ExactAnswer(on_missing="zero")


@dataclass
class Rank(Length):
    """How long a completion is among those of its prompt, and how many there are."""

    whole_prompts: ClassVar[bool] = True
    rows_per_part: ClassVar[int] = 2

    def score(self, completions: Sequence[Completion], context: ScoringContext) -> list[Score | Missing]:
        return [
            {
                "rank": float(
                    sum(other.prompt_id == c.prompt_id and len(other.text) < len(c.text) for other in completions)
                ),
                "of": float(sum(other.prompt_id == c.prompt_id for other in completions)),
            }
            for c in completions
        ]


def test_a_scorer_may_see_all_completions_of_a_prompt_and_give_several_scores(tmp_path, context):
    """The completions of a prompt stand in two artifacts, one of them scored before."""
    questions = [f"Question {i}?" for i in range(5)]
    first = write(tmp_path / "first", [completion("a", question=q) for q in questions])
    score([write(tmp_path / "more", [completion("bbb", question=q) for q in questions])], tmp_path / "second",
          scorer=ExactAnswer(), context=context)  # fmt: skip
    score([first, tmp_path / "second"], tmp_path / "ranked", scorer=Rank(), context=context)
    rows = {(row.messages[0]["content"], row.text): row.scores for row in scored(tmp_path / "ranked")}
    assert len(rows) == 10
    for question in questions:
        assert rows[question, "a"] == {"length.rank": 0.0, "length.of": 2.0}
        assert rows[question, "bbb"] == {"exact_answer": 0.0, "length.rank": 1.0, "length.of": 2.0}
    assert artifacts.manifest(tmp_path / "ranked")["counts"]["rows_in"] == 10
