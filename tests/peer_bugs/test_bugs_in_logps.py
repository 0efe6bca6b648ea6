"""B15 to B30: bugs of other programs between token ids and log-probabilities. README.md lists them all."""

import math
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from prefpipe import models
from prefpipe.errors import ConfigError
from prefpipe.logps import PairLogps
from prefpipe.losses import DPO
from prefpipe.prompts import ChatTemplate
from prefpipe.records import Pair, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.training.batches import Example, collate, encode
from prefpipe.training.engine import Engine
from prefpipe.training.loop import Job, train

CPU = torch.device("cpu")
BATCHINGS = ("padded", "packed", "shared")


def network(batching: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **settings
    )
    net = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in net.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    Engine(CPU, batching).prepare(net)
    return net


def example(prompt: list[int], chosen: list[int], rejected: list[int], row: int = 0) -> Example:
    return Example(row, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)))


def random_pairs(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [example(*(rng.integers(3, 97, n).tolist() for n in rng.integers(1, 12, 3)), row=i) for i in range(count)]


def pair(question: str, chosen: str, rejected: str) -> Pair:
    messages = [{"role": "user", "content": question}]
    return Pair(prompt_id=prompt_id(messages), messages=messages, source="t", chosen=chosen, rejected=rejected)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_b15_the_first_token_of_a_completion_counts(batching: str) -> None:
    """Both completions go on alike after their first token, so far as tokens go."""
    net = network(batching)
    row = example([5, 6, 7], [11], [12])
    logps = Engine(CPU, batching).logps(net, [row], pairwise=True)
    with torch.no_grad():
        logits = network("padded")(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    margin = (logps.chosen - logps.rejected).item()
    assert margin == pytest.approx((logits[11] - logits[12]).item(), abs=1e-5)
    assert abs(margin) > 0.1
    longer = Engine(CPU, batching).logps(net, [example([5, 6, 7], [11, 20, 21], [12, 20, 21])], pairwise=True)
    assert abs((longer.chosen - longer.rejected).item()) > 0.1
    margin_of_weights = torch.autograd.grad((logps.chosen - logps.rejected).sum(), list(net.parameters()))
    assert sum(slope.abs().sum().item() for slope in margin_of_weights) > 0


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "bf16 autocast"])
@pytest.mark.parametrize("head", ["plain", "chunked"])
def test_b16_two_thousand_tokens_in_bf16_are_added_in_more_than_bf16(head: str, autocast: bool) -> None:
    """Against the model's own logits of the same precision, normalized and added in float64."""
    net = network("padded", max_position_embeddings=4096)
    net = net if autocast else net.bfloat16()
    ids = np.random.default_rng(0).integers(3, 97, 2052).tolist()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = net(input_ids=torch.tensor([ids])).logits[0, 3:-1].double()
        found = Engine(CPU, "padded", head).logps(net, [example(ids[:4], ids[4:], [9])], pairwise=True)
    exact = logits.log_softmax(-1).gather(-1, torch.tensor(ids[4:])[:, None]).sum().item()
    assert found.chosen.dtype == torch.float64
    assert found.chosen.item() == pytest.approx(exact, rel=1e-4)
    assert found.chosen_tokens.item() == 2048


