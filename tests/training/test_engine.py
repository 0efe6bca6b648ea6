"""Every way to compute log-probabilities gives the same numbers and gradients, family by family."""

import copy
import functools
from dataclasses import replace
from pathlib import Path

import engine_oracle as oracle
import numpy as np
import pytest
import torch
from engine_oracle import COMMON, CPU, PAIRWISE, gradients, total
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from prefpipe.errors import ConfigError
from prefpipe.settings import HardwareConfig, TrainingConfig
from prefpipe.training import adapters, attention
from prefpipe.training.batches import Example
from prefpipe.training.engine import Engine, Frozen, choose_engine
from prefpipe.training.head import Head
from prefpipe.training.parallel import Parallel
from prefpipe.training.reference import FixedReference, OnlineReference, Reference, cached_values, whole_model
from prefpipe.training.reference_cache import ReferenceCache

FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "llama_tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "mistral": MistralConfig(**COMMON, sliding_window=6),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, sliding_window=5
    ),
    "cohere": CohereConfig(**COMMON, logit_scale=0.3, bos_token_id=1, eos_token_id=2),
    "granite": GraniteConfig(**COMMON, logits_scaling=3.0),
    "biased_head": LlamaConfig(**COMMON),
    "lora_head": LlamaConfig(**COMMON),
    "frozen_head": LlamaConfig(**COMMON),
}
BATCHINGS = ("padded", "packed", "shared")


@pytest.fixture(autouse=True)
def _everything_in_float64(monkeypatch):
    """transformers takes eager attention's softmax in float32 whatever the model's dtype; here it stays in float64."""
    softmax = nn.functional.softmax

    def wide(scores, dim=-1, dtype=None, **kwargs):
        return softmax(scores, dim=dim, dtype=scores.dtype if scores.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(nn.functional, "softmax", wide)


def _wide_norm(module: nn.Module) -> None:
    """So do its norms; the same formula in the dtype of its input."""
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    centred = type(module).__name__.startswith("Cohere")

    def forward(hidden: Tensor) -> Tensor:
        hidden = hidden - hidden.mean(-1, keepdim=True) if centred else hidden
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * (offset + module.weight)

    module.forward = forward


def model(family: str, kernel: str = "sdpa", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    kernel = "eager" if family == "gemma2" else kernel
    net = AutoModelForCausalLM.from_config(
        copy.deepcopy(FAMILIES[family]), attn_implementation=kernel, dtype=torch.float64
    ).eval()
    for module in net.modules():
        if "Norm" in type(module).__name__:
            nn.init.normal_(module.weight, 0.0 if "Gemma" in type(module).__name__ else 1.0, 0.1)
            _wide_norm(module)
    if family == "biased_head":
        net.lm_head = nn.Linear(32, 61, dtype=torch.float64)
    if family == "frozen_head":
        net.lm_head.requires_grad_(False)
    if family == "lora_head":
        net = get_peft_model(net, LoraConfig(r=3, target_modules=["q_proj", "lm_head"], lora_dropout=0.0))
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return net


def examples(seed: int = 0, count: int = 5) -> list[Example]:
    return oracle.random_pairs(seed, count, longest=12)


def forward(net: nn.Module, prompt: Tensor, completion: Tensor) -> tuple[Tensor, Tensor]:
    """The whole sequence through the model; see engine_oracle.Forward."""
    ids = torch.cat([prompt, completion])[None]
    at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    logps = net(input_ids=ids).logits[0, at].log_softmax(-1)
    return logps, logps.gather(-1, completion[:, None]).sum()


by_hand = functools.partial(oracle.one_at_a_time, forward)


def prepared(net: nn.Module, engine: Engine) -> nn.Module:
    engine.prepare(net.get_base_model() if hasattr(net, "get_base_model") else net)
    return net


def reference_of(kind: str, family: str, engine: Engine, rows: list[Example], folder: Path) -> Reference:
    net = prepared(model(family, seed=1), engine)
    if kind == "online":
        return OnlineReference(Frozen(net), rows, engine)
    cache = ReferenceCache(folder, weights=family, precision="fp64")
    training = TrainingConfig(micro_batch_size=2)
    alone = Parallel(HardwareConfig(name="cpu", device="cpu", precision="fp32"), training, CPU)
    values = cached_values(
        net, rows, engine, cache=cache, training=training, snapshot=folder / "run.safetensors", parallel=alone
    )
    return FixedReference.of_values(values, CPU)


@functools.cache
def expected(family: str, name: str) -> tuple[float, list[Tensor]]:
    return oracle.loss_by_hand(name, forward, model(family), model(family, seed=1), examples())


@pytest.mark.parametrize("reference", ["online", "cached"])
@pytest.mark.parametrize("head", ["plain", "chunked"])
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_engine_gives_every_loss_and_its_gradients(family, batching, head, reference, monkeypatch, tmp_path):
    """loss x batching x head x reference x family, against one completion at a time, in float64.

    Every loss on one family, and on the others those that read something different of the log-probabilities.
    """
    monkeypatch.setattr("prefpipe.training.head.TILE_BYTES", 4 * 61 * 16)  # tiles of 16 tokens: several of them
    engine, rows = Engine(CPU, batching, head), examples()
    net = prepared(model(family), engine)
    frozen = reference_of(reference, family, engine, rows, tmp_path)
    names = PAIRWISE if family == "llama" else ("dpo", "ipo", "simpo", "ld_dpo", "wpo", "tdpo")
    oracle.assert_losses(names, engine, net, frozen, rows, functools.partial(expected, family))


@pytest.mark.parametrize("head", ["plain", "chunked"])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_float32_keeps_five_digits(batching, head):
    engine, rows = Engine(CPU, batching, head), examples(6)
    value, slopes = None, None
    exact = model("llama")
    total("dpo", by_hand(exact, rows), by_hand(model("llama", seed=1), rows), rows).backward()
    slopes = gradients(exact)
    net, other = prepared(model("llama").float(), engine), prepared(model("llama", seed=1).float(), engine)
    value = total(
        "dpo",
        engine.logps(net, rows, pairwise=True),
        OnlineReference(Frozen(other), rows, engine).logps(range(5), frozenset()),
        rows,
    )
    value.backward()
    for mine, theirs in zip(gradients(net), slopes, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("batching", BATCHINGS)
def test_other_documents_change_nothing_bit_for_bit(batching):
    engine = Engine(CPU, batching)
    oracle.assert_other_rows_change_nothing(engine, prepared(model("llama"), engine), examples(3))


@pytest.mark.parametrize("batching", BATCHINGS)
def test_one_side_cannot_see_the_other(batching):
    engine = Engine(CPU, batching)
    oracle.assert_sides_are_apart(engine, prepared(model("llama"), engine), examples(3)[:3])


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_pair_does_not_depend_on_its_neighbours(batching):
    engine = Engine(CPU, batching)
    oracle.assert_neighbours_do_not_matter(engine, prepared(model("llama"), engine), examples(2))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 1), (1, 1, 5), (9, 1, 1)])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_shortest_prompts_and_completions(sizes, batching):
    row = Example(0, *(np.arange(1, n + 1, dtype=np.int32) for n in sizes))
    expected = by_hand(model("llama"), [row])
    engine = Engine(CPU, batching)
    out = engine.logps(prepared(model("llama"), engine), [row], pairwise=True)
    assert (out.chosen.item(), out.rejected.item()) == pytest.approx((expected.chosen.item(), expected.rejected.item()))


