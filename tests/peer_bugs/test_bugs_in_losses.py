"""B01 to B19: bugs of other programs in the loss, each through the real engine. README.md lists them all."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.check import Checker, without_hydra
from prefpipe.components import COMPONENTS
from prefpipe.config import CONF_DIR
from prefpipe.errors import ConfigError
from prefpipe.logps import PairLogps
from prefpipe.losses import DPO, FDPO, IPO, WPO, PairScores
from prefpipe.records import Pair
from prefpipe.run import run
from prefpipe.training.batches import Example
from prefpipe.training.engine import Engine, Frozen
from prefpipe.training.reference import OnlineReference

CPU = torch.device("cpu")
ENGINES = [Engine(CPU, batching, head) for batching in ("padded", "packed", "shared") for head in ("plain", "chunked")]
NAMES = [f"{engine.batching}-{engine.head}" for engine in ENGINES]
PAIRWISE = {name: cls for name, cls in COMPONENTS["loss"].items() if cls.pairwise}
BATCH_WISE = [name for name, cls in COMPONENTS["loss"].items() if cls.batch_wise]
READS = frozenset({"token_logps", "collision", "kl"})


def network(seed: int = 0) -> nn.Module:
    """In float64 all through: this family has no step that falls back to float32 but its rotary angles."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    net = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float64).eval()
    for parameter in net.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return net


def rows() -> list[Example]:
    """Four pairs of unequal lengths; the first completion has one token, the last two share their prompt."""
    rng = np.random.default_rng(0)
    sizes = [(5, 1, 7), (2, 9, 4), (6, 3, 3), (4, 6, 11)]
    made = [Example(i, *(rng.integers(3, 61, n).astype(np.int32) for n in size)) for i, size in enumerate(sizes)]
    made[3] = made[3]._replace(prompt=made[2].prompt)
    return [row._replace(scores=tuple(rng.normal(size=2).tolist())) for row in made]


def scores() -> PairScores:
    return PairScores(*torch.tensor([row.scores for row in rows()], dtype=torch.float64).unbind(1))


@torch.no_grad()
def token_logps(net: nn.Module, prompt: np.ndarray, completion: np.ndarray) -> list[float]:
    """One sequence through the whole model, one token at a time from its logits."""
    ids = [*prompt.tolist(), *completion.tolist()]
    logits = net(input_ids=torch.tensor([ids])).logits[0]
    places = range(len(prompt), len(ids))
    return [(logits[i - 1, ids[i]] - logits[i - 1].logsumexp(0)).item() for i in places]


def measured(net: nn.Module, other: nn.Module, engine: Engine) -> tuple[PairLogps, PairLogps]:
    """Policy and reference with every optional part."""
    for model in (net, other):
        engine.prepare(model)
    frozen = Frozen(other)
    policy = engine.logps(net, rows(), pairwise=True, reads=READS, reference=frozen)
    return policy, OnlineReference(frozen, rows(), engine).logps(range(4), READS)


@functools.cache
def with_the_first_engine(name: str) -> list[float]:
    """The loss of each pair, policy and reference being two models."""
    with torch.no_grad():
        return PAIRWISE[name]()(*measured(network(), network(3), ENGINES[0]), scores()).loss.tolist()


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
def test_b02_ipo_divides_each_pair_by_its_own_lengths(engine: Engine) -> None:
    net, other = network(), network(3)
    expected = []
    for row in rows():
        means = [
            [sum(token_logps(model, row.prompt, side)) / len(side) for model in (net, other)]
            for side in (row.chosen, row.rejected)
        ]
        expected.append((means[0][0] - means[0][1] - means[1][0] + means[1][1] - 1 / (2 * 0.1)) ** 2)
    out = IPO(beta=0.1)(*measured(net, other, engine))
    assert out.loss.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
def test_b03_every_loss_is_finite_where_policy_is_reference(engine: Engine) -> None:
    net, other = network(), network()
    for name, cls in PAIRWISE.items():
        policy, reference = measured(net, other, engine)
        assert torch.equal(policy.chosen, reference.chosen)
        out = cls()(policy, reference, scores())
        slopes = torch.autograd.grad(out.loss.sum(), list(net.parameters()))
        assert out.loss.isfinite().all(), name
        assert all(slope.isfinite().all() for slope in slopes), name


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
def test_b04_no_engine_trains_another_loss_than_the_one_asked_for(engine: Engine) -> None:
    """No two losses agree on these pairs, and each has the same value with every engine."""
    with torch.no_grad():
        policy, reference = measured(network(), network(3), engine)
        found = {name: cls()(policy, reference, scores()).loss.tolist() for name, cls in PAIRWISE.items()}
    for name, values in found.items():
        assert values == pytest.approx(with_the_first_engine(name), rel=1e-10), name
        assert all(values != pytest.approx(others, rel=1e-6) for other, others in found.items() if other != name), name


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_b06_rewards_of_every_divergence_are_0_where_policy_is_reference(divergence: str) -> None:
    policy, reference = measured(network(), network(), ENGINES[0])
    out = FDPO(divergence=divergence)(policy, reference)
    assert out.chosen_rewards.abs().max() < 1e-15
    assert out.rejected_rewards.abs().max() < 1e-15


