"""scorer=logprob, implicit_reward and normalized_logprob against one row at a time through transformers."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from completions import completion, some
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from prefpipe.errors import ConfigError, DataError
from prefpipe.scorers import Missing
from prefpipe.scorers.implicit_reward import ImplicitReward
from prefpipe.scorers.logprob import Logprob
from prefpipe.scorers.normalized_logprob import NormalizedLogprob


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The tiny model with other weights."""
    out = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(out)
    return out


def token_logps(folder: Path, messages: list[dict[str, str]], text: str, end: str = "") -> list[float]:
    """Of the tokens of text + end behind the rendered prompt: the whole row alone, all logits, a loop."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(prompt + text + end, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logps[t - 1, ids[t]].item() for t in range(start, len(ids))]


def test_logprob_is_that_of_one_row_in_any_batch_and_any_order(context, tiny_folder):
    rows = [*some(), replace(some()[0], text="2 + 2", finish_reason="length")]
    eos = AutoTokenizer.from_pretrained(tiny_folder).eos_token
    ends = [eos] * 9 + [""]  # the end of a turn that was cut was never written
    logps = [token_logps(tiny_folder, row.messages, row.text, end) for row, end in zip(rows, ends, strict=True)]
    expected = [
        {"sum": sum(found), "mean": sum(found) / len(found), "perplexity": math.exp(-sum(found) / len(found))}
        for found in logps
    ]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    for max_batch_tokens in (1, 150, 8_192):
        scorer = Logprob(max_batch_tokens=max_batch_tokens)
        for found, wanted in zip(scorer.score(rows, context), expected, strict=True):
            assert found == pytest.approx(wanted, abs=1e-4, rel=1e-5)
        for found, place in zip(scorer.score([rows[i] for i in order], context), order, strict=True):
            assert found == pytest.approx(expected[place], abs=1e-4, rel=1e-5)
    assert Logprob().score([completion("4 " * 3000), completion("<|user|>")], context) == [
        Missing("too_long"),
        Missing("special_token"),
    ]


def test_implicit_reward_is_beta_times_the_log_ratio(context, tiny_folder, other):
    rows = some()
    eos = AutoTokenizer.from_pretrained(tiny_folder).eos_token
    policy = [token_logps(other, row.messages, row.text, eos) for row in rows]
    reference = [token_logps(tiny_folder, row.messages, row.text, eos) for row in rows]
    sums = [0.3 * (sum(mine) - sum(theirs)) for mine, theirs in zip(policy, reference, strict=True)]
    means = [value / len(mine) for value, mine in zip(sums, policy, strict=True)]
    context = replace(context, policy=lambda: other)  # the checkpoint; model.path is where it started
    assert ImplicitReward(beta=0.3).score(rows, context) == pytest.approx(sums, abs=1e-4)
    assert ImplicitReward(beta=0.3, per_token=True).score(rows, context) == pytest.approx(means, abs=1e-5)
    swapped = ImplicitReward(beta=0.3, policy=str(tiny_folder), reference=str(other))
    assert swapped.score(rows, context) == pytest.approx([-value for value in sums], abs=1e-4)
    identity = ImplicitReward().identity(context)
    assert identity["policy"]["weights"] != identity["reference"]["weights"]


def test_a_policy_that_is_its_own_reference_is_refused(context):
    with pytest.raises(ConfigError, match=r"are the same weights, so every reward would be 0"):
        ImplicitReward().identity(context)
    with pytest.raises(ConfigError, match=r"scorer\.beta=0 must be above 0"):
        ImplicitReward(beta=0)


def test_normalized_logprob_is_the_mean_of_the_last_tokens_under_the_instruction(context, tiny_folder):
    """Of 20 tokens, or of all where there are fewer, each predicted by the token before it; the end of turn is none."""
    texts = ["3 apples", "9", "3 + 5 = <<3+5=8>>8 apples in all, and 2 of them are red, which leaves 6\n#### 6"]
    rows = [
        completion(text, f"Use these claims: {text}", meta={"instruction": "Tell me of apples. " * (i + 1)})
        for i, text in enumerate(texts)
    ]
    expected, lengths = [], []
    for row in rows:
        logps = token_logps(tiny_folder, [{"role": "user", "content": row.meta["instruction"]}], row.text)
        lengths.append(len(logps))
        expected.append(sum(logps[-20:]) / len(logps[-20:]))
    assert min(lengths) < 20 < max(lengths)
    assert NormalizedLogprob().score(rows, context) == pytest.approx(expected, abs=1e-5)
    assert NormalizedLogprob().score(rows[::-1], context) == pytest.approx(expected[::-1], abs=1e-5)
    assert NormalizedLogprob(max_batch_tokens=1).score(rows[2:], context) == pytest.approx(expected[2:], abs=1e-5)
    whole = token_logps(tiny_folder, rows[2].messages, rows[2].text)
    own = NormalizedLogprob(prompt=None, last_tokens=3).score(rows[2:], context)
    assert own == pytest.approx([sum(whole[-3:]) / 3], abs=1e-5)


def test_normalized_logprob_says_what_it_misses(context):
    assert NormalizedLogprob(prompt=None).score([completion("")], context) == [Missing("empty")]
    with pytest.raises(DataError, match=r"has no text in meta\.instruction, .* scorer\.prompt=null"):
        NormalizedLogprob().score([completion("4")], context)
    with pytest.raises(ConfigError, match=r"scorer\.last_tokens=0 must be at least 1"):
        NormalizedLogprob(last_tokens=0)


def test_an_encoder_decoder_model_gives_log_probabilities_too(tmp_path, tiny_folder, context):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=474, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=2, dropout_rate=0.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "t5")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.save_pretrained(tmp_path / "t5")
    rows = some(4)
    expected = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, tokenize=False)
        labels = [*tokenizer(row.text)["input_ids"], 2]
        labels = labels[1:] if labels[0] == tokenizer.bos_token_id else labels
        with torch.no_grad():
            given = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
            expected.append(-model(input_ids=given, labels=torch.tensor([labels])).loss.item())
    found = Logprob(path=str(tmp_path / "t5")).score(rows, context)
    assert [score["mean"] for score in found] == pytest.approx(expected, abs=1e-4)