@pytest.mark.parametrize("batching", BATCHINGS)
def test_all_logps_keep_the_order_of_the_examples(batching):
    rows = examples(4, count=9)
    expected = by_hand(model("llama"), rows)
    engine = Engine(CPU, batching)
    out = engine.all_logps(prepared(model("llama"), engine), rows, TrainingConfig(micro_batch_size=2))
    assert out.chosen.tolist() == pytest.approx(expected.chosen.tolist(), rel=1e-6)
    assert out.rejected.tolist() == pytest.approx(expected.rejected.tolist(), rel=1e-6)


def test_sft_reads_only_the_chosen_side():
    net, rows = model("llama"), examples(5)
    expected = by_hand(net, rows).chosen.tolist()
    for batching in BATCHINGS:
        engine = Engine(CPU, batching)
        bare = [e._replace(rejected=e.rejected[:0]) for e in rows]
        out = engine.logps(prepared(net, engine), bare, pairwise=False)
        assert out.chosen.tolist() == pytest.approx(expected, abs=1e-9)
        assert out.rejected.tolist() == [0.0] * len(rows)


def test_gradient_checkpointing_attends_by_documents_in_the_backward_pass_too():
    engine = Engine(CPU, "shared")
    oracle.assert_checkpointing_changes_no_bit(lambda: prepared(model("llama").train(), engine), engine, examples())


def test_chunked_and_frozen_heads_keep_no_logits_for_the_backward_pass():
    """Bytes that autograd holds on to between the passes, of 96 completion tokens and 61 words."""
    held = {}
    for family, head in (("llama", "plain"), ("llama", "chunked"), ("frozen_head", "plain")):
        net, engine = model(family), Engine(CPU, "packed", head)
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.logps(prepared(net, engine), examples(1), pairwise=True)
        logits = [t.shape[0] for t in saved if t.ndim == 2 and t.shape[1] == 61]
        held[family, head] = max(logits, default=0)
    assert held["llama", "plain"] > 0
    assert held["llama", "chunked"] == held["frozen_head", "plain"] == 0


def with_lora(net: nn.Module, *, dora: bool) -> nn.Module:
    """With an adapter that changes something, as one that has learned does."""
    net = get_peft_model(net, LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.0, use_dora=dora))
    learn(net, 1)
    return net


