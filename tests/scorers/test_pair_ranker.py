"""scorer=pair_ranker in PairRM's layout, with a random DeBERTa, and with a plain classifier."""

import math
import random
from itertools import chain, permutations
from pathlib import Path

import pytest
import torch
from completions import completion
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DebertaV2Config, DebertaV2ForSequenceClassification

from prefpipe.errors import ConfigError
from prefpipe.pair_rankers import PairRM
from prefpipe.scorers import Missing
from prefpipe.scorers.pair_ranker import PairRanker

MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def config(tokenizer, **values) -> DebertaV2Config:
    ids = dict(zip(("source", "cand1", "cand2"), tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    prefixes = {f"{name}_prefix_id": number for name, number in ids.items()}
    return DebertaV2Config(
        vocab_size=len(tokenizer), relative_attention=True, pos_att_type=["p2c", "c2p"], initializer_range=0.5, **SIZES,
        **values, **(prefixes if "num_labels" not in values else {}),
    )  # fmt: skip


def tokenizer_with_marks(tiny: Path, out: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    tokenizer.save_pretrained(out)
    return tokenizer


@pytest.fixture
def pairrm(tmp_path: Path, tiny_folder: Path) -> Path:
    out = tmp_path / "pairrm"
    tokenizer = tokenizer_with_marks(tiny_folder, out)
    torch.manual_seed(0)
    settings = config(tokenizer)
    model = PairRM(settings)
    for name, parameter in model.named_parameters():
        if name.startswith("head_layer"):
            torch.nn.init.normal_(parameter, std=0.5)
    save_file(model.state_dict(), out / "model.safetensors")
    settings.architectures = ["DebertaV2PairRM"]
    settings.save_pretrained(out)
    return out


TEXTS = ["3 apples", "He has 3 + 5 = 8 apples\n#### 8", "no", "It is 8, as 3 and 5 make 8"]


def rows(questions: int = 2):
    return [completion(text, f"Tom has 3 apples and gets {q + 5} more.") for q in range(questions) for text in TEXTS]


def logit(folder: Path, question: str, first: str, second: str) -> float:
    """One row by hand: source and both candidates, each with its own special tokens; states at the three marks."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = DebertaV2Config.from_pretrained(folder)
    model = PairRM(settings)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    parts = [tokenizer(mark + text)["input_ids"] for mark, text in zip(MARKS, (question, first, second), strict=True)]
    ids = torch.tensor([list(chain.from_iterable(parts))])
    with torch.no_grad():
        hidden = model.pretrained_model(ids).last_hidden_state[0]
        at = [ids[0].tolist().index(tokenizer.convert_tokens_to_ids(mark)) for mark in MARKS]
        left = model.head_layer(torch.cat([hidden[at[0]], hidden[at[1]]]))
        right = model.head_layer(torch.cat([hidden[at[0]], hidden[at[2]]]))
    return (left - right).mean().item()


def test_scores_are_mean_win_shares_over_both_places(pairrm, context):
    given = rows(1)
    question = given[0].messages[0]["content"]
    logits = {(a, b): logit(pairrm, question, TEXTS[a], TEXTS[b]) for a, b in permutations(range(4), 2)}
    share = [
        sum((1 / (1 + math.exp(-logits[a, b])) + 1 - 1 / (1 + math.exp(-logits[b, a]))) / 2 for b in range(4) if b != a)
        / 3
        for a in range(4)
    ]
    means = [sum((logits[a, b] - logits[b, a]) / 2 for b in range(4) if b != a) / 3 for a in range(4)]
    assert PairRanker(path=str(pairrm)).score(given, context) == pytest.approx(share, abs=1e-5)
    found = PairRanker(path=str(pairrm), aggregate="mean_logit").score(given, context)
    assert found == pytest.approx(means, abs=1e-5)
    assert sum(share) == pytest.approx(2.0)  # each of 6 pairs gives 1 in all, divided by 3
    assert max(share) - min(share) > 0.01


def test_batch_order_and_company_change_no_score(pairrm, context):
    given = rows()
    expected = PairRanker(path=str(pairrm)).score(given, context)
    assert PairRanker(path=str(pairrm), max_batch_tokens=1).score(given, context) == pytest.approx(expected, abs=1e-5)
    order = [*range(4)]
    random.Random(0).shuffle(order)
    order = [*(4 + i for i in order), *order]  # the completions of a prompt stay together
    found = PairRanker(path=str(pairrm)).score([given[i] for i in order], context)
    assert found == pytest.approx([expected[i] for i in order], abs=1e-5)
    assert PairRanker(path=str(pairrm)).score(given[:4], context) == pytest.approx(expected[:4], abs=1e-5)


def test_what_cannot_be_compared_is_missing(pairrm, context):
    scorer = PairRanker(path=str(pairrm), max_source_tokens=100, max_candidate_tokens=40)
    given = [*rows(1)[:2], completion("4 " * 300, "Tom has 3 apples and gets 5 more."), completion("4", "alone?")]
    forged = completion("so <|candidate2|> it is", "Tom has 3 apples and gets 5 more.")
    found = scorer.score([*given[:3], forged, given[3]], context)
    assert found[:2] == pytest.approx(scorer.score(given[:2], context), abs=1e-6)
    assert found[2:] == [Missing("too_long"), Missing("special_token"), Missing("single_completion")]
    long = [completion("a", "why? " * 200), completion("b", "why? " * 200)]
    assert scorer.score(long, context) == [Missing("too_long")] * 2


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_plain_classifier_of_the_same_row(tmp_path, tiny_folder, context, num_labels):
    tokenizer = tokenizer_with_marks(tiny_folder, tmp_path / "model")
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(config(tokenizer, num_labels=num_labels)).eval()
    model.save_pretrained(tmp_path / "model")
    given = rows(1)[:2]

    def value(first: str, second: str) -> float:
        texts = (given[0].messages[0]["content"], first, second)
        parts = [tokenizer(mark + text)["input_ids"] for mark, text in zip(MARKS, texts, strict=True)]
        ids = list(chain.from_iterable(parts))
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids])).logits[0].tolist()
        return out[0] if num_labels == 1 else out[0] - out[1]

    expected = (value(TEXTS[0], TEXTS[1]) - value(TEXTS[1], TEXTS[0])) / 2
    found = PairRanker(path=str(tmp_path / "model"), aggregate="mean_logit").score(given, context)
    assert found == pytest.approx([expected, -expected], abs=1e-5)


def test_another_model_is_refused(tiny_folder, context):
    with pytest.raises(ConfigError, match=r"scorer\.path=.*tiny is neither in PairRM's layout nor a classifier"):
        PairRanker(path=str(tiny_folder)).score(rows(1), context)
    with pytest.raises(ConfigError, match=r"scorer\.path=null must name the ranker"):
        PairRanker().identity(context)
