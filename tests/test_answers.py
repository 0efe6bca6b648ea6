"""Answer extraction against OpenAI's recorded verdicts, the dataset's own answers, and the rules' odd corners."""

import gzip
from fractions import Fraction

import orjson
import pytest

from prefpipe.answers import RULES, extract, final_answer, gold_answer, normalized
from prefpipe.errors import ConfigError
from prefpipe.records import Completion
from prefpipe.scorers import Missing
from prefpipe.scorers.exact_answer import ExactAnswer
from prefpipe.scorers.label import Label
from prefpipe.scorers.length import Length


@pytest.mark.parametrize("written", ["1,200", "1200", "1200.0", "$1200", "1200."])
def test_spellings_of_one_number_are_one_number(written):
    assert normalized(written) == Fraction(1200)


@pytest.mark.parametrize("written", ["", ".", "1.2.3", "-", "$", "1-2", "abc"])
def test_what_is_no_number_is_none(written):
    assert normalized(written) is None


@pytest.mark.parametrize(
    ("rule", "text", "found"),
    [
        ("last_hash", "#### 3\n#### 4", "4"),
        ("last_hash", "## -1,000.5", "-1,000.5"),
        ("first_hash", "#### 3\n#### 4", "3"),
        ("the_answer_is", "The answer is $1,234. Done", "$1,234"),
        ("last_number", "12 apples and 3.5 pears", "3.5"),
        ("last_hash", "no answer", None),
    ],
)
def test_each_rule_finds_its_match(rule, text, found):
    assert extract(text, rule) == found


def test_a_tenth_is_not_rounded():
    """DPO-ST compares floats within 1e-4; exact fractions need no tolerance."""
    assert final_answer("#### 0.1", "last_hash") == Fraction(1, 10)


def test_a_reference_may_be_a_solution_or_a_number():
    assert gold_answer("2 + 3 = <<2+3=5>>5\n#### 5") == gold_answer(" 5 ") == Fraction(5)
    assert gold_answer("blue") is None


def completion(text: str, answer: str | None = None, **meta: object) -> Completion:
    return Completion(
        prompt_id="p", completion_id="c", messages=[], source="t", text=text, answer=answer, meta=dict(meta)
    )


def test_exact_answer_scores_right_wrong_and_not_at_all(context):
    texts = [
        completion("#### 5", "#### 5"),
        completion("5", "#### 5"),
        completion("#### 5"),
        completion("#### 5", "blue"),
    ]
    assert ExactAnswer().score(texts, context) == [1.0, 0.0, *[Missing("no_exact_answer")] * 2]
    assert ExactAnswer(rule="last_number").score(texts, context)[:2] == [1.0, 1.0]
    with pytest.raises(ConfigError, match=r"scorer\.rule=nosuch must be one of last_hash"):
        ExactAnswer(rule="nosuch")


def test_length_is_minus_the_distance_in_words(context):
    assert Length(target_words=3).score([completion("a b c"), completion("a"), completion("a b c d e")], context) == [
        0,
        -2,
        -2,
    ]


def test_label_compares_as_told(context):
    texts = [completion("It is Blue.", "blue"), completion("red", "blue"), completion("x")]
    assert Label().score(texts, context) == [1.0, 0.0, Missing("no_label")]
    assert Label(match="equal").score(texts, context) == [0.0, 0.0, Missing("no_label")]
    assert Label(match="contains").score([completion("a blueish sky", "blue")], context) == [1.0]
    assert Label(key="gold").score([completion("yes", gold="YES")], context) == [1.0]


def test_every_gsm8k_reference_has_a_number(shared_data):
    for name, count in (("train", 7473), ("test", 1319)):
        with gzip.open(shared_data / "gsm8k" / f"{name}.jsonl.gz") as rows:
            answers = [gold_answer(orjson.loads(row)["answer"]) for row in rows]
        assert len(answers) == count
        assert None not in answers


def test_openais_recorded_verdicts_are_reproduced(shared_data, context):
    """Their solutions end in a line "A: N"; rewritten to "#### N", each of the recorded verdicts comes out."""
    checked = disagreements = 0
    with gzip.open(shared_data / "gsm8k" / "example_model_solutions.first660.jsonl.gz") as rows:
        for row in map(orjson.loads, rows):
            for key, value in row.items():
                if not isinstance(value, dict) or "solution" not in value:
                    continue
                text = value["solution"].replace("\nA: ", "\n#### ")
                (score,) = ExactAnswer().score(
                    [completion(text, row["ground_truth"].replace("\nA: ", "\n#### "))], context
                )
                assert not isinstance(score, Missing), key
                checked += 1
                disagreements += bool(score) != value["is_correct"]
    assert checked == 4 * 660
    assert disagreements == 0


def test_rules_are_four():
    assert set(RULES) == {"last_hash", "first_hash", "the_answer_is", "last_number"}
