"""Documents shortened to what is cited, by hand and as properties."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe.records import Pair, Prompt, prompt_id
from prefpipe.sources.codes import BadRow
from prefpipe.sources.evidence import EvidenceLimit, Shortened, kept_sentences


def count_words(texts):
    """A word is a token; a tag in front of one is none of its own."""
    return [len(re.sub(r"<C\d+>", " ", text).split()) for text in texts]


def prompt(sentences, answer, *, before=(), tail="Why ?"):
    document = "".join(f"<C{i}>{text} " for i, text in enumerate(sentences))
    messages = [
        *before,
        {"role": "user", "content": f"Read this. [Document Start]\n{document}\n[Document End]\n\n{tail}"},
    ]
    return Prompt(prompt_id=prompt_id(messages), messages=messages, source="t", answer=answer, meta={"kept": 1})


def test_the_farthest_sentences_go_first_by_hand():
    """Distances to 2 and 5 are 2 1 0 1 1 0 1 2; of the farthest, 0 goes before 7."""
    lengths = [1] * 8
    assert kept_sentences(lengths, {2, 5}, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept_sentences(lengths, {2, 5}, 7) == [1, 2, 3, 4, 5, 6, 7]
    assert kept_sentences(lengths, {2, 5}, 6) == [1, 2, 3, 4, 5, 6]
    assert kept_sentences(lengths, {2, 5}, 4) == [2, 4, 5, 6] or kept_sentences(lengths, {2, 5}, 4) == [2, 5, 6, 4]
    assert kept_sentences(lengths, {2, 5}, 0) == [2, 5]
    assert kept_sentences([5, 1, 1, 1], set(), 3) == [1, 2, 3]
    assert kept_sentences([1, 9, 1, 1], {0}, 10) == [0, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.sets(st.integers(0, 29)), st.integers(0, 200))
def test_key_sentences_stay_and_no_more_go_than_must(lengths, keys, budget):
    keys = {key for key in keys if key < len(lengths)}
    kept = kept_sentences(lengths, keys, budget)
    assert kept == sorted(set(kept))
    assert keys <= set(kept)
    total = sum(lengths[place] for place in kept)
    assert total <= budget or set(kept) == keys

    def distance(place):
        return min((abs(place - key) for key in keys), default=float("inf"))

    dropped = sorted(set(range(len(lengths))) - set(kept), key=lambda place: (-distance(place), place))
    if dropped:
        assert total + lengths[dropped[-1]] > budget
        assert all(distance(dropped[-1]) >= distance(place) for place in set(kept) - keys)


def test_a_prompt_is_shortened_numbered_anew_and_left_alone_the_second_time():
    """10 sentences of 4 words, 2 + 2 words before, 4 after: 48. Budget 40 - 10 - 8 = 22 words, five sentences."""
    sentences = [f"this is sentence {i}." for i in range(10)]
    record = prompt(sentences, "<statement>So<cite>[3-4][7-7]</cite></statement><statement>No<cite></cite></statement>")
    counts = Shortened()
    limit = EvidenceLimit(40, 10, count_words)
    (found,) = limit.apply([record], counts)
    content = found.messages[-1]["content"]
    numbers = [int(number) for number in re.findall(r"sentence (\d)", content)]
    assert numbers == [3, 4, 6, 7, 8]
    assert [int(tag) for tag in re.findall(r"<C(\d+)>", content)] == [0, 1, 2, 3, 4]
    assert content.startswith("Read this. [Document Start]\n<C0>this is sentence 3. <C1>")
    assert content.endswith("\n[Document End]\n\nWhy ?")
    assert found.answer == "<statement>So<cite>[0-1][3-3]</cite></statement><statement>No<cite></cite></statement>"
    assert found.prompt_id == prompt_id(found.messages) != record.prompt_id
    assert found.meta == {"kept": 1, "num_sentences": 5, "sentences": [3, 4, 6, 7, 8]}
    assert counts == Shortened(rows=1, sentences_dropped=5)
    assert limit.apply([found], counts) == [found]
    assert counts == Shortened(rows=1, sentences_dropped=5)


def test_what_fits_with_its_answer_stays_as_it_is():
    """12 words of document, 8 around it, an answer of 3 words: 23 is below 24, and not below 23."""
    record = prompt([f"sentence number {i}" for i in range(4)], "two words <cite>[1-1]</cite>")
    assert EvidenceLimit(24, 5, count_words).apply([record], Shortened()) == [record]
    assert EvidenceLimit(23, 5, count_words).apply([record], Shortened()) != [record]


def test_cited_sentences_that_do_not_fit_are_counted_and_stay():
    record = prompt([f"sentence number {i}" for i in range(4)], "<cite>[0-2]</cite>")
    counts = Shortened()
    (found,) = EvidenceLimit(12, 4, count_words).apply([record], counts)
    assert found.meta["sentences"] == [0, 1, 2]
    assert counts == Shortened(rows=1, sentences_dropped=1, over_budget=1)


def test_both_sides_of_a_pair_keep_what_they_cite():
    messages = prompt([f"sentence number {i}" for i in range(9)], None).messages
    pair = Pair(
        prompt_id=prompt_id(messages), messages=messages, source="t", chosen="a<cite>[0-0]</cite>",
        rejected="b<cite>[8-8][40-41]</cite>",
    )  # fmt: skip
    (found,) = EvidenceLimit(15, 1, count_words).apply([pair], Shortened())
    assert found.meta["sentences"] == [0, 8]
    assert (found.chosen, found.rejected) == ("a<cite>[0-0]</cite>", "b<cite>[1-1][40-41]</cite>")


@pytest.mark.parametrize(
    "content",
    ["no document", "[Document Start]\nwithout tags\n[Document End]", "[Document Start]\n<C1>x\n[Document End]"],
)
def test_a_prompt_without_numbered_sentences_is_refused(content):
    record = Prompt(prompt_id="0" * 16, messages=[{"role": "user", "content": content}], source="t")
    with pytest.raises(BadRow, match=r"needs a document of sentences <C0>, <C1>, … in order") as caught:
        EvidenceLimit(10, 1, count_words).apply([record], Shortened())
    assert caught.value.code == "CIT"
