"""Truncation, order and batches: no completion is emptied, no pair is lost or doubled."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import models
from prefpipe.errors import ConfigError, DataError
from prefpipe.prompts import ChatTemplate
from prefpipe.records import Pair, Split, prompt_id
from prefpipe.settings import ModelConfig, TrainingConfig
from prefpipe.training.attention import Document
from prefpipe.training.batches import Example, collate, cut_prompt, data_order, encode, micro_batches
from prefpipe.training.loop import run_length
from prefpipe.training.optim import learning_rate


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    messages = [{"role": "user", "content": prompt}]
    return Pair(prompt_id=prompt_id(messages), messages=messages, source="t", chosen=chosen, rejected=rejected)


@pytest.fixture(scope="module")
def template(tiny_folder):
    tokenizer = models.load_tokenizer(ModelConfig(name="tiny", path="builtin:tiny"), tiny_folder)
    return ChatTemplate(tokenizer, models.stop_token_ids(tokenizer, tiny_folder))


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.integers(1, 60),
    chosen=st.integers(1, 60),
    rejected=st.integers(1, 60),
    limits=st.integers(2, 50),
    data=st.data(),
)
def test_truncation_keeps_both_completions_and_the_limits(template, prompt, chosen, rejected, limits, data):
    max_prompt = data.draw(st.integers(1, limits - 1))
    training = TrainingConfig(max_tokens=limits, max_prompt_tokens=max_prompt)
    text = [pair("a" * prompt, "b" * chosen, "c" * rejected)]
    (example,), counts = encode(text, template, training, pairwise=True)
    full = template.encode(text[0].messages, text[0].chosen)
    other = template.encode(text[0].messages, text[0].rejected)
    for side, whole in ((example.chosen, full.completion), (example.rejected, other.completion)):
        assert 1 <= len(side) <= len(whole)
        assert side.tolist() == whole[: len(side)]
        assert len(example.prompt) + len(side) <= limits
    longest = len(full.prompt) + max(len(full.completion), len(other.completion))
    assert counts["truncated"] == (longest > limits)
    if longest <= limits:
        assert example.prompt.tolist() == full.prompt
    else:
        kept = example.prompt.tolist()
        assert kept[0] == full.prompt[0]
        assert kept[1:] == full.prompt[len(full.prompt) - len(kept) + 1 :]


def test_a_prompt_is_cut_no_further_than_needed():
    training = TrainingConfig(max_tokens=10, max_prompt_tokens=4)
    prompt = list(range(8))
    assert cut_prompt(prompt, 10, training, keep_first=True) == prompt
    assert cut_prompt(prompt, 12, training, keep_first=True) == [0, 3, 4, 5, 6, 7]
    assert cut_prompt(prompt, 12, training, keep_first=False) == [2, 3, 4, 5, 6, 7]
    assert cut_prompt(prompt, 40, training, keep_first=True) == [0, 5, 6, 7]


def test_too_long_pairs_can_be_dropped_and_are_counted(template):
    training = TrainingConfig(max_tokens=30, max_prompt_tokens=20, on_too_long="drop")
    examples, counts = encode([pair("a", "b", "c"), pair("a" * 99, "b", "c")], template, training, pairwise=True)
    assert [e.row for e in examples] == [0]
    assert counts == {"pairs": 2, "too_long": 1}


def test_rows_that_cannot_be_rendered_are_counted_and_all_of_them_refuse(template):
    end = template.tokenizer.eos_token
    good, bad = pair("a", "b", "c"), pair("a", f"b{end}", "c")
    examples, counts = encode([good, bad], template, TrainingConfig(), pairwise=True)
    assert (len(examples), counts["special_token"]) == (1, 1)
    with pytest.raises(DataError, match=r"no pair is left to train on.*special token"):
        encode([bad], template, TrainingConfig(), pairwise=True)


def test_heldout_pairs_are_left_out_and_rows_keep_their_number(template):
    rows = [replace(pair("a", "b", "c"), split=Split.heldout), pair("d", "e", "f")]
    examples, counts = encode(rows, template, TrainingConfig(), pairwise=True)
    assert [e.row for e in examples] == [1]
    assert counts == {"pairs": 2, "other_split": 1}


def test_a_prompt_limit_that_leaves_no_room_is_refused():
    with pytest.raises(ConfigError, match=r"training\.max_prompt_tokens=64 must be below training\.max_tokens=64"):
        TrainingConfig(max_tokens=64, max_prompt_tokens=64)


@given(st.integers(1, 40), st.floats(0.1, 4.0), st.integers(0, 5))
def test_every_epoch_holds_each_example_once(num_examples, epochs, seed):
    drawn = max(1, round(epochs * num_examples))
    order = list(data_order(num_examples, drawn, seed))
    assert len(order) == drawn
    for start in range(0, drawn, num_examples):
        epoch = order[start : start + num_examples]
        assert len(set(epoch)) == len(epoch)


def test_epochs_and_seeds_have_their_own_order():
    first, second = list(data_order(50, 100, 0))[:50], list(data_order(50, 100, 0))[50:]
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != list(data_order(50, 50, 1))


def test_a_curriculum_sorts_each_epoch_and_shuffles_equal_ranks(template):
    """Pass rates 0, 0.5 and 1 of 30 pairs, written as numbers or, as in a CSV, as text: from easy to hard and back."""
    pairs = [
        replace(pair(f"question {i}", "a", "b"), meta={"pass_rate": rate if i % 2 else str(rate)})
        for i, rate in enumerate([0, 0.5, 1] * 10)
    ]
    orders = {}
    for order in ("ascending", "descending"):
        training = TrainingConfig(order=order, order_column="pass_rate")
        examples, _ = encode(pairs, template, training, pairwise=True)
        ranks = [example.rank for example in examples]
        drawn = list(data_order(30, 60, 0, ranks))
        for epoch in (drawn[:30], drawn[30:]):
            assert sorted(epoch) == list(range(30))
            rates = [float(pairs[i].meta["pass_rate"]) for i in epoch]
            assert rates == sorted(rates, reverse=order == "descending")
        assert drawn[:30] != drawn[30:]
        orders[order] = drawn
    assert orders["ascending"][:10] != sorted(orders["ascending"][:10])
    plain, _ = encode(pairs, template, TrainingConfig(), pairwise=True)
    assert list(data_order(30, 60, 0, [e.rank for e in plain])) == list(data_order(30, 60, 0))


def test_a_curriculum_needs_its_number_in_what_is_trained_on_alone(template):
    training = TrainingConfig(order="descending", order_column="pass_rate")
    with pytest.raises(DataError, match=r"row 0 of inputs.pairs has no meta key training.order_column=pass_rate"):
        encode([pair("q", "a", "b")], template, training, pairwise=True)
    with pytest.raises(DataError, match=r"training.order_column=pass_rate is 'high', not a finite number"):
        encode([replace(pair("q", "a", "b"), meta={"pass_rate": "high"})], template, training, pairwise=True)
    held = replace(pair("q", "a", "b"), split=Split.heldout)
    assert len(encode([held], template, training, pairwise=True, split=Split.heldout)[0]) == 1
    for wrong in ({"order": "ascending"}, {"order_column": "pass_rate"}):
        with pytest.raises(ConfigError, match="do not go together"):
            TrainingConfig(**wrong)


def test_run_length_by_epochs_and_by_steps():
    assert run_length(10, TrainingConfig(global_batch_size=4, micro_batch_size=2)) == (3, 10)
    assert run_length(10, TrainingConfig(global_batch_size=4, micro_batch_size=2, num_epochs=2.5)) == (7, 25)
    assert run_length(10, TrainingConfig(global_batch_size=4, micro_batch_size=2, max_steps=5)) == (5, 20)


def example(row: int, prompt: int, chosen: int, rejected: int) -> Example:
    sides = [np.arange(1, n + 1, dtype=np.int32) for n in (prompt, chosen, rejected)]
    return Example(row, *sides)


def test_micro_batches_are_a_partition_longest_first():
    examples = [example(i, 1 + i % 3, 2 + i, 1) for i in range(7)]
    cut = micro_batches(examples, [3, 1, 4, 6, 0], TrainingConfig(micro_batch_size=2))
    assert cut == [[6, 4], [3, 1], [0]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30), st.integers(1, 60))
def test_a_token_budget_holds_but_for_pairs_that_are_longer_alone(sizes, budget):
    examples = [example(i, prompt, completion, 1) for i, (prompt, completion) in enumerate(sizes)]
    cut = micro_batches(examples, range(len(sizes)), TrainingConfig(micro_batch_size=5, micro_batch_tokens=budget))
    assert sorted(i for batch in cut for i in batch) == list(range(len(sizes)))
    for batch in cut:
        assert 1 <= len(batch) <= 5
        assert len(batch) == 1 or sum(examples[i].tokens for i in batch) <= budget


def test_a_demonstration_takes_its_prompt_once_from_the_budget():
    training = TrainingConfig(micro_batch_size=5, micro_batch_tokens=30)
    alone, pair = example(0, 10, 5, 0), example(0, 10, 5, 5)
    assert (alone.tokens, pair.tokens) == (15, 30)
    assert micro_batches([alone] * 4, range(4), training) == [[0, 1], [2, 3]]
    assert micro_batches([pair] * 2, range(2), training) == [[0], [1]]


def flat(*rows: list[int]) -> list[int]:
    return [value for row in rows for value in row]


def test_padded_puts_one_completion_in_a_row():
    batch = collate([example(0, 2, 3, 1), example(1, 1, 1, 2)], "padded", pairwise=True)
    assert batch.input_ids.tolist() == [[1, 2, 1, 2, 3], [1, 1, 0, 0, 0], [1, 2, 1, 0, 0], [1, 1, 2, 0, 0]]
    assert batch.documents is None
    assert batch.targets.tolist() == flat([1, 2, 3], [1], [1], [1, 2])
    assert batch.positions.tolist() == flat([1, 2, 3], [5], [11], [15, 16])
    assert batch.sequences.tolist() == flat([0, 0, 0], [1], [2], [3, 3])
    assert batch.offsets.tolist() == flat([0, 1, 2], [0], [0], [0, 1])
    assert (batch.lengths.tolist(), batch.width) == ([3, 1, 1, 2], 3)


def test_packed_puts_all_completions_behind_their_prompts_in_one_row():
    batch = collate([example(0, 2, 3, 1), example(1, 1, 1, 2)], "packed", pairwise=True)
    assert batch.input_ids.tolist() == [flat([1, 2, 1, 2, 3], [1, 1], [1, 2, 1], [1, 1, 2])]
    assert batch.position_ids.tolist() == [flat([0, 1, 2, 3, 4], [0, 1], [0, 1, 2], [0, 1, 2])]
    assert batch.documents == [
        Document(0, 5, read=1),
        Document(5, 7, read=5),
        Document(7, 10, read=8),
        Document(10, 13, read=10),
    ]
    assert batch.positions.tolist() == flat([1, 2, 3], [5], [8], [10, 11])
    assert batch.targets.tolist() == flat([1, 2, 3], [1], [1], [1, 2])


def test_shared_puts_each_prompt_and_each_completion_there_once():
    rows = [example(0, 2, 3, 1), example(1, 1, 1, 2), example(2, 2, 1, 4)]
    batch = collate(rows, "shared", pairwise=True)
    # [prompt A, chosen 0] [prompt B, chosen 1] [chosen 2 of A, rejected 0 too] [rejected 1 of B] [rejected 2 of A]
    assert batch.input_ids.tolist() == [flat([1, 2, 1, 2, 3], [1, 1], [1], [1, 2], [1, 2, 3, 4])]
    assert batch.position_ids.tolist() == [flat([0, 1, 2, 3, 4], [0, 1], [2], [1, 2], [2, 3, 4, 5])]
    assert batch.documents == [
        Document(0, 5, read=1),
        Document(5, 7, read=5),
        Document(7, 8, prompt=0, shared=2, read=7),
        Document(8, 10, prompt=5, shared=1, read=8),
        Document(10, 14, prompt=0, shared=2, read=10),
    ]
    assert batch.positions.tolist() == flat([1, 2, 3], [5], [1], [1], [5, 8], [1, 10, 11, 12])
    assert batch.targets.tolist() == flat([1, 2, 3], [1], [1], [1], [1, 2], [1, 2, 3, 4])
    assert batch.sequences.tolist() == flat([0, 0, 0], [1], [2], [3], [4, 4], [5, 5, 5, 5])


def test_keys_are_those_of_the_completion_before_it_was_cut(template):
    whole = TrainingConfig(max_tokens=400, max_prompt_tokens=300)
    text = [pair("a", "b" * 90, "c")]
    (long,), _ = encode(text, template, whole, pairwise=True)
    (cut,), _ = encode(text, template, replace(whole, max_tokens=50, max_prompt_tokens=49), pairwise=True)
    assert len(cut.chosen) < len(long.chosen)
    assert cut.keys == long.keys


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_then_falls_and_is_never_0(schedule):
    training = TrainingConfig(learning_rate=1.0, schedule=schedule, warmup_fraction=0.2)
    rates = [learning_rate(step, 20, training) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert min(rates) > 0
    assert rates[4:] == sorted(rates[4:], reverse=True)
