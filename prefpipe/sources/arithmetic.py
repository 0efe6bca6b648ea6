"""Arithmetic word problems in GSM8K's format, made from a seed: data for the demo without a download or a licence.

The vocabulary and the numbers are small on purpose, so that a model of 190,000 weights can learn most of it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

PEOPLE = (
    ("Mia", "she"),
    ("Ben", "he"),
    ("Ana", "she"),
    ("Tom", "he"),
    ("Zoe", "she"),
    ("Sam", "he"),
    ("Eva", "she"),
    ("Leo", "he"),
    ("Ida", "she"),
    ("Max", "he"),
    ("Amy", "she"),
    ("Raj", "he"),
)
THINGS = ("apples", "pens", "cards", "books", "shells", "coins", "stamps", "cookies", "plums", "beads", "eggs", "toys")
HOLDERS = (("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("pack", "packs"))


def arithmetic_problems(seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield rows {"question", "answer"} without end, no question twice.

    Draw i depends on (seed, i) only, and a draw whose question came up before is left out; so the first n rows of a
    seed are the same for every n and on every machine. There are over a hundred million questions; other seeds give
    other draws from the same ones, so two seeds may share a question, but one seed never repeats itself.
    """
    seen = set[str]()
    draw = 0
    while True:
        rng = random.Random(f"{seed}/{draw}")
        draw += 1
        problem = rng.choice(KINDS)(rng, _Scene.draw(rng))
        if problem.question not in seen:
            seen.add(problem.question)
            yield {"question": problem.question, "answer": problem.answer()}


@dataclass(frozen=True)
class _Scene:
    """Who has what: the words of one problem."""

    name: str
    pronoun: str
    friend: str
    things: str
    holder: str
    holders: str

    @classmethod
    def draw(cls, rng: random.Random) -> "_Scene":
        (name, pronoun), (friend, _) = rng.sample(PEOPLE, 2)
        holder, holders = rng.choice(HOLDERS)
        return cls(name, pronoun, friend, rng.choice(THINGS), holder, holders)

    @property
    def subject(self) -> str:
        """The pronoun at the start of a sentence."""
        return self.pronoun.capitalize()


@dataclass
class _Problem:
    """A question and the steps that answer it, each step one line."""

    question: str
    lines: list[str] = field(default_factory=list)
    value: int = 0

    def step(self, says: str, left: int, operator: str, right: int, unit: str) -> int:
        """Append "says 3 * 4 = <<3*4=12>>12 unit." and return the result, a whole number of at least zero."""
        self.value = _calculate(left, operator, right)
        annotation = f"<<{left}{operator}{right}={self.value}>>"
        self.lines.append(f"{says} {left} {operator} {right} = {annotation}{self.value} {unit}.")
        return self.value

    def answer(self) -> str:
        return "\n".join([*self.lines, f"#### {self.value}"])


def _calculate(left: int, operator: str, right: int) -> int:
    match operator:
        case "+":
            return left + right
        case "*":
            return left * right
        case "-" if left >= right:
            return left - right
        case "/" if left % right == 0:
            return left // right
    raise AssertionError(f"{left} {operator} {right} is no whole number of at least zero")


def _buys_and_finds(rng: random.Random, s: _Scene) -> _Problem:
    count, size, more = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 19)
    problem = _Problem(
        f"{s.name} buys {count} {s.holders} of {s.things}. Each {s.holder} holds {size} {s.things}. "
        f"Then {s.pronoun} finds {more} more {s.things}. How many {s.things} does {s.name} have?"
    )
    bought = problem.step(f"{s.name} buys", count, "*", size, s.things)
    problem.step(f"{s.subject} has", bought, "+", more, s.things)
    return problem


def _buys_and_gives(rng: random.Random, s: _Scene) -> _Problem:
    count, size = rng.randint(2, 9), rng.randint(2, 9)
    given = rng.randint(1, min(count * size, 19))
    problem = _Problem(
        f"{s.name} buys {count} {s.holders} of {s.things}. Each {s.holder} holds {size} {s.things}. "
        f"Then {s.pronoun} gives {given} {s.things} to {s.friend}. How many {s.things} does {s.name} have?"
    )
    bought = problem.step(f"{s.name} buys", count, "*", size, s.things)
    problem.step(f"{s.subject} has", bought, "-", given, s.things)
    return problem


