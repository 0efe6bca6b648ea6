"""Every format: three rows as they look in the wild, recognised by their keys, and the records that come out."""

from typing import Any

import pytest

from prefpipe.records import Demonstration, Pair, Prompt, ScoredCompletion
from prefpipe.sources.adapters import ADAPTERS, recognise
from prefpipe.sources.codes import BadRow

Q, A, B = "What is 2 + 2?", "It is 4.", "It is 5."


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def from_(who: str, value: str) -> dict[str, Any]:
    return {"from": who, "value": value}


USER, GOOD, BAD = said("user", Q), said("assistant", A), said("assistant", B)
SYSTEM = said("system", "Be brief.")
EARLIER = [said("user", "Hi"), said("assistant", "Hello!")]

# format → [(row, prompt turns, what was chosen and rejected | text and score | text and answer | answer)]
EXAMPLES: dict[str, list[tuple[dict[str, Any], list[Any], Any]]] = {
    "pair_text": [
        ({"prompt": Q, "chosen": A, "rejected": B}, [USER], [(A, B)]),
        ({"idx": 7, "prompt": Q, "chosen": A, "reject": B}, [USER], [(A, B)]),
        ({"prompt": Q, "chosen": A, "rejected": [B, "3"], "system": "Be brief."}, [SYSTEM, USER], [(A, B), (A, "3")]),
    ],
    "pair_messages": [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], [(A, B)]),
        (
            {"chosen": [SYSTEM, *EARLIER, USER, GOOD], "rejected": [SYSTEM, *EARLIER, USER, BAD]},
            [SYSTEM, *EARLIER, USER],
            [(A, B)],
        ),
        ({"prompt": Q, "chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt_id": "9"}, [USER], [(A, B)]),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [[USER, BAD], [said("bot", "3")]]}, [USER], None),
    ],
    "typed_messages": [
        (
            {
                "chosen_messages": [
                    said("user", [{"type": "text", "text": Q}]),
                    said("assistant", [{"type": "text", "text": "It "}, {"type": "text", "text": "is 4."}]),
                ],
                "rejected_messages": [said("user", Q), said("assistant", [{"type": "text", "text": B}])],
            },
            [USER],
            [(A, B)],
        ),
    ],
    "hh": [
        ({"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "reject": f"\n\nHuman: {Q}\n\nAssistant: {B}"}, [USER], None),
        (
            {
                "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {Q}\n\nAssistant: {A}",
                "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {Q}\n\nAssistant: {B}",
            },
            [*EARLIER, USER],
            [(A, B)],
        ),
        ({"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {A}", "rejected": f" {B}"}, [USER], [(A, B)]),
    ],
    "sharegpt": [
        ({"conversations": [from_("human", Q)], "chosen": from_("gpt", A), "rejected": from_("gpt", B)}, [USER], None),
        (
            {
                "conversations": [from_("system", "Be brief."), from_("human", Q)],
                "chosen": from_("gpt", A),
                "rejected": from_("gpt", B),
            },
            [SYSTEM, USER],
            [(A, B)],
        ),
        (
            {
                "conversations": [from_("human", "Hi"), from_("gpt", "Hello!"), from_("human", Q)],
                "chosen": from_("gpt", A),
                "rejected": [from_("gpt", B), from_("gpt", "3")],
            },
            [*EARLIER, USER],
            [(A, B), (A, "3")],
        ),
    ],
    "alpaca": [
        ({"instruction": Q, "input": "", "chosen": A, "rejected": B}, [USER], [(A, B)]),
        (
            {"instruction": "Add these.", "input": "2 and 2", "output": "4!", "chosen": A, "rejected": B},
            [said("user", "Add these.\n2 and 2")],
            [(A, B)],
        ),
        ({"instruction": Q, "output": A, "rejected": B, "history": [["Hi", "Hello!"]]}, [*EARLIER, USER], [(A, B)]),
    ],
    "alpaca_prompt": [({"instruction": Q, "input": "", "output": A}, [USER], (A, A))],
    "labelled": [
        ({"messages": [USER, GOOD], "label": True}, [USER], [(A, {"label": 1.0})]),
        ({"prompt": Q, "completion": B, "label": False}, [USER], [(B, {"label": 0.0})]),
        ({"prompt": [*EARLIER, USER], "completion": [GOOD], "label": 1}, [*EARLIER, USER], [(A, {"label": 1.0})]),
    ],
    "ratings": [
        (
            {
                "instruction": Q,
                "completions": [
                    {"response": A, "overall_score": 8.5, "model": "a"},
                    {"response": B, "overall_score": 2, "model": "b"},
                ],
            },
            [USER],
            [(A, {"rating": 8.5}), (B, {"rating": 2.0})],
        ),
    ],
    "question_answer": [({"question": Q, "answer": "<<2+2=4>>4\n#### 4"}, [USER], ("<<2+2=4>>4\n#### 4",) * 2)],
    "conversation": [
        ({"messages": [SYSTEM, *EARLIER, USER, GOOD]}, [SYSTEM, *EARLIER, USER], (A, A)),
        (
            {"conversations": [from_("human", "Hi"), from_("gpt", "Hello!"), from_("human", Q), from_("gpt", A)]},
            [*EARLIER, USER],
            (A, A),
        ),
        ({"prompt": Q, "completion": A, "system": "Be brief.", "answer": 4}, [SYSTEM, USER], (A, "4")),
        ({"prompt": [USER], "completion": [GOOD]}, [USER], (A, A)),
    ],
    "prompt": [
        ({"prompt": Q}, [USER], None),
        ({"prompt": [SYSTEM, USER], "answer": 4}, [SYSTEM, USER], "4"),
        ({"prompt": Q, "answer": 12345678901234567}, [USER], "12345678901234567"),
        ({"messages": [*EARLIER, USER]}, [*EARLIER, USER], None),
        ({"prompt": [USER, GOOD]}, [USER], A),
    ],
}  # fmt: skip
CASES = [
    pytest.param(name, *case, id=f"{name}-{i}") for name, cases in EXAMPLES.items() for i, case in enumerate(cases)
]


def test_every_format_has_an_example():
    assert set(EXAMPLES) == set(ADAPTERS)


@pytest.mark.parametrize(("name", "row", "turns", "expected"), CASES)
def test_a_row_is_recognised_and_adapted(name, row, turns, expected):
    assert recognise(row) == name
    records = ADAPTERS[name](row)
    assert len({type(record) for record in records}) == 1
    assert [record.messages for record in records] == [turns] * len(records)
    assert len({record.prompt_id for record in records}) == 1
    first = records[0]
    if isinstance(first, Prompt):
        assert first.answer == expected
    elif isinstance(first, Demonstration):
        assert (first.text, first.answer) == expected
    elif isinstance(first, ScoredCompletion):
        assert [(r.text, r.scores) for r in records] == expected
        assert len({r.completion_id for r in records}) == len(records)
    else:
        found = [(r.chosen, r.rejected) for r in records]
        assert found == (expected or [(A, B), (A, "3")][: len(records)])


def test_scores_of_a_pair_are_kept():
    row = {"prompt": Q, "chosen": A, "rejected": B, "score_chosen": 9, "score_rejected": "2.5", "meta": {"level": 3}}
    (pair,) = ADAPTERS["pair_text"](row)
    assert isinstance(pair, Pair)
    assert (pair.chosen_score, pair.rejected_score, pair.meta) == (9.0, 2.5, {"level": 3})


def test_white_space_is_the_texts_own_but_for_the_separator_of_hh():
    row = {"chosen": "\n\nHuman:  Hi \n\nAssistant:  yes\n", "rejected": "\n\nHuman:  Hi \n\nAssistant:no"}
    (pair,) = ADAPTERS["hh"](row)
    assert isinstance(pair, Pair)
    assert (pair.messages[0]["content"], pair.chosen, pair.rejected) == (" Hi ", " yes\n", "no")


BAD_ROWS = [
    ("pair_text", {"prompt": Q, "choosen": A, "rejected": B}, "KEY", "did you mean 'choosen'? Then set"),
    ("pair_text", {"prompt": Q, "chosen": A, "rejectd": B}, "KEY", "did you mean 'rejectd'"),
    ("pair_text", {"prompt": Q, "chosen": A}, "KEY", "no key 'rejected'; it has 'prompt', 'chosen'"),
    ("pair_text", {"prompt": Q, "chosen": 4, "rejected": B}, "TYP", "chosen is int '4', it must be"),
    ("pair_text", {"prompt": Q, "chosen": A, "rejected": None}, "TYP", "rejected is null"),
    ("pair_text", {"prompt": Q, "chosen": A, "rejected": []}, "EMP", "rejected is an empty list"),
    ("pair_text", {"prompt": " \n", "chosen": A, "rejected": B}, "EMP", "prompt is blank"),
    ("pair_text", {"prompt": Q, "chosen": A, "rejected": A}, "EQL", "chosen and rejected are the same text"),
    ("pair_text", {"prompt": Q, "chosen": A, "rejected": [B, A]}, "EQL", "chosen and rejected[1] are the same"),
    ("pair_text", {"prompt": "a\x00b", "chosen": A, "rejected": B}, "CTL", "prompt holds a NUL"),
    ("pair_text", {"prompt": Q, "chosen": A, "rejected": B, "score_chosen": float("nan")}, "NAN", "_chosen is nan"),
    ("pair_text", {"prompt": Q, "chosen": A, "rejected": B, "chosen_score": "high"}, "TYP", "must be a number"),
    ("pair_messages", {"chosen": [USER, GOOD], "rejected": [said("user", "?"), BAD]}, "PFX", "differ in turn 1"),
    ("pair_messages", {"chosen": [*EARLIER, USER, GOOD], "rejected": [USER, BAD]}, "PFX", "differ in turn 1"),
    ("pair_messages", {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "PFX", "1 turns, that of"),
    ("pair_messages", {"prompt": [USER], "chosen": [said("user", "?"), GOOD], "rejected": [BAD]}, "PFX", "not begin"),
    ("pair_messages", {"chosen": [USER, said("wizard", A)], "rejected": [USER, BAD]}, "ROL", "'wizard' is none of"),
    ("pair_messages", {"chosen": [USER, USER, GOOD], "rejected": [USER, BAD]}, "ROL", "turn 2 of chosen is of user"),
    ("pair_messages", {"chosen": [USER, SYSTEM, GOOD], "rejected": [USER, BAD]}, "ROL", "turn 2 of chosen is of"),
    ("pair_messages", {"chosen": [USER], "rejected": [USER, BAD]}, "ROL", "must end with the assistant's answer"),
    ("pair_messages", {"chosen": [said("user", {"text": Q}), GOOD], "rejected": [USER, BAD]}, "TYP", "chosen[0]"),
    ("pair_messages", {"chosen": [USER, "4"], "rejected": [USER, BAD]}, "TYP", "chosen[1] is str '4'"),
    ("pair_messages", {"chosen": [], "rejected": [USER, BAD]}, "EMP", "chosen has no turns"),
    ("pair_messages", {"chosen": [USER, {"role": "assistant"}], "rejected": [BAD]}, "KEY", "no key 'content'"),
    ("typed_messages", {"chosen_messages": [said("user", [{"type": "image"}])]}, "TYP", "image"),
    ("hh", {"chosen": "Human: Hi", "rejected": "\n\nHuman: Hi\n\nAssistant: a"}, "ROL", "it must begin with"),
    ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "EMP", "turn 2"),
    ("hh", {"chosen": "\n\nHuman: a\n\nHuman: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "ROL", "turn of user"),
    ("sharegpt", {"conversations": [from_("human", Q)], "chosen": from_("human", A), "rejected": A}, "ROL", "chosen"),
    ("labelled", {"messages": [USER, GOOD], "label": "maybe"}, "TYP", "it must be true or false"),
    ("labelled", {"messages": [USER], "label": True}, "ROL", "messages ends with a turn of user"),
    ("ratings", {"instruction": Q, "completions": [{"response": A, "overall_score": "inf"}]}, "NAN", "is inf"),
    ("ratings", {"instruction": Q, "completions": []}, "EMP", "completions is empty"),
    ("question_answer", {"question": Q, "anwser": A}, "KEY", "did you mean 'anwser'"),
    ("conversation", {"messages": [USER, GOOD, USER]}, "ROL", "messages ends with a turn of user"),
    ("conversation", {"conversations": [GOOD, USER, GOOD]}, "ROL", "turn 1 of conversations is of assistant"),
    ("conversation", {"prompt": Q, "completion": " "}, "EMP", "completion is blank"),
    ("prompt", {"prompt": Q, "chosen": A}, "KEY", "a bare prompt has not"),
    ("prompt", {"messages": [GOOD]}, "ROL", "prompt must end with a user turn"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "code", "message"), BAD_ROWS)
def test_a_bad_row_says_what_is_wrong(name, row, code, message):
    with pytest.raises(BadRow) as caught:
        ADAPTERS[name](row)
    assert caught.value.code == code
    assert message in caught.value.message


def test_unknown_keys_are_recognised_as_nothing():
    assert recognise({"foo": 1, "bar": 2}) is None
    assert recognise({"prompt": Q, "chosen": A, "wrong": B}) is None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "choosen": A, "rejected": B},
        {"prompt": Q, "choosen": A, "rejectd": B},
        {"instruction": Q, "output": A, "rejcted": B},
        {"question": Q, "answer": "4", "chosen": A, "rejected": B},
        {"messages": [USER, GOOD], "lable": True},
    ],
)
def test_misspelt_pairs_do_not_pass_for_bare_prompts(row):
    assert recognise(row) is None
