"""sampling=perturbed_context: how many claims go, that the request lacks them, and the pair that comes of it."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest

from prefpipe.errors import ConfigError, DataError
from prefpipe.generators import Generator, Skipped
from prefpipe.generators.hf import HF
from prefpipe.pairers import RoleByThreshold
from prefpipe.records import Completion, Prompt, ScoredCompletion, prompt_id
from prefpipe.sampling.perturbed_context import PerturbedContext, without_claims
from prefpipe.settings import HardwareConfig, ModelConfig

TINY = ModelConfig(name="tiny", path="builtin:tiny")
CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)
Rows = list[Completion | Skipped]


def with_claims(number: int, *, pic_type: str = "full", **other: Any) -> Prompt:
    claims = [f"Tom has {i + 2} apples." for i in range(number)]
    text = "Write of Tom.\n\nClaims:\n" + "".join(f"- {claim}\n" for claim in claims) + "\nResponse:"
    messages = [{"role": "user", "content": text}]
    meta = {"claims": claims, "pic_type": pic_type, "instruction": "Write of Tom."}
    return replace(
        Prompt(prompt_id=prompt_id(messages), messages=messages, source="test", answer="Tom is rich.", meta=meta),
        **other,
    )


@dataclass
class Recorded:
    """What a real generator was asked, and its settings."""

    folder: Path
    asked: list[tuple[Generator, list[Prompt]]] = field(default_factory=list)

    def __call__(self, generator: Generator, prompts: Sequence[Prompt]) -> Iterator[Completion | Skipped]:
        self.asked.append((generator, list(prompts)))
        return generator.generate(prompts, model=TINY, folder=self.folder, hardware=CPU, seed=1, round_=0)


def bare(row: Completion | Skipped) -> Completion | Skipped:
    """Without log-probability, whose last digits depend on the batch."""
    return row if isinstance(row, Skipped) else replace(row, logp=None)


def run(ask: Recorded, prompts: list[Prompt], *, seed: int = 1, **knobs: Any) -> Rows:
    generator = HF(num_samples=2, max_new_tokens=8)
    return list(PerturbedContext(**knobs).sample(prompts, generator, ask, seed=seed, round_=0))


def test_how_many_claims_go_is_as_pic_has_it():
    made = PerturbedContext()
    assert made.num_dropped(10, "full") == (1, 8)
    assert made.num_dropped(10, "partial") == (4, 8)
    assert made.num_dropped(2, "full") == made.num_dropped(2, "partial") == (1, 1)
    assert made.num_dropped(3, "partial") == (1, 2)
    for n in range(2, 400):
        for pic_type, share in (("full", Fraction(1, 10)), ("partial", Fraction(4, 10))):
            most = min(n - 1, floor(n * Fraction(8, 10)))
            assert made.num_dropped(n, pic_type) == (min(most, max(1, floor(n * share))), most), n


def test_the_request_holds_the_reduced_claims_and_the_record_both(tiny_folder):
    kinds = {2: "full", 5: "partial", 9: "full"}
    prompts, ask = [with_claims(n, pic_type=kind) for n, kind in kinds.items()], Recorded(tiny_folder)
    rows = run(ask, prompts)
    ((_, asked),) = ask.asked
    assert [row.prompt_id for row in rows] == [prompt.prompt_id for prompt in prompts for _ in range(3)]
    for prompt, request in zip(prompts, asked, strict=True):
        original, *perturbed = [row for row in rows if row.prompt_id == prompt.prompt_id]
        assert isinstance(original, Completion)
        assert (original.text, original.finish_reason) == ("Tom is rich.", "given")
        assert original.meta == prompt.meta | {"is_perturbed": False}
        claims, text = prompt.meta["claims"], request.messages[-1]["content"]
        kept = [claim for claim in claims if claim in text]
        assert 0 < len(kept) < len(claims)
        assert text == "Write of Tom.\n\nClaims:\n" + "".join(f"- {claim}\n" for claim in kept) + "\nResponse:"
        for row in perturbed:
            assert isinstance(row, Completion)
            assert row.messages == prompt.messages
            assert row.meta["claims"] == claims
            assert row.meta["is_perturbed"] is True
            assert row.meta["perturbed_claims"] == kept
            assert row.meta["perturbed_messages"] == request.messages
            assert [claims[i] for i in row.meta["dropped_claims"]] == [c for c in claims if c not in kept]
    assert len({row.completion_id for row in rows if isinstance(row, Completion)}) == 9


def test_answers_are_those_of_the_reduced_prompts_alone_and_of_no_batch(tiny_folder):
    prompts = [with_claims(n) for n in (3, 6, 9)]
    ask = Recorded(tiny_folder)
    together = run(ask, prompts)
    one_by_one = [row for prompt in prompts for row in run(Recorded(tiny_folder), [prompt])]
    assert [bare(row) for row in one_by_one] == [bare(row) for row in together]
    generator, asked = ask.asked[0]
    alone = [answer for prompt in asked for answer in ask(generator, [prompt])]
    perturbed = [row for row in together if isinstance(row, Completion) and row.meta["is_perturbed"]]
    assert [row.token_ids for row in perturbed] == [row.token_ids for row in alone if isinstance(row, Completion)]
    other = run(Recorded(tiny_folder), prompts, seed=2)
    assert [r.meta.get("dropped_claims") for r in other if isinstance(r, Completion)] != [
        r.meta.get("dropped_claims") for r in together if isinstance(r, Completion)
    ]


def test_every_number_of_dropped_claims_is_as_likely(tiny_folder):
    prompt, sampling = with_claims(10), PerturbedContext()
    drawn = [sampling._reduced(prompt, random.Random(i)).meta["dropped_claims"] for i in range(4000)]
    sizes, which = Counter(map(len, drawn)), Counter(claim for claims in drawn for claim in claims)
    assert set(sizes) == set(range(1, 9))
    assert all(abs(count - 500) < 5 * 500**0.5 for count in sizes.values())
    assert all(abs(count - 1800) < 5 * 1800**0.5 for count in which.values())


def test_an_answer_to_all_claims_may_be_sampled(tiny_folder):
    prompt, ask = with_claims(4, answer=None), Recorded(tiny_folder)
    rows = run(ask, [prompt], original="sampled")
    assert [(generator.num_samples, len(asked)) for generator, asked in ask.asked] == [(2, 1), (1, 1)]
    assert ask.asked[1][1] == [prompt]
    assert [row.meta["is_perturbed"] for row in rows if isinstance(row, Completion)] == [False, True, True]
    with pytest.raises(DataError, match=r"has no answer, and sampling\.original=given takes it"):
        run(ask, [prompt])


def test_prompts_that_cannot_be_perturbed_are_named(tiny_folder):
    ask = Recorded(tiny_folder)
    long = with_claims(3)
    far = [{"role": "user", "content": "far too long " * 4000 + "\n" + long.messages[-1]["content"]}]
    long = replace(long, messages=far, prompt_id=prompt_id(far))
    rows = run(ask, [with_claims(1), long])
    assert rows == [
        Skipped(with_claims(1).prompt_id, "too_few_claims"),
        Skipped(long.prompt_id, "prompt_too_long"),
    ]
    for meta, why in (
        ({"pic_type": "full"}, "has no meta claims"),
        ({"pic_type": "full", "claims": "one"}, "has meta claims='one'"),
        ({"claims": ["a", "b"]}, "has meta pic_type=None"),
        ({"claims": ["Tom has 2 apples.", "b"], "pic_type": "full"}, r"claims\[1\]='b' that is no line"),
    ):
        with pytest.raises(DataError, match=why):
            run(ask, [with_claims(3, meta=meta)])
    with pytest.raises(ConfigError, match=r"sampling\.max_dropped=2"):
        PerturbedContext(max_dropped=2)
    with pytest.raises(ConfigError, match=r"sampling\.original"):
        PerturbedContext(original="none")


@pytest.mark.parametrize(
    ("text", "dropped", "left"),
    [
        ("a b\na\n* a b c\nend", {0}, "a b\n* a b c\nend"),  # a claim that others begin with
        ("a b\n\u2022 a\na b c", {1}, "a b\n\u2022 a\n"),  # the last line
        ("a\na b c  \na", {0, 1}, "a"),  # in order, so the second a is none
    ],
)
def test_only_the_line_of_a_claim_goes(text, dropped, left):
    prompt = with_claims(2, messages=[{"role": "user", "content": text}])
    assert without_claims(prompt, ["a", "a b c"], dropped) == [{"role": "user", "content": left}]


def test_roles_by_threshold_swap_the_claims(tiny_folder):
    rows = run(Recorded(tiny_folder), [with_claims(5)])
    for lead, is_perturbed in ((1.0, False), (-1.0, True)):
        scored = [
            ScoredCompletion(
                **{name: getattr(row, name) for name in Completion.__dataclass_fields__ if name != "schema"},
                scores={"normalized_logprob": 0.0 if row.meta["is_perturbed"] else lead},
            )
            for row in rows
            if isinstance(row, Completion)
        ][:2]
        (made,) = RoleByThreshold().pair(scored, random.Random(0))
        perturbed = scored[1]
        assert not isinstance(made, str)
        assert made.meta["is_perturbed"] is is_perturbed
        assert made.chosen == (perturbed.text if is_perturbed else "Tom is rich.")
        assert made.meta["claims"] == perturbed.meta["perturbed_claims" if is_perturbed else "claims"]
        assert made.messages == (perturbed.meta["perturbed_messages"] if is_perturbed else scored[0].messages)
