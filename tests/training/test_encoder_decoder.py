"""Encoder-decoder models: log-probabilities and gradients as the model's own `labels` give them, and whole runs."""

import copy
import functools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import engine_oracle as oracle
import orjson
import pytest
import torch
from engine_oracle import CPU, PAIRWISE, gradients
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, PreTrainedModel, T5Config

from prefpipe import models
from prefpipe.errors import ConfigError
from prefpipe.generators.hf import HF
from prefpipe.losses import DPO, IPO, SFT, Loss, SimPO
from prefpipe.records import Completion, Pair, Prompt, Split, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.stages.evaluate import PolicyUnderTest
from prefpipe.training.batches import Example, collate, encode
from prefpipe.training.engine import Engine, Frozen, choose_engine
from prefpipe.training.loop import Job, train
from prefpipe.training.reference import FixedReference, OnlineReference, Reference

START = 3
"""Neither the padding token nor 0, so that no default can pass for it."""

T5 = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": START,
    "pad_token_id": 2,
}
FAMILIES = {
    "t5": T5Config(**T5),
    "t5_v1_1": T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5_lora": T5Config(**T5, tie_word_embeddings=False),
    "bart": BartConfig(
        vocab_size=61,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        init_std=0.2,
        decoder_start_token_id=START,
        pad_token_id=2,
    ),
}