def learn(net: nn.Module, seed: int) -> None:
    """Other values for everything that is trained."""
    torch.manual_seed(seed)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_copy_of_the_adapter_is_the_reference_that_a_second_model_would_be(batching, dora):
    """alpha = 1: the adapter that follows, against a whole model that follows the policy with its adapter merged.

    Log-probabilities, and loss and gradients of TDPO, which reads the reference while the policy's graph is held.
    """
    engine, rows, name = Engine(CPU, batching), examples(), "tdpo"
    policy = prepared(with_lora(model("llama"), dora=dora), engine)
    following = adapters.add_reference(policy)
    names = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert {n.replace(".reference", ".default") for n in following} == names
    copy_of_adapter = OnlineReference(
        Frozen(policy, functools.partial(adapters.reference_on, policy)),
        rows,
        engine,
        following=following,
        alpha=1.0,
        every=2,
    )
    second = prepared(model("llama", seed=7), engine).requires_grad_(False)
    for step in range(4):  # the policy moves at each step, the reference after every second
        learn(policy, seed=step)
        if step in (1, 3):
            merged = copy.deepcopy(policy).merge_and_unload(adapter_names=["default"])
            OnlineReference(Frozen(second), rows, engine, following=whole_model(second, merged), alpha=1.0).follow(1)
        copy_of_adapter.follow(step + 1)
        if step == 0:
            continue
        found = []
        for reference in (copy_of_adapter, OnlineReference(Frozen(second), rows, engine)):
            policy.zero_grad()
            frozen = reference.logps(range(len(rows)), frozenset({"token_logps"}))
            reads = PAIRWISE[name].reads
            logps = engine.logps(policy, rows, pairwise=True, reads=reads, reference=reference.frozen)
            loss = total(name, logps, frozen, rows)
            loss.backward()
            found.append((frozen, loss.detach(), gradients(policy)))
        (mine, loss, slopes), (theirs, expected_loss, expected_slopes) = found
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
        assert len(slopes) == len(names)
        torch.testing.assert_close(slopes, expected_slopes, rtol=1e-9, atol=1e-10)
        for part in ("chosen", "rejected", "chosen_token_logps", "rejected_token_logps"):
            torch.testing.assert_close(getattr(mine, part), getattr(theirs, part), rtol=1e-10, atol=1e-10)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == names


def test_with_a_smaller_alpha_the_factors_move_that_far():
    policy = with_lora(model("llama"), dora=False)
    following = adapters.add_reference(policy)
    before = {name: mine.clone() for name, (mine, _) in following.items()}
    learn(policy, seed=3)
    OnlineReference(Frozen(policy), [], Engine(CPU), following=following, alpha=0.25, every=1).follow(1)
    for name, (mine, theirs) in following.items():
        torch.testing.assert_close(mine, 0.25 * theirs + 0.75 * before[name], rtol=1e-12, atol=1e-12)
        assert not torch.equal(mine, before[name])


def test_auto_shares_prompts_where_the_family_allows_it():
    for family in ("llama", "gemma2", "mistral", "qwen3"):
        assert choose_engine(TrainingConfig(), model(family), examples(), device=CPU) == Engine(CPU, "shared")


def test_a_family_that_overlooks_documents_is_found_out(monkeypatch, caplog):
    """An attention that forgets the borders: "auto" falls back to padded, "shared" refuses."""

    def forgetful(module, query, key, value, mask, *, documents, **kwargs):
        whole = [attention.Document(0, query.shape[2])]
        return real(module, query, key, value, mask, documents=whole, **kwargs)

    real = attention.documents_attention
    monkeypatch.setattr(attention, "documents_attention", forgetful)
    caplog.set_level("INFO")
    assert choose_engine(TrainingConfig(), model("llama"), examples(), device=CPU) == Engine(CPU, "padded")
    assert "batching shared: its log-probabilities differ from the model's own" in caplog.text
    with pytest.raises(ConfigError, match=r"training\.batching=shared: its log-probabilities differ"):
        choose_engine(TrainingConfig(batching="shared"), model("llama"), examples(), device=CPU)


def test_a_head_that_ours_does_not_reproduce_is_left_to_the_model(monkeypatch):
    net, rows = model("cohere"), examples()
    monkeypatch.setattr(Head, "of", classmethod(lambda cls, model: cls(model.get_output_embeddings())))
    engine = choose_engine(TrainingConfig(), net, rows, device=CPU)
    assert engine == Engine(CPU, "shared", own_logits=True)
    expected = by_hand(model("cohere"), rows).chosen.tolist()
    assert engine.logps(net, rows, pairwise=True).chosen.tolist() == pytest.approx(expected)
    assert replace(engine, own_logits=False).logps(net, rows, pairwise=True).chosen.tolist() != pytest.approx(expected)
