"""Evaluation tasks against values by hand, with a policy that answers what it is told."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from itertools import combinations
from math import comb

import pytest

from prefpipe.components import COMPONENTS
from prefpipe.equivalence import answers
from prefpipe.equivalence.answers import WITHOUT_ANSWER, Exact
from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Completion, Pair, Prompt, prompt_id
from prefpipe.tasks.accuracy import Accuracy
from prefpipe.tasks.maj_at_k import MajAtK
from prefpipe.tasks.pair_accuracy import PairAccuracy
from prefpipe.tasks.pass_at_k import PassAtK, pass_at_k
from prefpipe.tasks.reward_accuracy import RewardAccuracy


@dataclass
class Scripted:
    """A policy whose answers are given: prompt number → texts; pair number → log-probabilities."""

    texts: list[list[str]] = field(default_factory=list)
    logps: list[tuple[float, int, float, int]] = field(default_factory=list)
    rewards: list[tuple[float, float] | None] = field(default_factory=list)

    def sample(
        self, prompts: Iterable[Prompt], *, num_samples: int, temperature: float, max_new_tokens: int | None = None
    ) -> list[Completion]:
        return [
            Completion(
                prompt_id=p.prompt_id,
                completion_id=f"{i}-{j}",
                messages=p.messages,
                source="t",
                text=self.texts[i][j],
                answer=p.answer,
            )
            for i, p in enumerate(prompts)
            for j in range(num_samples)
        ]

    def pair_logps(self, pairs: list[Pair]) -> list[tuple[float, int, float, int]]:
        return self.logps

    def pair_rewards(self, pairs: list[Pair]) -> list[tuple[float, float] | None]:
        return self.rewards


def problems(*answers: str | None) -> list[Prompt]:
    rows = []
    for i, answer in enumerate(answers):
        messages = [{"role": "user", "content": f"q{i}"}]
        rows.append(Prompt(prompt_id=prompt_id(messages), messages=messages, source="t", answer=answer))
    return rows


def test_accuracy_counts_right_answers_and_missing_ones():
    policy = Scripted([["#### 1"], ["#### 9"], ["no idea"], ["#### 4.0"]])
    (accuracy, missing), samples = Accuracy().evaluate(policy, problems("#### 1", "2", "3", "4"), [])
    assert [sample.scores for sample in samples] == [{"correct": value} for value in (1.0, 0.0, 0.0, 1.0)]
    assert (accuracy.metric, accuracy.value, accuracy.n) == ("accuracy", 0.5, 4)
    assert (missing.metric, missing.value) == ("no_answer", 0.25)
    assert accuracy.low < 0.5 < accuracy.high
    assert len(samples) == 4


def test_prompts_without_a_reference_number_are_not_counted():
    (accuracy, _), _ = Accuracy().evaluate(Scripted([["#### 1"]]), problems(None, "#### 1", "blue")[1:2], [])
    assert accuracy.n == 1
    with pytest.raises(DataError, match="task=accuracy needs held-out prompts with a reference number"):
        Accuracy().evaluate(Scripted(), problems(None, "blue"), [])


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, right, k) == pytest.approx(share)


def test_pass_at_k_worked_numbers():
    """5 samples, 3 wrong: pass@3 = 1 - C(3,3)/C(5,3) = 0.9; all wrong: 0."""
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert pass_at_k(5, 0, 3) == 0.0
    assert 1 - comb(3, 3) / comb(5, 3) == pytest.approx(0.9)


def test_pass_at_k_over_problems():
    policy = Scripted([["#### 1", "#### 0"], ["x", "y"]])
    results, _ = PassAtK(k=[1, 2], num_samples=2).evaluate(policy, problems("1", "2"), [])
    assert [(r.metric, r.value) for r in results] == [("pass@1", 0.25), ("pass@2", 0.5)]


@pytest.mark.parametrize(
    ("texts", "winner"),
    [
        (["#### 1", "#### 2", "#### 2.0"], 1),
        (["#### 2", "#### 1", "#### 1", "#### 2"], 0),
        (["x", "x", "#### 1"], 2),
        (["x", "x"], WITHOUT_ANSWER),
    ],
)
def test_the_majority_is_of_numbers_and_the_first_of_equals(texts, winner):
    completions = Scripted([texts]).sample(problems("1"), num_samples=len(texts), temperature=1.0)
    assert Exact("last_hash").majorities([completions]) == [winner]


def test_maj_at_k_votes_over_numbers_not_strings():
    policy = Scripted([["#### 1,000", "#### 1000.0", "#### 5", "#### 5", "#### 1000"], ["x", "x", "x", "x", "#### 3"]])
    (result,), _ = MajAtK(k=5).evaluate(policy, problems("1000", "2"), [])
    assert (result.metric, result.value, result.details["tie"]) == ("maj@5", 0.5, "first seen")


def test_nobody_answering_is_wrong_not_right():
    (result,), _ = MajAtK(k=2).evaluate(Scripted([["x", "y"]]), problems("1"), [])
    assert result.value == 0.0


def test_pair_accuracy_by_sum_and_by_mean_and_half_for_equals():
    """(-10 of 10 tokens, -4 of 2): the sum prefers rejected, the mean chosen."""
    rows = [
        Pair(prompt_id="p", messages=[], source="t", chosen="a", rejected="b"),
        Pair(prompt_id="q", messages=[], source="t", chosen="a", rejected="b"),
    ]
    policy = Scripted(logps=[(-10.0, 10, -4.0, 2), (-3.0, 3, -3.0, 3)])
    (by_sum, by_mean), _ = PairAccuracy().evaluate(policy, [], rows)
    assert (by_sum.value, by_mean.value) == (0.25, 0.75)
    with pytest.raises(DataError, match="task=pair_accuracy needs held-out pairs"):
        PairAccuracy().evaluate(policy, [], [])


@pytest.mark.parametrize(
    ("cls", "knobs", "key"),
    [
        (PassAtK, {"k": [9], "num_samples": 8}, r"task\.pass_at_k\.k="),
        (PassAtK, {"temperature": 0.0}, r"task\.pass_at_k\.temperature="),
        (MajAtK, {"k": 0}, r"task\.maj_at_k\.k="),
        (Accuracy, {"rule": "x"}, r"task\.accuracy\.rule=x"),
        (Accuracy, {"equivalence": "x"}, r"task\.accuracy\.equivalence=x must be one of exact, math_verify"),
        (
            Accuracy,
            {"equivalence": "math_verify", "rule": "last_hash"},
            r"task\.accuracy\.rule=last_hash must be one of",
        ),
        (Accuracy, {"timeout_seconds": 1.0}, r"task\.accuracy\.timeout_seconds=1\.0 would be ignored"),
        (
            PassAtK,
            {"equivalence": "math_verify", "timeout_seconds": 0.0},
            r"task\.pass_at_k\.timeout_seconds=0\.0 must be",
        ),
        (MajAtK, {"equivalence": "math_verify", "rule": "stated"}, r"task\.maj_at_k\.rule=stated finds an answer only"),
    ],
)
def test_knobs_are_checked(cls, knobs, key):
    with pytest.raises(ConfigError, match=key):
        cls(**knobs)


def test_reward_accuracy_by_hand_with_shares_by_source_and_by_length():
    """Right, wrong, a tie, and one that its template refuses: 1.5 of 3; source a has 1 of 2, source b 0.5 of 1."""
    texts = [("right answer", "no", "a"), ("x", "longer", "a"), ("same", "size", "b"), ("y", "z", "b")]
    pairs = [Pair(prompt_id="p", messages=[], source=s, chosen=c, rejected=r) for c, r, s in texts]
    policy = Scripted(rewards=[(2.0, -1.0), (0.0, 1.0), (0.5, 0.5), None])
    (result,), samples = RewardAccuracy().evaluate(policy, [], pairs)
    assert (result.metric, result.value, result.n, samples) == ("reward_accuracy", 0.5, 3, [])
    shares = {"chosen_longer": 1.0, "chosen_shorter": 0.0, "source/a": 0.5, "source/b": 0.5}
    assert result.details["accuracy"] == shares
    assert result.details["mean_over_sources"] == 0.5
    assert result.details["mean_margin"] == pytest.approx((3.0 - 1.0 + 0.0) / 3)
    assert result.details["no_reward"] == 1
    with pytest.raises(DataError, match="needs held-out pairs"):
        RewardAccuracy().evaluate(policy, [], [])


def test_every_task_names_the_metrics_that_it_reports():
    """A search is refused by them before anything was measured."""
    policy = Scripted([["#### 1"] * 8], [(-1.0, 1, -2.0, 1)], [(1.0, 0.0)])
    messages = [{"role": "user", "content": "q"}]
    pair = Pair(prompt_id=prompt_id(messages), messages=messages, source="t", chosen="a", rejected="bc")
    for name, cls in COMPONENTS["task"].items():
        task = cls()
        results, _ = task.evaluate(policy, problems("#### 1"), [pair])
        assert [(result.task, result.metric) for result in results] == [(name, metric) for metric in task.metrics()]


def test_without_math_verify_it_is_refused_by_key(monkeypatch):
    """Before anything is sampled: stage=evaluate asks first."""

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(answers, "version", absent)
    key = r"task\.maj_at_k\.equivalence=math_verify needs the package math-verify; pip install 'prefpipe\[eval\]'"
    with pytest.raises(ConfigError, match=key):
        MajAtK(equivalence="math_verify").identity()
    assert MajAtK().identity() == {}


HALVES = [r"\boxed{1/2}", r"\boxed{3}", r"\boxed{0.5}", r"\boxed{3}", r"\boxed{\frac{1}{2}}"]
ENDLESS = r"\boxed{9^{9^{9^{9}}}}"
needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="the extra `eval` is not installed")


@needs_math_verify
def test_accuracy_by_mathematics_and_what_cannot_be_compared_is_neither_right_nor_wrong():
    """Of five problems one comparison takes for ever; of the other four, two are right and one has no box."""
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{x+1}", "#### 3", r"\boxed{5}", ENDLESS]
    task = Accuracy(equivalence="math_verify", timeout_seconds=0.5)
    results, samples = task.evaluate(Scripted([[t] for t in texts]), problems("0.5", "$1+x$", "3", "4", "5"), [])
    assert [(r.metric, r.value, r.n) for r in results] == [
        ("accuracy", 0.5, 4), ("no_answer", 0.25, 4), ("not_compared", 0.2, 5),
    ]  # fmt: skip
    assert results[-1].details == {"time_out": 1}
    assert [sample.scores.get("correct") for sample in samples] == [1.0, 1.0, 0.0, 0.0, None]
    assert samples[-1].meta == {"not_compared": "time_out"}
    with pytest.raises(DataError, match=r"no answer to 1 problems can be compared: \{'time_out': 1\}"):
        task.evaluate(Scripted([[ENDLESS]]), problems("5"), [])


@needs_math_verify
def test_votes_by_mathematics_add_up_over_spellings():
    """1/2, 0.5 and \\frac{1}{2} outvote two 3s; strings would say 3, and last numbers 2."""
    names = [r"\boxed{\text{Bob}}", "no box", r"\boxed{\text{Eve}}", r"\boxed{\text{Eve}}", "none"]
    stuck = [r"\boxed{7}", ENDLESS, r"\boxed{7}", r"\boxed{7}", r"\boxed{7}"]
    policy = Scripted([HALVES, HALVES, names, ["none"] * 5, stuck])
    task = MajAtK(k=5, equivalence="math_verify", timeout_seconds=0.5)
    results, samples = task.evaluate(policy, problems("0.5", "3", r"\text{Eve}", "1", "7"), [])
    assert [(r.metric, r.value, r.n) for r in results] == [("maj@5", 0.5, 4), ("not_compared", 0.2, 5)]
    assert results[1].details == {"time_out": 1}
    assert [sample.scores["correct"] for sample in samples[:10]] == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert [(r.metric, r.value) for r in MajAtK(k=5, rule="last_number").evaluate(policy, problems("0.5"), [])[0]] == [
        ("maj@5", 0.0)
    ]


@needs_math_verify
def test_pass_at_k_by_mathematics_leaves_out_a_problem_with_a_sample_that_cannot_be_compared():
    policy = Scripted([[r"\boxed{\sqrt{12}}", r"\boxed{0}"], [r"\boxed{4}", ENDLESS]])
    task = PassAtK(k=[1, 2], num_samples=2, equivalence="math_verify", timeout_seconds=0.5)
    results, _ = task.evaluate(policy, problems(r"2\sqrt{3}", "4"), [])
    assert [(r.metric, r.value, r.n) for r in results] == [
        ("pass@1", 0.5, 1),
        ("pass@2", 1.0, 1),
        ("not_compared", 0.5, 2),
    ]
    assert task.metrics() == [r.metric for r in results]