def model(family: str, kernel: str = "sdpa", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = AutoModelForSeq2SeqLM.from_config(
        copy.deepcopy(FAMILIES[family]), attn_implementation=kernel, dtype=torch.float64
    ).eval()
    for module in net.modules():
        if type(module).__name__ == "T5LayerNorm":
            nn.init.normal_(module.weight, 1.0, 0.1)
            _wide_norm(module)
    if family != "t5" and isinstance(net.config, T5Config):
        net.lm_head = nn.Linear(32, 61, bias=False, dtype=torch.float64)
    if family == "t5_lora":
        net = get_peft_model(net, LoraConfig(r=3, target_modules=["q", "wo", "lm_head"], lora_dropout=0.0))
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return net


def _wide_norm(norm: nn.Module) -> None:
    """T5LayerNorm takes its variance in float32; the same formula in the dtype of its input."""

    def forward(hidden: Tensor) -> Tensor:
        return norm.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

    norm.forward = forward


def examples(seed: int = 0) -> list[Example]:
    return oracle.random_pairs(seed, 5, longest=14, first_token=4, decoder_start=START)


def forward(net: nn.Module, prompt: Tensor, completion: Tensor) -> tuple[Tensor, Tensor]:
    """The completion as `labels` of the model's own forward pass, whose loss is the mean over its tokens."""
    out = net(input_ids=prompt[None], labels=completion[None])
    return out.logits[0].log_softmax(-1), -out.loss * len(completion)


by_hand = functools.partial(oracle.one_at_a_time, forward)


def reference_of(kind: str, family: str, engine: Engine, rows: list[Example]) -> Reference:
    net = model(family, seed=1)
    if kind == "online":
        return OnlineReference(Frozen(net), rows, engine)
    values = engine.each_token(net, collate(rows, engine.batching, pairwise=True))
    return FixedReference.of_values([values[i + side * len(rows)] for i in range(len(rows)) for side in (0, 1)], CPU)


@functools.cache
def expected(family: str, name: str) -> tuple[float, list[Tensor]]:
    return oracle.loss_by_hand(name, forward, model(family), model(family, seed=1), examples())


@pytest.mark.parametrize("reference", ["online", "cached"])
@pytest.mark.parametrize("head", ["plain", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_loss_and_its_gradients_are_those_of_labels(family, head, reference, monkeypatch):
    """loss x head x reference x family in float64: every loss on T5, and on the others those that read other things."""
    monkeypatch.setattr("prefpipe.training.head.TILE_BYTES", 4 * 61 * 16)  # tiles of 16 tokens: several of them
    engine, rows, net = Engine(CPU, "padded", head), examples(), model(family)
    frozen = reference_of(reference, family, engine, rows)
    names = PAIRWISE if family == "t5" else ("dpo", "ipo", "simpo", "tdpo")
    oracle.assert_losses(names, engine, net, frozen, rows, functools.partial(expected, family))


@pytest.mark.parametrize("head", ["plain", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_and_its_gradients_are_those_of_labels(family, head):
    net, rows = model(family), [e._replace(rejected=e.rejected[:0]) for e in examples()]
    expected = 0.0
    for row in rows:
        labels = torch.from_numpy(row.chosen)[None].long()
        loss = net(input_ids=torch.from_numpy(row.prompt)[None].long(), labels=labels).loss * len(row.chosen)
        loss.backward()
        expected += loss.item()
    slopes = gradients(net)
    net.zero_grad()
    policy = Engine(CPU, "padded", head).logps(net, rows, pairwise=False)
    loss = SFT()(policy, None).loss.sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert policy.chosen_tokens.tolist() == [len(e.chosen) for e in rows]
    oracle.assert_gradients(net, slopes)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5_v1_1", "bart"])
def test_other_rows_change_nothing_bit_for_bit(family, kernel):
    net, rows, engine = model(family, kernel), examples(3), Engine(CPU)
    oracle.assert_other_rows_change_nothing(engine, net, rows)
    oracle.assert_sides_are_apart(engine, net, rows[:3])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_pair_does_not_depend_on_its_neighbours(family):
    oracle.assert_neighbours_do_not_matter(Engine(CPU), model(family), examples(2))


def test_the_encoder_reads_each_prompt_once():
    net, rows = model("t5"), examples()
    seen = []
    net.encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    Engine(CPU).logps(net, rows, pairwise=True)
    assert len(seen) == 1
    assert seen[0].shape == (4, max(len(e.prompt) for e in rows))  # 10 completions, 5 pairs, 4 prompts
    batch = collate(rows, "padded", pairwise=True)
    assert batch.encoder_rows.tolist() == [0, 1, 2, 3, 3, 0, 1, 2, 3, 3]
    assert batch.input_ids[:, 0].tolist() == [START] * 10
    assert batch.encoder_mask.sum(1).tolist() == [len(e.prompt) for e in rows[:4]]


def test_gradient_checkpointing_changes_no_bit():
    def make() -> nn.Module:
        net = model("t5").train()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return net

    oracle.assert_checkpointing_changes_no_bit(make, Engine(CPU), examples())


def test_auto_is_padded_and_one_row_for_both_is_refused():
    for family in ("t5", "t5_v1_1", "bart"):
        assert choose_engine(TrainingConfig(), model(family), examples(), device=CPU) == Engine(CPU, "padded")
    for batching in ("packed", "shared"):
        with pytest.raises(ConfigError, match=rf"training\.batching={batching} lays .* encoder-decoder.*batching=auto"):
            choose_engine(TrainingConfig(batching=batching), model("t5"), examples(), device=CPU)


def test_a_head_that_ours_does_not_reproduce_is_left_to_the_model():
    """BART and Marian add a bias to their logits behind the head."""
    net, rows = model("bart"), examples()
    nn.init.normal_(net.final_logits_bias)
    engine = choose_engine(TrainingConfig(), net, rows, device=CPU)
    assert engine == Engine(CPU, "padded", own_logits=True)
    other = model("bart", seed=1)
    found = engine.logps(net, rows, pairwise=True, reads=frozenset({"kl"}), reference=Frozen(other))
    expected = by_hand(net, rows, other)
    assert found.chosen.tolist() == pytest.approx(expected.chosen.tolist(), abs=1e-10)
    assert found.chosen_kl.tolist() == pytest.approx(expected.chosen_kl.tolist(), abs=1e-10)


# ------------------------------------------------------------------------------------------------ whole runs

TRAINING = TrainingConfig(
    learning_rate=1e-3, global_batch_size=4, micro_batch_size=2, max_steps=5, max_tokens=96, max_prompt_tokens=64
)
MODEL = ModelConfig(name="t5", path="t5")
HARDWARE = HardwareConfig(name="cpu", device="cpu", precision="fp32")


def pairs(count: int = 6) -> list[Pair]:
    made = []
    for i in range(count):
        messages = [{"role": "user", "content": f"Tom has {i} apples and buys {i + 2}. How many?" + " now" * (i % 3)}]
        made.append(
            Pair(
                prompt_id=prompt_id(messages),
                messages=messages,
                source="t",
                chosen=f"{i}+{i + 2}={2 * i + 2} # {2 * i + 2}",
                rejected=f"# {i}",
            )
        )
    return made


def job(work: Path, folder: Path, loss: Loss, training: TrainingConfig = TRAINING, **knobs: object) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    made = Job(
        pairs=pairs(),
        model=MODEL,
        policy=folder,
        reference=folder,
        loss=loss,
        training=training,
        hardware=HARDWARE,
        seed=0,
        work=work,
        cache=work.parent / "cache",
    )
    return replace(made, **knobs)  # type: ignore[arg-type]


def metrics(work: Path) -> list[dict[str, float]]:
    return [orjson.loads(line) for line in (work / "metrics.jsonl").read_bytes().splitlines()]


def losses(work: Path) -> list[float]:
    return [row["train/loss"] for row in metrics(work)]


def own_logps(folder: Path, rows: list[Pair]) -> list[tuple[float, int, float, int]]:
    """By transformers alone: its tokenizer on each text, its loss on the labels."""
    net, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for pair in rows:
        given = tokenizer(pair.messages[-1]["content"], return_tensors="pt")
        sides = []
        for text in (pair.chosen, pair.rejected):
            labels = tokenizer(text_target=text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                sides += [-net(**given, labels=labels).loss.item() * labels.shape[1], labels.shape[1]]
        found.append(tuple(sides))
    return found


def greedy(folder: Path, rows: list[Pair]) -> list[Completion]:
    prompts = [Prompt(prompt_id=p.prompt_id, messages=p.messages, source="t") for p in rows]
    generator = HF(num_samples=1, temperature=0.0, max_new_tokens=24)
    return list(generator.generate(prompts, model=MODEL, folder=folder, hardware=HARDWARE, seed=0, round_=0))


def test_dpo_starts_at_ln_2_learns_resumes_and_is_loaded_by_transformers(tmp_path, t5_folder):
    training = replace(TRAINING, max_steps=8, save_every_steps=3)
    train(job(tmp_path / "whole", t5_folder, DPO(beta=0.3), training))
    found = losses(tmp_path / "whole")
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[-1] < found[0] - 0.05

    # A run that finds the state of step 6, and nothing of what came after it, ends with the same bytes.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "model.safetensors").unlink()
    train(job(tmp_path / "again", t5_folder, DPO(beta=0.3), training))
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    # What transformers loads is what was trained, its head still its own.
    before, after = own_logps(t5_folder, pairs()), own_logps(tmp_path / "whole", pairs())
    assert [a[0] - a[2] for a in after] > [b[0] - b[2] for b in before]
    net = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole")
    assert not torch.equal(net.lm_head.weight, net.shared.weight)
    settings = orjson.loads((tmp_path / "whole" / "config.json").read_bytes())
    assert (settings["tie_word_embeddings"], settings["scale_decoder_outputs"]) == (False, False)
    assert settings["dropout_rate"] == 0.1
    assert settings["decoder_start_token_id"] == 0


def test_simpo_starts_where_transformers_says(tmp_path, t5_folder):
    train(job(tmp_path, t5_folder, SimPO(), replace(TRAINING, global_batch_size=6, max_steps=1)))
    margins = [2.0 * (a / n - b / m) - 1.0 for a, n, b, m in own_logps(t5_folder, pairs())]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert losses(tmp_path)[0] == pytest.approx(expected, abs=1e-5)


def test_sft_teaches_what_the_generator_then_writes(tmp_path, t5_folder):
    """Trained on the decoder's side, sampled from it: the two agree on where a completion starts and ends."""
    training = replace(TRAINING, learning_rate=2e-2, global_batch_size=6, micro_batch_size=6, max_steps=120)
    train(job(tmp_path, t5_folder, SFT(), training))
    total = [(a, n) for a, n, _, _ in own_logps(t5_folder, pairs())]
    assert losses(tmp_path)[0] == pytest.approx(-sum(a for a, _ in total) / sum(n for _, n in total), abs=1e-5)
    answers = greedy(tmp_path, pairs())
    assert [a.text for a in answers] == [p.chosen for p in pairs()]
    assert {a.finish_reason for a in answers} == {"stop"}
    after = own_logps(tmp_path, pairs())
    assert [a.logp for a in answers] == pytest.approx([row[0] for row in after], abs=1e-4)


@pytest.mark.parametrize("reference", ["cached", "online", "moving"])
def test_every_reference_and_adapter_starts_at_ln_2(tmp_path, t5_folder, reference):
    knobs = {"reference_alpha": 1.0, "reference_steps": 2} if reference == "moving" else {}
    training = replace(TRAINING, reference=reference, max_steps=3, **knobs)
    train(job(tmp_path / "full", t5_folder, DPO(), training))
    found = losses(tmp_path / "full")
    assert found[0] == pytest.approx(math.log(2), abs=1e-5)
    # Replaced by the policy after step 2, a moving reference lets step 3 start anew.
    assert (found[2] == pytest.approx(math.log(2), abs=1e-5)) is (reference == "moving")
    if reference == "moving":
        return
    lora = replace(MODEL, adapter="lora", adapter_rank=4, adapter_alpha=8.0)
    train(job(tmp_path / "lora", t5_folder, IPO(), training, model=lora))
    assert losses(tmp_path / "lora")[0] == pytest.approx(25.0, abs=1e-3)
    assert losses(tmp_path / "lora")[-1] < 25.0
    adapter = orjson.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_bytes())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"
    old, new = load_file(t5_folder / "model.safetensors"), load_file(tmp_path / "lora" / "model.safetensors")
    assert {name for name in old if not torch.equal(old[name], new[name])} >= {
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.1.layer.1.EncDecAttention.v.weight",
    }
    assert torch.equal(old["lm_head.weight"], new["lm_head.weight"])


def test_an_adapter_may_be_on_a_head_of_its_own_alone(tmp_path, t5_folder):
    lora = replace(MODEL, adapter="lora", adapter_rank=2, adapter_alpha=4.0, adapter_targets=["lm_head"])
    train(job(tmp_path / "untied", t5_folder, DPO(), replace(TRAINING, max_steps=2), model=lora))
    old, new = load_file(t5_folder / "model.safetensors"), load_file(tmp_path / "untied" / "model.safetensors")
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"lm_head.weight"}
    tied = tmp_path / "tied"
    shutil.copytree(t5_folder, tied)
    net: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(T5Config.from_pretrained(t5_folder))
    assert net.lm_head.weight is net.shared.weight
    net.save_pretrained(tied)
    with pytest.raises(ConfigError, match="the head shares its weights with the embeddings"):
        train(job(tmp_path / "run", tied, DPO(), model=lora))


def test_evaluation_reads_the_same_log_probabilities(t5_folder):
    rows = [replace(pair, split=Split.heldout) for pair in pairs()]
    policy = PolicyUnderTest(MODEL, t5_folder, HF(), TRAINING, HARDWARE, seed=0)
    for mine, theirs in zip(policy.pair_logps(rows), own_logps(t5_folder, rows), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_prompt_and_completion_are_cut_together(t5_folder):
    """As for other models: the prompt at its start, no further than needed, then both completions at their ends."""
    template = models.load_template(MODEL, t5_folder)
    training = replace(TRAINING, max_tokens=24, max_prompt_tokens=10)
    (example, *_), counts = encode(pairs(), template, training, pairwise=True)
    whole = template.encode(pairs()[0].messages, pairs()[0].chosen)
    assert counts["truncated"] == 6
    assert example.decoder_start == 0
    assert example.prompt.tolist() == whole.prompt[-len(example.prompt) :]
    assert example.prompt[-1] == template.tokenizer.eos_token_id
    assert len(example.prompt) == 24 - len(whole.completion)
    assert example.chosen.tolist() == whole.completion