@pytest.mark.parametrize("name", ["dpo", "ipo", "sft", "tdpo"])
def test_b06_a_divergence_is_refused_with_a_loss_that_has_none(name: str) -> None:
    with pytest.raises(ConfigError, match=r"loss\.divergence; "):
        Checker(CONF_DIR, [CONF_DIR], "config", multirun=False).check(
            ["stage=train", f"loss={name}", "loss.divergence=forward_kl"]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_b07_divergences_are_finite_for_models_of_every_precision(dtype: torch.dtype) -> None:
    """Half-precision numbers, in which e^80 has no place, never reach a loss."""
    logps = ENGINES[0].logps(network().to(dtype), rows(), pairwise=True)
    assert logps.chosen.dtype == logps.rejected.dtype == torch.float64
    ratios = torch.tensor([sign * h for h in (0.0, 1e-3, 1.0, 30.0, 300.0, 1000.0) for sign in (1, -1)]).to(dtype)
    both = torch.cartesian_prod(ratios, ratios).double()
    ones, zeros = torch.ones(len(both), dtype=torch.int64), torch.zeros(len(both), dtype=torch.float64)
    for divergence in ("reverse_kl", "forward_kl", "js", "alpha"):
        chosen, rejected = (side.clone().requires_grad_() for side in both.unbind(1))
        policy, reference = PairLogps(chosen, rejected, ones, ones), PairLogps(zeros, zeros, ones, ones)
        loss = FDPO(divergence=divergence)(policy, reference).loss
        slopes: tuple[Tensor, ...] = torch.autograd.grad(loss.sum(), (chosen, rejected))
        assert loss.isfinite().all()
        assert all(slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
def test_b09_wpo_weighs_by_means_over_tokens_and_sends_no_gradient_through_its_weights(
    engine: Engine, count: int
) -> None:
    net, other, batch = network(), network(3), rows()[:count]
    weights = []
    for row in batch:
        exponent = 0.0
        for side in (row.chosen, row.rejected):
            ids = torch.tensor([[*row.prompt.tolist(), *side.tolist()]])
            with torch.no_grad():
                logps = net(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
            steps = [logps[i, token] - logps[i].exp().square().sum().log() for i, token in enumerate(side.tolist())]
            exponent += sum(step.item() for step in steps) / len(side)
        weights.append(min(1.0, math.exp(exponent)))
    assert all(1e-6 < weight <= 1 for weight in weights)
    for model in (net, other):
        engine.prepare(model)
    policy = engine.logps(net, batch, pairwise=True, reads=WPO.reads)
    reference = OnlineReference(Frozen(other), batch, engine).logps(range(count), WPO.reads)
    wpo = WPO()(policy, reference).loss
    again = engine.logps(net, batch, pairwise=True, reads=WPO.reads)
    weighed = torch.tensor(weights, dtype=torch.float64) * DPO()(again, reference).loss
    assert (wpo > 0).all()
    assert wpo.tolist() == pytest.approx(weighed.tolist(), rel=1e-10)
    mine, theirs = (torch.autograd.grad(loss.sum(), list(net.parameters())) for loss in (wpo, weighed))
    for slope, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BATCH_WISE)
def test_b13_a_loss_of_whole_batches_is_refused_where_a_batch_is_cut(name: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    with artifacts.draft(pairs, Plan("prepare", Pair.schema, uses={})) as draft:
        draft.commit_stream([])
    (cfg,) = Checker(CONF_DIR, [CONF_DIR], "config", multirun=False).check(
        [
            "stage=train",
            f"loss={name}",
            f"inputs.pairs={pairs}",
            f"paths.runs={tmp_path / 'runs'}",
            "training.global_batch_size=8",
            "training.micro_batch_size=4",
        ]
    )
    with pytest.raises(ConfigError, match=r"a global batch cannot be cut: set training\.micro_batch_size=8"):
        run(without_hydra(cfg))
