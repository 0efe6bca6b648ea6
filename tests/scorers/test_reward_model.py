"""scorer=reward_model: the last token and no other, whatever the batch, the order, the padding and the family."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from completions import completion, some
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from prefpipe.errors import ConfigError
from prefpipe.reward_models import new_reward_model
from prefpipe.scorers import Missing
from prefpipe.scorers.reward_model import RewardModel
from prefpipe.settings import ModelConfig

CPU = torch.device("cpu")


def llama(tiny: Path, out: Path) -> None:
    new_reward_model(ModelConfig(name="tiny", path="builtin:tiny"), tiny, seed=0, device=CPU).save_pretrained(out)


def llama_padded_with_its_end_of_turn(tiny: Path, out: Path) -> None:
    llama(tiny, out)
    config = orjson.loads((out / "config.json").read_bytes())
    (out / "config.json").write_bytes(orjson.dumps(config | {"pad_token_id": config["eos_token_id"]}))


def llama_without_padding(tiny: Path, out: Path) -> None:
    llama(tiny, out)
    config = orjson.loads((out / "config.json").read_bytes())
    (out / "config.json").write_bytes(orjson.dumps(config | {"pad_token_id": None}))


def gpt2(tiny: Path, out: Path) -> None:
    """Decoder with positions of its own and no padding token."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=474, n_embd=32, n_layer=2, n_head=2, n_positions=512, num_labels=1, initializer_range=0.5
    )
    GPT2ForSequenceClassification(config).save_pretrained(out)


def deberta(tiny: Path, out: Path) -> None:
    """An encoder: every token sees every other, and the first is read."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=474, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    DebertaV2ForSequenceClassification(config).save_pretrained(out)


FAMILIES: list[Callable[[Path, Path], None]] = [
    llama, llama_padded_with_its_end_of_turn, llama_without_padding, gpt2, deberta
]  # fmt: skip


def folder(make: Callable[[Path, Path], None], tiny: Path, out: Path) -> Path:
    make(tiny, out)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(out)
    return out


def by_hand(path: Path, text: str, messages: list[dict[str, str]]) -> float:
    """One row without padding; pad_token_id=None makes transformers read the last token."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
    model.config.pad_token_id = None
    turns = [*messages, {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_a_score_is_that_of_one_row_in_any_batch_and_any_order(tmp_path, tiny_folder, context, make):
    path = folder(make, tiny_folder, tmp_path / "model")
    rows = some()
    expected = [by_hand(path, row.text, row.messages) for row in rows]
    assert len({round(value, 4) for value in expected}) == len(rows)
    scorer = RewardModel(path=str(path))
    assert scorer.score(rows, context) == pytest.approx(expected, abs=1e-5)
    assert replace(scorer, max_batch_tokens=1).score(rows, context) == pytest.approx(expected, abs=1e-5)
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    shuffled = scorer.score([rows[i] for i in order], context)
    assert shuffled == pytest.approx([expected[i] for i in order], abs=1e-5)
    assert scorer.score(rows[3:4], context) == pytest.approx(expected[3:4], abs=1e-5)


def test_a_row_that_is_too_long_has_no_score_and_is_never_cut(tmp_path, tiny_folder, context):
    path = folder(llama, tiny_folder, tmp_path / "model")
    rows = [completion("4"), completion("4 " * 200), completion("<|user|> 4")]
    scores = RewardModel(path=str(path), max_tokens=100).score(rows, context)
    assert scores[0] == pytest.approx(by_hand(path, "4", rows[0].messages), abs=1e-5)
    assert scores[1:] == [Missing("too_long"), Missing("special_token")]
    short = folder(llama, tiny_folder, tmp_path / "short")
    config = orjson.loads((short / "config.json").read_bytes()) | {"max_position_embeddings": 100}
    (short / "config.json").write_bytes(orjson.dumps(config))
    assert RewardModel(path=str(short)).score([completion("4 " * 200)], context) == [Missing("too_long")]


def test_what_is_no_reward_model_is_refused(tmp_path, tiny_folder, context):
    with pytest.raises(ConfigError, match=r"scorer\.path=null must name the reward model"):
        RewardModel().score([completion("4")], context)
    with pytest.raises(ConfigError, match=r"scorer\.path=.*tiny is no reward model \(LlamaForCausalLM\); train one"):
        RewardModel(path=str(tiny_folder)).score([completion("4")], context)
    config = GPT2Config(vocab_size=474, n_embd=32, n_layer=1, n_head=2, num_labels=3)
    path = folder(
        lambda _, out: GPT2ForSequenceClassification(config).save_pretrained(out), tiny_folder, tmp_path / "m"
    )
    with pytest.raises(ConfigError, match="is a classifier of 3 labels; a reward model has one"):
        RewardModel(path=str(path)).score([completion("4")], context)


def test_the_manifest_names_the_weights(tmp_path, tiny_folder, context):
    path = folder(llama, tiny_folder, tmp_path / "model")
    first = RewardModel(path=str(path)).identity(context)
    state = new_reward_model(ModelConfig(name="tiny", path="builtin:tiny"), tiny_folder, seed=1, device=CPU)
    state.save_pretrained(path)
    second = RewardModel(path=str(path)).identity(context)
    assert first["reward_model"]["weights"] != second["reward_model"]["weights"]
