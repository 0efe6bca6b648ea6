"""scorer=math_verify: equal as mathematics or not; what takes too long or too much is killed, counted and never a 0."""

import os
import random
import signal
import threading
import time
from fractions import Fraction

import psutil
import pytest
from completions import completion

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.equivalence import client
from prefpipe.equivalence.client import Comparer, Limits, Question, final_box, reference_answer
from prefpipe.errors import ConfigError
from prefpipe.processes import ChildError
from prefpipe.records import Completion, ScoredCompletion
from prefpipe.scorers import Missing
from prefpipe.scorers.math_verify import MathVerify
from prefpipe.stages.score import score

pytest.importorskip("math_verify", reason="the extra `eval` is not installed")

ENDLESS = r"9^{9^{9^{9}}}"


def boxed(answer: str, reference: str | None = "5") -> Completion:
    return completion(f"It is $\\boxed{{{answer}}}$.", answer=reference)


BY_HAND = [
    (r"\frac{1}{2}", "0.5", 1.0),
    ("1/2", r"\dfrac{2}{4}", 1.0),
    ("Half of it.\n#### 1,234", "1234", 1.0),
    ("1234", r"1\,234", 1.0),
    ("1234", r"1{,}234", 1.0),
    (r"so \boxed{7} or rather $\boxed{2\sqrt{3}}$", r"\sqrt{12}", 1.0),
    ("$x^2-1$", "(x-1)(x+1)", 1.0),
    (r"\(x+1\)", "1+x", 1.0),
    ("x+1", "x+2", 0.0),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)", 1.0),
    ("[1,2)", r"\left[1, 2\right)", 1.0),
    ("[1,2)", "(1,2)", 0.0),
    (r"\{1,2\}", r"\left\{2, 1\right\}", 1.0),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", 1.0),
    (r"\text{Evelyn}", "Evelyn", 1.0),
    (r"\text{Evelyn}", r"\text{Bob}", 0.0),
    ("-5", "5", 0.0),
    ("5", "x=5", 1.0),
    (r"10\%", r"10\%", 1.0),
    (r"10\%", r"20\%", 0.0),
    ("18", r"18\text{ dollars}", 1.0),
    ("5", r"\text{I do not know}", 0.0),
]
"""Reference, answer, score."""


def test_equal_as_mathematics_is_1(context):
    rows = [boxed(answer, reference) for reference, answer, _ in BY_HAND]
    found = MathVerify(num_processes=1).score(rows, context)
    assert list(zip(BY_HAND, found, strict=True)) == [(case, case[2]) for case in BY_HAND]


def test_random_fractions_in_every_spelling(context):
    """Equal exactly where the fractions are; order, repetition and the number of processes change nothing."""
    rng = random.Random(0)

    def spelt(value: Fraction) -> str:
        sign, a, b, k = "-" * (value < 0), abs(value.numerator), value.denominator, rng.randint(2, 9)
        forms = [f"{sign}\\frac{{{a}}}{{{b}}}", f"\\frac{{{sign}{k * a}}}{{{k * b}}}", f"{sign}{a}/{b}"]
        if b in (1, 2, 4, 5, 8):
            forms.append(str(float(value)))
        return rng.choice(forms)

    values = [(Fraction(rng.randint(-6, 6), rng.choice([1, 2, 3, 4, 5])), rng.random() < 0.5) for _ in range(60)]
    pairs = [(gold, gold if same else gold + Fraction(1, rng.randint(1, 9))) for gold, same in values]
    rows = [boxed(spelt(answer), spelt(gold)) for gold, answer in pairs]
    expected = [float(gold == answer) for gold, answer in pairs]
    assert MathVerify(num_processes=2).score(rows, context) == expected
    order = [rng.randrange(len(rows)) for _ in range(80)]
    again = MathVerify(num_processes=1).score([rows[place] for place in order], context)
    assert again == [expected[place] for place in order]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox { 3 }", "3"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed 7$", "7"),
        (r"\boxed{1} and then \boxed{2", None),
        (r"\boxed{}", None),
        (r"\boxedness{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box_holds_the_final_answer(text, box):
    assert final_box(text) == box


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        (r"Thus $\boxed{x}$ holds. #### 5", "x"),
        (r" $\frac{1}{2}$ ", r"\frac{1}{2}"),
        (r"\[ 5 \]", "5"),
        ("$x$ or $y$", "$x$ or $y$"),
        ("$5", "$5"),
        (r"\boxed{5", None),
        (" ", None),
        ("#### ", None),
    ],
)
def test_a_reference_is_a_box_a_last_line_or_all_of_it(text, answer):
    assert reference_answer(text) == answer


