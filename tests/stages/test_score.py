"""stage=score: scores add up, what has no score is counted, nothing is scored twice after a kill."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import ArtifactError
from prefpipe.records import Completion, Prompt, ScoredCompletion, completion_id, prompt_id
from prefpipe.scorers.exact_answer import ExactAnswer
from prefpipe.scorers.length import Length
from prefpipe.stages.score import ROWS_PER_PART, score


def completion(text: str, *, question: str = "What is 2 + 2?", answer: str | None = "#### 4") -> Completion:
    messages = [{"role": "user", "content": question}]
    prompt = prompt_id(messages)
    return Completion(
        prompt_id=prompt,
        completion_id=completion_id(prompt, text, 0, 0),
        messages=messages,
        source="test",
        answer=answer,
        meta={"level": 1},
        text=text,
        token_ids=[5, 6, 2],
        logp=-1.25,
        finish_reason="stop",
        seed=7,
    )


def write(out: Path, records: Sequence[Any]) -> Path:
    with artifacts.draft(out, Plan("generate", records[0].schema, uses={})) as draft:
        draft.commit(0, records, rows_in=len(records), rows_out=len(records))
    return out


def scored(folder: Path) -> list[ScoredCompletion]:
    return list(artifacts.read(folder, ScoredCompletion, key="k"))


def test_scoring_twice_adds_a_score_and_keeps_the_first(tmp_path):
    given = [completion("2 + 2 = 4\n#### 4"), completion("#### 5"), completion("four")]
    completions = write(tmp_path / "completions", given)
    score([completions], tmp_path / "scored", scorer=ExactAnswer())
    score([tmp_path / "scored"], tmp_path / "both", scorer=Length(target_words=4))
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


def test_scoring_again_with_other_settings_replaces_that_score_only(tmp_path):
    completions = write(tmp_path / "completions", [completion("#### 4")])
    score([completions], tmp_path / "a", scorer=ExactAnswer())
    score([tmp_path / "a"], tmp_path / "b", scorer=Length(target_words=2))
    score([tmp_path / "b"], tmp_path / "c", scorer=Length(target_words=12))
    assert scored(tmp_path / "c")[0].scores == {"exact_answer": 1.0, "length": -10.0}


def test_what_cannot_be_scored_is_left_out_and_counted(tmp_path):
    unanswered = [completion("#### 1", answer=None), completion("#### 2", answer="a poem")]
    completions = write(tmp_path / "completions", [completion("#### 4"), *unanswered, completion("no number")])
    score([completions], tmp_path / "scored", scorer=ExactAnswer())
    assert [row.text for row in scored(tmp_path / "scored")] == ["#### 4", "no number"]
    counts = artifacts.manifest(tmp_path / "scored")["counts"]
    assert counts == {"rows_in": 4, "rows_out": 2, "filtered": {"no_exact_answer": 2}, "quarantined": {}}


def test_several_artifacts_scored_or_not_are_scored_as_one(tmp_path):
    fresh = write(tmp_path / "fresh", [completion("#### 4")])
    score([write(tmp_path / "more", [completion("#### 5")])], tmp_path / "known", scorer=ExactAnswer())
    score([tmp_path / "known", fresh], tmp_path / "all", scorer=Length(target_words=2))
    assert [row.scores for row in scored(tmp_path / "all")] == [{"exact_answer": 0.0, "length": 0.0}, {"length": 0.0}]


def test_other_records_are_refused_by_their_schema(tmp_path):
    messages = [{"role": "user", "content": "q"}]
    prompts = write(tmp_path / "prompts", [Prompt(prompt_id=prompt_id(messages), messages=messages, source="t")])
    with pytest.raises(ArtifactError, match=r"inputs\.completions=.*prompts holds prompt/1; .* completion/1 or scored"):
        score([prompts], tmp_path / "scored", scorer=Length())


@pytest.mark.parametrize("overwrite", [False, True])
def test_scores_are_never_written_onto_the_rows_they_are_read_from(tmp_path, overwrite):
    """It would name a parent that is gone, and the same command again would score once more."""
    out = tmp_path / "scored"
    score([write(tmp_path / "completions", [completion("#### 4")])], out, scorer=ExactAnswer())
    before = artifacts.digest(out)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ArtifactError, match=r"inputs\.completions=.* is also where stage=score writes; .*point=NAME"):
        score([tmp_path / "link"], out, scorer=Length(), overwrite=overwrite)
    assert artifacts.digest(out) == before


@dataclass
class Dies(Length):
    """Length that remembers how much it scored, and dies in one part."""

    seen: ClassVar[list[int]] = []
    dies_at: ClassVar[int | None] = None

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        if len(self.seen) == self.dies_at:
            raise RuntimeError("killed")
        self.seen.append(len(completions))
        return super().score(completions)


def test_a_killed_run_goes_on_after_its_last_part(tmp_path, monkeypatch):
    rows = [completion(f"text {i}") for i in range(2 * ROWS_PER_PART + 1)]
    completions = write(tmp_path / "completions", rows)
    score([completions], tmp_path / "whole", scorer=Length())
    monkeypatch.setattr(Dies, "seen", [])
    monkeypatch.setattr(Dies, "dies_at", 2)
    with pytest.raises(RuntimeError, match="killed"):
        score([completions], tmp_path / "scored", scorer=Dies())
    monkeypatch.setattr(Dies, "dies_at", None)
    score([completions], tmp_path / "scored", scorer=Dies())
    assert Dies.seen == [ROWS_PER_PART, ROWS_PER_PART, 1]
    assert artifacts.digest(tmp_path / "scored") == artifacts.digest(tmp_path / "whole")