def _finds_and_loses(rng: random.Random, s: _Scene) -> _Problem:
    first, more = rng.randint(5, 29), rng.randint(5, 19)
    lost = rng.randint(2, 19)
    problem = _Problem(
        f"{s.name} has {first} {s.things}. In the morning {s.pronoun} finds {more} more. "
        f"In the evening {s.pronoun} loses {min(lost, first + more)}. How many {s.things} does {s.name} have?"
    )
    found = problem.step(f"In the morning {s.pronoun} has", first, "+", more, s.things)
    problem.step(f"In the evening {s.pronoun} has", found, "-", min(lost, first + more), s.things)
    return problem


def _times_as_many(rng: random.Random, s: _Scene) -> _Problem:
    first, times = rng.randint(2, 9), rng.randint(2, 9)
    problem = _Problem(
        f"{s.name} has {first} {s.things}. {s.friend} has {times} times as many. "
        f"How many {s.things} do {s.name} and {s.friend} have together?"
    )
    other = problem.step(f"{s.friend} has", first, "*", times, s.things)
    problem.step("Together they have", other, "+", first, s.things)
    return problem


def _shares(rng: random.Random, s: _Scene) -> _Problem:
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    first = rng.randint(1, count * each - 1)
    problem = _Problem(
        f"{s.name} has {first} {s.things} and finds {count * each - first} more. "
        f"{s.subject} shares them equally among {count} friends. How many {s.things} does each friend get?"
    )
    total = problem.step(f"{s.name} has", first, "+", count * each - first, s.things)
    problem.step("Each friend gets", total, "/", count, s.things)
    return problem


def _pays(rng: random.Random, s: _Scene) -> _Problem:
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    money = count * price + rng.randint(1, 19)
    problem = _Problem(
        f"{s.name} has {money} dollars. {s.subject} buys {count} {s.holders} of {s.things} for {price} dollars each. "
        f"How many dollars does {s.name} have left?"
    )
    paid = problem.step(f"{s.name} pays", count, "*", price, "dollars")
    problem.step(f"{s.subject} has", money, "-", paid, "dollars")
    return problem


def _two_holders(rng: random.Random, s: _Scene) -> _Problem:
    count, size, other_count, other_size = (rng.randint(2, 9) for _ in range(4))
    problem = _Problem(
        f"{s.name} has {count} {s.holders} of {size} {s.things} each. "
        f"{s.friend} has {other_count} {s.holders} of {other_size} {s.things} each. "
        f"How many {s.things} do {s.name} and {s.friend} have together?"
    )
    mine = problem.step(f"{s.name} has", count, "*", size, s.things)
    other = problem.step(f"{s.friend} has", other_count, "*", other_size, s.things)
    problem.step("Together they have", mine, "+", other, s.things)
    return problem


def _buys_finds_and_gives(rng: random.Random, s: _Scene) -> _Problem:
    count, size, more = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 19)
    given = rng.randint(1, min(count * size, 19))
    problem = _Problem(
        f"{s.name} buys {count} {s.holders} of {s.things}. Each {s.holder} holds {size} {s.things}. "
        f"Then {s.pronoun} finds {more} more {s.things} and gives {given} {s.things} to {s.friend}. "
        f"How many {s.things} does {s.name} have?"
    )
    bought = problem.step(f"{s.name} buys", count, "*", size, s.things)
    found = problem.step(f"{s.subject} has", bought, "+", more, s.things)
    problem.step(f"{s.subject} keeps", found, "-", given, s.things)
    return problem


KINDS: tuple[Callable[[random.Random, _Scene], _Problem], ...] = (
    _buys_and_finds,
    _buys_and_gives,
    _finds_and_loses,
    _times_as_many,
    _shares,
    _pays,
    _two_holders,
    _buys_finds_and_gives,
)