def test_the_rule_says_where_the_answer_stands(context):
    texts = ["The answer is 5.", "We see 5.", r"5 or \boxed{7}", "answer: $5$, or 7", "", "Nobody knows."]
    rows = [completion(text, answer="5") for text in texts]
    expected = {
        "boxed": ([0.0] * 6, 5),
        "stated": ([1.0, 0.0, 0.0, 1.0, 0.0, 0.0], 3),
        "anywhere": ([1.0, 1.0, 0.0, 1.0, 0.0, 0.0], 2),
    }
    for rule, (scores, without_answer) in expected.items():
        context.counts.clear()
        assert MathVerify(rule=rule, num_processes=1).score(rows, context) == scores
        assert context.counts == {"without_answer": without_answer}


def test_without_a_readable_reference_there_is_no_score(context):
    """Whatever the completion says: it would be unfair to count only what agrees to the letter."""
    rows = [boxed("5", None), boxed("5", " "), boxed("5", "???"), completion("no box", answer="???")]
    reasons = ["no_answer", "no_answer", "unreadable_reference", "unreadable_reference"]
    assert MathVerify(num_processes=1).score(rows, context) == [Missing(reason) for reason in reasons]


def test_what_takes_for_ever_is_killed_counted_and_the_others_are_scored(tmp_path, context):
    rows = [boxed(answer) for answer in ("5", ENDLESS, "4", f"{ENDLESS}+1", "10/2")]
    given = tmp_path / "completions"
    with artifacts.draft(given, Plan("generate", Completion.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=5, rows_out=5)
    score([given], tmp_path / "scored", scorer=MathVerify(timeout_seconds=0.5, num_processes=1), context=context)
    assert artifacts.manifest(tmp_path / "scored")["counts"]["filtered"] == {"time_out": 2}
    scored = list(artifacts.read(tmp_path / "scored", ScoredCompletion, key="k"))
    assert [row.scores["math_verify"] for row in scored] == [1.0, 0.0, 1.0]
    packages = artifacts.manifest(tmp_path / "scored")["uses"]["packages"]
    assert packages["math-verify"] == "0.9.0"


def test_what_takes_too_much_memory_is_counted_and_the_others_are_scored(context):
    rows = [boxed("5"), boxed("x" * 40_000_000), boxed("10/2")]
    scorer = MathVerify(max_memory_gb=0.1, num_processes=1)
    assert scorer.score(rows, context) == [1.0, Missing("out_of_memory"), 1.0]


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_children_come_back_and_are_gone_at_the_end(monkeypatch):
    """Killed while idle, killed at work, stopped for good: each time another one goes on."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    easy, endless = Question("boxed", "5", "5"), Question("boxed", "5", ENDLESS)
    with Comparer(Limits(60.0, 1.0), num_processes=1) as comparer:
        assert comparer.compare([easy]) == ["equal"]
        (first,) = comparer.pids
        assert "OPENAI_API_KEY" not in psutil.Process(first).environ()
        os.kill(first, signal.SIGKILL)
        wait_for_end(first)
        assert comparer.compare([easy]) == ["equal"]
        (second,) = comparer.pids
        threading.Timer(1.0, os.kill, (second, signal.SIGKILL)).start()
        assert comparer.compare([endless, easy]) == ["out_of_memory", "equal"]
        (third,) = comparer.pids
        monkeypatch.setattr(client, "STALL_SECONDS", 0.5)
        monkeypatch.setattr(client, "STALL_FACTOR", 0.0)
        os.kill(third, signal.SIGSTOP)
        assert comparer.compare([easy]) == ["time_out"]
        monkeypatch.setattr(client, "STALL_SECONDS", 60.0)
        assert comparer.compare([easy]) == ["equal"]
        pids = {first, second, third, *comparer.pids}
    assert len(pids) == 4
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_child_that_cannot_start_says_why():
    started = time.monotonic()
    said = "a process that compares answers ended with exit code 1.*Error"
    with Comparer(Limits(1.0, 0.03), num_processes=1) as comparer, pytest.raises(ChildError, match=said):
        comparer.compare([Question("boxed", "5", "5")])
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "last"}, r"scorer\.rule=last must be one of"),
        ({"timeout_seconds": 0.0}, r"scorer\.timeout_seconds=0\.0 must be above 0"),
        ({"max_memory_gb": -1.0}, r"scorer\.max_memory_gb=-1\.0 must be above 0"),
        ({"num_processes": 0}, r"scorer\.num_processes=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MathVerify(**settings)