def test_b20_what_stands_behind_a_completion_is_never_read() -> None:
    net, engine, rows = network("padded"), Engine(CPU), random_pairs(4)
    batch = collate(rows, "padded", pairwise=True)
    expected = engine.each_token(net, batch)
    sizes = torch.tensor(
        [
            len(e.prompt) + len(side)
            for side_of in ("chosen", "rejected")
            for e in rows
            for side in [getattr(e, side_of)]
        ]
    )
    behind = torch.arange(batch.input_ids.shape[1]) >= sizes[:, None]
    assert behind.any()
    for pad in (1, 50, 96):
        found = engine.each_token(net, batch._replace(input_ids=batch.input_ids.masked_fill(behind, pad)))
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_b20_a_longer_neighbour_changes_no_log_probability() -> None:
    net, engine, rows = network("padded"), Engine(CPU), random_pairs(4)
    alone = engine.logps(net, rows, pairwise=True)
    beside = engine.logps(net, [*rows, example([3] * 40, [4] * 40, [5] * 60)], pairwise=True)
    torch.testing.assert_close(beside.chosen[:4], alone.chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(beside.rejected[:4], alone.rejected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_b21_the_end_of_turn_counts_once_where_it_is_the_pad_token_too(
    batching: str, tmp_path: Path, tiny_folder: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    settings = orjson.loads((folder / "tokenizer_config.json").read_bytes())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(settings))
    config = ModelConfig(name="m", path=str(folder))
    tokenizer = models.load_tokenizer(config, folder)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    template = ChatTemplate(tokenizer, models.stop_token_ids(tokenizer, folder))
    rows, _ = encode(
        [pair("Hi", "yes", "no, never"), pair("1 + 1?", "2", "3")], template, TrainingConfig(), pairwise=True
    )
    net = models.load_weights(config, folder, dtype=torch.float32, device=CPU).eval()
    whole = []
    for row in rows:
        assert row.chosen.tolist().count(end) == 1
        ids = torch.tensor([[*row.prompt.tolist(), *row.chosen.tolist()]])
        with torch.no_grad():
            logps = net(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        whole.append(logps[len(row.prompt) - 1 :])
    engine = Engine(CPU, batching)
    engine.prepare(net)
    found = engine.logps(net, rows, pairwise=True, reads=frozenset({"token_logps"}))
    for i, (row, expected) in enumerate(zip(rows, whole, strict=True)):
        assert found.chosen_tokens[i] == len(expected) == len(row.chosen)
        mine = found.chosen_token_logps[i, : len(expected)].float()
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
        assert found.chosen[i].item() == pytest.approx(expected.sum().item(), abs=1e-4)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_b22_the_first_loss_of_a_full_pack_is_ln_2(batching: str) -> None:
    """The reference is asked pair by pair without packing, the policy in one row of many documents."""
    rows, engine = random_pairs(12), Engine(CPU, batching)
    policy = engine.logps(network(batching), rows, pairwise=True)
    with torch.no_grad():
        singly = [Engine(CPU).logps(network("padded"), [row], pairwise=True) for row in rows]
    reference = PairLogps(*(torch.cat(parts) for parts in list(zip(*singly, strict=True))[:4]))
    torch.testing.assert_close(policy.chosen, reference.chosen, atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.rejected, reference.rejected, atol=1e-4, rtol=0)
    assert DPO()(policy, reference).loss.tolist() == pytest.approx([math.log(2)] * 12, abs=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_b30_what_an_adapter_of_the_head_learned_is_in_the_checkpoint(
    tied: bool, tmp_path: Path, tiny_folder: Path
) -> None:
    """The merged weights say what the trained model said, the base with the adapter; or the job is refused."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    if not tied:
        net = AutoModelForCausalLM.from_pretrained(base)
        net.config.tie_word_embeddings = False
        net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
        net.save_pretrained(base)
    pairs = [pair(f"What is {i} + 1?", f"#### {i + 1}", f"#### {i}") for i in range(4)]
    work = tmp_path / "work"
    work.mkdir()
    job = Job(
        pairs=pairs,
        model=ModelConfig(name="m", path=str(base), adapter="lora", adapter_targets=["lm_head"]),
        policy=base,
        reference=base,
        loss=DPO(),
        training=TrainingConfig(
            learning_rate=1e-2,
            global_batch_size=4,
            micro_batch_size=4,
            max_steps=5,
            max_tokens=64,
            max_prompt_tokens=48,
        ),
        hardware=HardwareConfig(name="cpu", device="cpu", precision="fp32"),
        seed=0,
        work=work,
        cache=tmp_path / "cache",
    )
    try:
        train(job)
    except ConfigError:
        assert tied
        return
    ids = torch.tensor([[1, 4, 30, 31, 32, 2, 5, 40, 41]])
    with torch.no_grad():
        start = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), work / "adapter")
        adapted = trained(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(work)(input_ids=ids).logits
    assert (adapted - start).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)
