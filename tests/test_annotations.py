"""Forced results on tokenizers of every make: what they say, that the text is exact, and what is left to the model."""

import random

import pytest
from tokenizer_makes import MAKES, TEXTS, byte_level, unigram
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefpipe.annotations import FREE, Annotations, Writer
from prefpipe.errors import ConfigError


def tiny(folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["tiny", *MAKES])
def annotations(request, tiny_folder) -> Annotations:
    return Annotations(tiny(tiny_folder) if request.param == "tiny" else MAKES[request.param]())


def write(annotations: Annotations, ids: list[int]) -> tuple[Writer, bool]:
    """What a model writes whose choices are `ids`: forced tokens come in between. Second: were there any at the end?"""
    writer, forced = Writer(annotations), False
    for token in ids:
        following, forced = writer.push(token), False
        while following != FREE:
            following, forced = writer.push(following), True
    return writer, forced


def encode(annotations: Annotations, text: str) -> list[int]:
    return annotations.tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(annotations: Annotations, ids: list[int]) -> str:
    return annotations.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def random_problem(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 10 ** rng.randint(1, 5)), rng.randint(1, 999)
    operator, value = rng.choice([("+", a + b), ("-", a - b), ("*", a * b)])
    return f"{a}{operator}{b}", str(value)


def test_results_are_forced_and_the_text_is_exact(annotations):
    """Every text before the result comes out unchanged, with the right result and the closing mark behind it."""
    opening, closing = annotations.marks
    rng = random.Random(0)
    for _ in range(200):
        expression, value = random_problem(rng)
        space = rng.choice(["", " "])
        before = f"Tom has {opening}{expression}{space}="
        ids = encode(annotations, before)
        writer, forced = write(annotations, ids)
        assert forced
        assert decode(annotations, writer.ids) == f"{before}{space}{value}{closing}"
        assert writer.ids[: len(ids)] == ids
        assert writer.meta(len(writer.ids)) == {"forced": [[len(ids), len(writer.ids)]], "refused": []}


def test_the_text_may_be_split_anyhow(annotations):
    """Tokens need not be those that the tokenizer would choose: here every character is encoded by itself."""
    opening, closing = annotations.marks
    rng = random.Random(1)
    for _ in range(100):
        expression, value = random_problem(rng)
        text = f"{opening}{expression}="
        ids = [annotations.tokenizer.convert_tokens_to_ids(c) for c in text]
        if annotations.tokenizer.unk_token_id in ids or None in ids:
            ids = encode(annotations, text)  # byte fallback: one token for each character anyway
        assert len(ids) >= len(text)
        writer, forced = write(annotations, ids)
        assert forced
        assert decode(annotations, writer.ids).strip() == f"{text}{value}{closing}"


def test_forced_tokens_are_the_tokenizers_own(annotations):
    """Where the whole text has a token boundary behind "=", the ids are those of the whole text."""
    opening, closing = annotations.marks
    rng, compared = random.Random(2), 0
    for _ in range(100):
        expression, value = random_problem(rng)
        before = f"Tom has {opening}{expression}="
        ids, whole = encode(annotations, before), encode(annotations, f"{before}{value}{closing}")
        if whole[: len(ids)] == ids:
            assert write(annotations, ids)[0].ids == whole
            compared += 1
    assert compared > 20


def test_several_annotations_of_one_text(annotations):
    opening, closing = annotations.marks
    pieces = [f"Tom has {opening}12+30=", f" pens, 42*2={opening}42*2=", f". {opening}84/8="]
    writer = Writer(annotations)
    for piece in pieces:
        # A tokenizer that puts a space before every text does so here too: the pieces are the model's own choices.
        for token in encode(annotations, piece):
            following = writer.push(token)
        while following != FREE:
            following = writer.push(following)
    text = decode(annotations, writer.ids)
    assert [f"={value}{closing}" in text for value in ("42", "84", "10.5")] == [True] * 3
    assert len(writer.forced) == 3


def test_what_is_no_annotation_is_left_alone(annotations):
    opening, closing = annotations.marks
    for text in ("Tom has 12+3=", "a = b = c", f"=={opening}", f"{opening}1+2{closing}=", f"{opening}1+2", "===="):
        writer, _ = write(annotations, encode(annotations, text))
        assert decode(annotations, writer.ids) == decode(annotations, encode(annotations, text))
        assert writer.meta(99) == {"forced": [], "refused": []}


@pytest.mark.parametrize(
    ("expression", "code"),
    [
        ("T+5", "syntax"),
        ("9**9", "syntax"),
        ("", "syntax"),
        ("1/0", "division_by_zero"),
        ("9" * 40, "too_large"),
        ("1+" * 150 + "1", "too_long"),
    ],
)
def test_refused_expressions_are_left_to_the_model_and_counted_once(annotations, expression: str, code: str):
    opening, closing = annotations.marks
    text = f"{opening}{expression}=5=5{closing}"
    ids = encode(annotations, text)
    writer, _ = write(annotations, ids)
    assert writer.ids == ids
    assert writer.meta(len(ids)) == {"forced": [], "refused": [code]}


def test_a_token_that_goes_on_behind_the_equals_sign():
    """The start of the right result stays and is completed; another one is the model's own business, and counted."""
    tokenizer = byte_level(use_regex=True)
    tokenizer.add_tokens([AddedToken("=4", normalized=False)])
    annotations = Annotations(tokenizer)
    for expression, forced in (("<<6*7", "2>>"), ("<<6-2", ">>"), ("<<0-4", None), ("<<8-5", None)):
        writer, _ = write(annotations, encode(annotations, f"{expression}=4"))
        assert decode(annotations, writer.ids) == f"{expression}=4{forced or ''}"
        assert writer.refused == ([] if forced else ["fused_token"])


@pytest.mark.parametrize(("behind", "result"), [(" ", "42>>"), ("$", "42>>"), (" $", "42>>")])
def test_a_space_or_a_currency_sign_may_stand_before_the_result(behind: str, result: str):
    """Only where they are one token with the sign of equality; otherwise the result comes first."""
    tokenizer = byte_level(use_regex=True)
    tokenizer.add_tokens([AddedToken(f"={behind}", normalized=False)])
    annotations = Annotations(tokenizer)
    writer, _ = write(annotations, encode(annotations, f"<<12+30={behind}"))
    assert decode(annotations, writer.ids) == f"<<12+30={behind}{result}"


def test_one_token_that_opens_and_asks():
    tokenizer = byte_level(use_regex=True)
    tokenizer.add_tokens([AddedToken("<<1+2=", normalized=False), AddedToken("=<<", normalized=False)])
    annotations = Annotations(tokenizer)
    for text in ("<<1+2=", "3 <<1+2=", "1+2=<<3+0="):
        writer, _ = write(annotations, encode(annotations, text))
        assert decode(annotations, writer.ids) == f"{text}3>>"


def test_a_tokenizer_that_can_write_no_annotation_is_refused():
    with pytest.raises(ConfigError, match=r"generator\.calculator=true.*can write neither"):
        Annotations(unigram([text.replace("<<", "").replace(">>", "") for text in TEXTS]))


def test_spans_end_where_the_completion_was_cut(tiny_folder):
    annotations = Annotations(tiny(tiny_folder))
    writer, _ = write(annotations, encode(annotations, "<<12*12="))
    ((start, end),) = writer.forced
    assert end == len(writer.ids)
    assert writer.meta(end - 2)["forced"] == [[start, end - 2]]
    assert writer.meta(start)["forced"] == []
