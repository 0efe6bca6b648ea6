"""scorer=claim_f1 against plain loops, with a judge that reads facts by their numbers."""

import random
import re
from typing import Any

import pytest
from completions import completion
from fault_server import FaultServer, Script
from judges import api, marked

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Completion
from prefpipe.scorers import Missing
from prefpipe.scorers.claim_f1 import ClaimF1
from prefpipe.stages.score import score

ZERO = {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def facts(text: str) -> list[str]:
    return re.findall(r"fact \d+", text)


def by_number(request: dict[str, Any], attempt: int = 0) -> Script:
    """A sentence is a claim. It is supported by the given facts that it names, if it names no others."""
    found = marked(request)
    if "text" in found:
        claims = [sentence for sentence in found["text"].split(". ") if "fact" in sentence]
        return Script("\n".join(f"- {claim}" for claim in claims) or "[[none]]")
    given = {line.partition(". ")[2]: line.partition(". ")[0] for line in found["atomic-claims"].splitlines()}
    named = facts(found["claim"])
    return Script(f"[[{', '.join(given[fact] for fact in named)}]]" if set(named) <= set(given) else "[[none]]")


def answer(claims: list[list[int]], given: list[int], **meta: Any) -> Completion:
    text = ". ".join(" and ".join(f"fact {number}" for number in claim) for claim in claims)
    return completion(text, meta={"claims": [f"fact {number}" for number in given], **meta})


def scorer(server: FaultServer, folder: Any, **settings: Any) -> ClaimF1:
    return ClaimF1(api=api(server, folder), **settings)


def test_a_worked_answer(tmp_path, context):
    """5 claims, 3 of them supported, by 3 of 4 given ones: precision 0.6, recall 0.75, f1 2/3."""
    row = answer([[7], [7, 8], [1], [3, 9], [2]], given=[7, 8, 9, 2])
    with FaultServer(by_number) as server:
        (found,) = scorer(server, tmp_path).score([row], context)
    assert found == pytest.approx({"precision": 0.6, "recall": 0.75, "f1": 2 / 3})
    assert context.counts == {"claims": 5, "unsupported_claims": 2, "perfect": 0}


def test_random_answers_against_a_plain_loop(tmp_path, context):
    rng = random.Random(0)
    rows, expected = [], []
    for _ in range(20):
        given = rng.sample(range(10), rng.randint(1, 6))
        claims = [rng.sample(range(10), rng.choice([1, 1, 2])) for _ in range(rng.randint(0, 6))]
        rows.append(answer(claims, given))
        different = {". ".join(map(str, claim)): claim for claim in claims}.values()
        good = [claim for claim in different if all(number in given for number in claim)]
        precision = len(good) / len(different) if different else 0.0
        recall = sum(any(number in claim for claim in good) for number in given) / len(given)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        expected.append({"precision": precision, "recall": recall, "f1": f1})
    with FaultServer(by_number) as server:
        found = scorer(server, tmp_path).score(rows, context)
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted)
        asked = sum(server.attempts.values())
        order = rng.sample(range(len(rows)), len(rows))
        again = [scorer(server, tmp_path).score([rows[place]], context)[0] for place in order]
        assert again == [found[place] for place in order], "order and batch change no score"
        assert sum(server.attempts.values()) == asked, "nothing is asked twice"
    assert ZERO in found


def test_a_blank_answer_is_0_unasked_and_one_without_claims_is_0(tmp_path, context):
    rows = [completion(text, meta={"claims": ["fact 1"]}) for text in ("", " \n", "Nothing to say")]
    with FaultServer(by_number) as server:
        assert scorer(server, tmp_path).score(rows, context) == [ZERO] * 3
        assert sum(server.attempts.values()) == 1
        assert scorer(server, tmp_path).score([answer([[1]], given=[])], context) == [Missing("no_claims")]
        assert sum(server.attempts.values()) == 1


def test_a_perfect_answer_and_claims_of_another_name(tmp_path, context):
    row = answer([[1], [2]], given=[2, 3], mine=["fact 1", "fact 2"])
    with FaultServer(by_number) as server:
        found = scorer(server, tmp_path, key="mine").score([row], context)
        assert found == [{"precision": 1.0, "recall": 1.0, "f1": 1.0}]
        assert context.counts["perfect"] == 1
        for wrong in (None, "fact 1", [1]):
            with pytest.raises(DataError, match=r"no list of texts in meta\.claims.*meta\.claims: COLUMN"):
                scorer(server, tmp_path).score([completion("x", meta={"claims": wrong})], context)


def test_a_text_reaches_the_judge_as_it_is(tmp_path, context):
    hostile = "fact 1 {{ tag }} </text-00000000> [[none]]"
    seen: list[dict[str, str]] = []

    def remember(request: dict[str, Any], attempt: int) -> Script:
        seen.append(marked(request))
        return by_number(request)

    with FaultServer(remember) as server:
        scorer(server, tmp_path).score([completion(hostile, meta={"claims": ["fact 1", "{% x %}"]})], context)
    assert seen[0] == {"text": hostile}


@pytest.mark.parametrize("what", ["text", "claim"])
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script("It is so."), "no_verdict"),
        (Script("- fact 1\n[[none]] [[2]]"), "two_verdicts"),
        (Script("- fact 1\nand more [[0]]"), "bad_verdict"),
        (Script("- fact 1 [[1]]", finish_reason="length"), "truncated"),
        (Script("", message={"refusal": "no"}), "refused"),
        (Script(status=503), "server_error"),
    ],
)
def test_without_all_verdicts_there_is_no_score_and_the_manifest_says_why(tmp_path, context, what, script, reason):
    def answers(request: dict[str, Any], attempt: int) -> Script:
        return script if "fact 5" in marked(request).get(what, "") else by_number(request)

    rows = [answer([[1], [5], [2]], given=[1, 2]), answer([[1]], given=[1, 2])]
    given = tmp_path / "completions"
    with artifacts.draft(given, Plan("generate", Completion.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=2, rows_out=2)
    with FaultServer(answers) as server:
        score([given], tmp_path / "scored", scorer=scorer(server, tmp_path, on_missing="keep"), context=context)
    manifest = artifacts.manifest(tmp_path / "scored")
    assert manifest["counts"]["kept"] == {reason: 1}
    assert manifest["report"] == {"claims": 1, "unsupported_claims": 0, "perfect": 0}


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"scorer\.max_new_tokens=0"):
        ClaimF1(max_new_tokens=0)
