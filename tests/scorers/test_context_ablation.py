"""scorer=context_ablation: SelfCite's reward against single rows, and what counts as a citation."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from completions import completion
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefpipe.documents import tagged_spans
from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Completion
from prefpipe.scorers import Missing
from prefpipe.scorers.context_ablation import ContextAblation

SENTENCES = [f"Tom has {i + 3} apples and {i} pears. " for i in range(11)] + ["Tom has no plums."]
BEFORE, AFTER = "Answer with citations.\n[Document Start]\n", "\n[Document End]\n\nHow many apples?"


def prompt(kept: list[int]) -> str:
    return BEFORE + "".join(f"<C{i}>{SENTENCES[i]}" for i in kept) + AFTER


EVERY = list(range(len(SENTENCES)))
FIRST = "<statement>He has 3 apples.<cite>[0-0]</cite></statement>"


def answer(cite: str) -> Completion:
    text = f"{FIRST}<statement>Then 8 more.<cite>{cite}</cite></statement>"
    return completion(text, prompt(EVERY), meta={"statement": 1})


def mean_logp(folder: Path, kept: list[int], behind: str, statement: str) -> float:
    """One forward pass of one row; tokens that end behind the border belong to the statement."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": prompt(kept)}]
    head = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + behind
    found = tokenizer(head + statement, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [t for t, (_, end) in enumerate(found["offset_mapping"]) if end > len(head)]
    return sum(logps[t - 1, ids[t]].item() for t in places) / len(places)


def by_hand(folder: Path, cited: list[int], behind: str = FIRST, statement: str = "<statement>Then 8 more.") -> dict:
    whole, held = (mean_logp(folder, kept, behind, statement) for kept in (EVERY, cited))
    dropped = mean_logp(folder, [i for i in EVERY if i not in cited], behind, statement)
    return {"drop": whole - dropped, "hold": held - whole, "drop_and_hold": held - dropped}


CITATIONS = {
    "[5-5]": [5],
    "[5-6][2-2]": [2, 5, 6],
    "[3-3][4-4]": [3, 4],
    "[10-40]": [10, 11],
    "[7-6][8-8][20-21]": [8],
    "[0-0][2-2][4-4][6-6]": [0, 2, 4],
    "[0-11]": EVERY,
}
"""Ranges → sentences: beyond the end, backwards, and more than three."""


def test_every_method_gives_what_single_rows_give(context, tiny_folder):
    rows = [answer(cite) for cite in CITATIONS]
    expected = [by_hand(tiny_folder, cited) for cited in CITATIONS.values()]
    everything = ContextAblation(method="all").score(rows, context)
    for found, wanted in zip(everything, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    for method in ("drop", "hold", "drop_and_hold"):
        found = ContextAblation(method=method).score(rows, context)
        assert found == pytest.approx([wanted[method] for wanted in expected], abs=1e-5)
    assert len({round(wanted["drop_and_hold"], 4) for wanted in expected}) == len(rows)


def test_batch_and_order_change_no_score(context):
    rows = [answer(cite) for cite in CITATIONS]
    expected = ContextAblation().score(rows, context)
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    for scorer in (ContextAblation(), ContextAblation(max_batch_tokens=1), ContextAblation(max_batch_tokens=900)):
        found = scorer.score([rows[i] for i in order], context)
        assert found == pytest.approx([expected[i] for i in order], abs=1e-5)
    assert ContextAblation().score(rows[2:3], context) == pytest.approx(expected[2:3], abs=1e-5)


def test_an_answer_has_the_mean_of_its_citing_statements(context, tiny_folder):
    text = f"{FIRST}<statement>No matter.<cite></cite></statement><statement>Then 8 more.<cite>[5-5]</cite></statement>"
    first = by_hand(tiny_folder, [0], "", "<statement>He has 3 apples.")["drop_and_hold"]
    behind = f"{FIRST}<statement>No matter.<cite></cite></statement>"
    last = by_hand(tiny_folder, [5], behind)["drop_and_hold"]
    found = ContextAblation().score([completion(text, prompt(EVERY))], context)
    assert found == pytest.approx([(first + last) / 2], abs=1e-5)


def test_spans_in_meta_stand_for_tags(context):
    """The same sentences, named by their characters."""
    tagged = answer("[5-6]")
    spans = tagged_spans(prompt(EVERY), "[Document End]")
    assert [prompt(EVERY)[a:b] for a, b in spans] == [f"<C{i}>{SENTENCES[i]}" for i in EVERY]
    named = replace(tagged, meta={**tagged.meta, "sentence_spans": [list(span) for span in spans]})
    scorer = ContextAblation(document_end="nowhere")
    assert scorer.score([named], context) == pytest.approx(ContextAblation().score([tagged], context), abs=1e-6)
    assert scorer.score([tagged], context) == [Missing("no_sentences")]
    for wrong, why in (([[5, 3]], "run backwards"), ([[0, 9], [5, 12]], "overlap"), ([[0, 9999]], "9999")):
        with pytest.raises(DataError, match=why):
            scorer.score([replace(tagged, meta={"sentence_spans": wrong})], context)


def test_what_cites_nothing_has_no_score(context):
    rows = [answer(""), answer("[40-41]"), completion("He has 3 apples.", prompt(EVERY)), completion("4")]
    reasons = ["no_citation", "no_citation", "no_citation", "no_sentences"]
    assert ContextAblation().score(rows, context) == [Missing(reason) for reason in reasons]


def test_long_citations_of_several_sentences_lose_1000(context, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    size = len(tokenizer(SENTENCES[5] + SENTENCES[6], add_special_tokens=False)["input_ids"])
    rows = [answer("[5-6]"), answer("[5-5]")]
    free = ContextAblation().score(rows, context)
    assert ContextAblation(max_cited_tokens=size).score(rows, context) == pytest.approx(free, abs=1e-6)
    limited = ContextAblation(max_cited_tokens=1).score(rows, context)
    assert limited == pytest.approx([free[0] - 1000, free[1]], abs=1e-4)
    with pytest.raises(ConfigError, match=r"scorer\.max_cited_tokens=0"):
        ContextAblation(max_cited_tokens=0)


def test_a_prompt_that_is_too_long_has_no_score_and_the_others_do(context):
    long = completion(answer("[5-5]").text, prompt(EVERY).replace("How", "How " * 4000), meta={"statement": 1})
    found = ContextAblation().score([long, answer("[5-5]")], context)
    assert found == [Missing("too_long"), *ContextAblation().score([answer("[5-5]")], context)]
