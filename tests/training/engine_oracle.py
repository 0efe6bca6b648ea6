"""What the tests of the engine share: random pairs, an oracle that takes one completion at a time, and comparisons."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prefpipe.components import COMPONENTS
from prefpipe.logps import PairLogps
from prefpipe.losses import PairScores
from prefpipe.training.batches import Example
from prefpipe.training.engine import Engine
from prefpipe.training.reference import OnlineReference, Reference
from prefpipe.training.reference_keys import completion_key

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
"""The sizes of every causal model."""
PAIRWISE = {name: cls for name, cls in COMPONENTS["loss"].items() if cls.pairwise}

Forward = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, prompt [P], completion [C]) → log-probabilities of the next token [C, V], and their sum over the targets."""


def random_pairs(
    seed: int, count: int, *, longest: int, first_token: int = 3, decoder_start: int | None = None
) -> list[Example]:
    """Pairs of random tokens below 61; the last two share their prompt, and one completion."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        sides = [rng.integers(first_token, 61, size).astype(np.int32) for size in rng.integers(1, longest, 3)]
        scores = tuple(rng.normal(size=2).tolist())
        made.append(Example(row, *sides, scores=scores, decoder_start=decoder_start))
    made[-1] = made[-1]._replace(prompt=made[-2].prompt, rejected=made[-2].chosen)
    return [e._replace(keys=(completion_key(e.prompt, e.chosen), completion_key(e.prompt, e.rejected))) for e in made]


def one_at_a_time(
    forward: Forward, net: nn.Module, rows: Sequence[Example], reference: nn.Module | None = None
) -> PairLogps:
    """One completion at a time through the model, with all logits and a loop over positions."""
    sums, tables, collisions, kls = [], [], [], []
    for completion, prompt in [(e.chosen, e.prompt) for e in rows] + [(e.rejected, e.prompt) for e in rows]:
        given = torch.from_numpy(prompt).long(), torch.from_numpy(completion).long()
        logps, sum_ = forward(net, *given)
        sums.append(sum_)
        tables.append(torch.stack([logps[i, token] for i, token in enumerate(completion.tolist())]))
        collisions.append(logps.detach().exp().pow(2).sum(-1).log().sum())
        if reference is not None:
            with torch.no_grad():
                other, _ = forward(reference, *given)
            kls.append((other.exp() * (other - logps)).sum())
    table = nn.utils.rnn.pad_sequence(tables, batch_first=True)
    both = [torch.stack(sums), torch.tensor([len(t) for t in tables]), table, torch.stack(collisions)]
    both += [torch.stack(kls)] if kls else []
    (chosen, rejected), (chosen_tokens, rejected_tokens), *others = (part.chunk(2) for part in both)
    return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens, *(side for pair in others for side in pair))


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.requires_grad and p.grad is not None]


def total(name: str, policy: PairLogps, reference: PairLogps, rows: Sequence[Example]) -> Tensor:
    """A loss by name, summed over pairs."""
    loss = PAIRWISE[name]()
    scores = PairScores(*torch.tensor([e.scores for e in rows], dtype=torch.float64).unbind(1))
    return loss(policy, reference, scores if loss.needs_scores else None).loss.sum()


def loss_by_hand(
    name: str, forward: Forward, net: nn.Module, other: nn.Module, rows: Sequence[Example]
) -> tuple[float, list[Tensor]]:
    """Loss and gradients from `one_at_a_time`. other: the reference."""
    with torch.no_grad():
        frozen = one_at_a_time(forward, other, rows)
    loss = total(name, one_at_a_time(forward, net, rows, other), frozen, rows)
    loss.backward()
    return loss.item(), gradients(net)


def assert_gradients(net: nn.Module, slopes: Sequence[Tensor], scale: float = 1.0, hint: str = "") -> None:
    found = gradients(net)
    assert len(found) == len(slopes) > 0
    for mine, theirs in zip(found, slopes, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-10 * max(1.0, scale)), hint


def assert_losses(
    names: Iterable[str],
    engine: Engine,
    net: nn.Module,
    frozen: Reference,
    rows: Sequence[Example],
    expected: Callable[[str], tuple[float, list[Tensor]]],
) -> None:
    """Each loss and its gradients, computed by the engine, are those of `expected`; in float64."""
    second = frozen.frozen if isinstance(frozen, OnlineReference) else None
    for name in names:
        reads = PAIRWISE[name].reads
        if "kl" in reads and second is None:
            continue  # refused: a cache holds no distributions
        net.zero_grad()
        policy = engine.logps(net, rows, pairwise=True, reads=reads, reference=second)
        loss = total(name, policy, frozen.logps(range(len(rows)), reads), rows)
        loss.backward()
        value, slopes = expected(name)
        assert loss.item() == pytest.approx(value, rel=1e-10, abs=1e-10), name
        # Quadratic losses far from their target: contributions of the size of sqrt(loss) that cancel.
        assert_gradients(net, slopes, abs(value) ** 0.5, hint=name)


def assert_other_rows_change_nothing(engine: Engine, net: nn.Module, rows: Sequence[Example]) -> None:
    """Every token of pair 1 becomes another one: the other pairs' numbers stay, bit for bit (trl#2834)."""
    changed = rows[1]._replace(prompt=64 - rows[1].prompt, chosen=64 - rows[1].chosen)
    other = [*rows[:1], changed, *rows[2:]]
    before, after = (engine.logps(net, batch, pairwise=True) for batch in (rows, other))
    kept = [i for i in range(len(rows)) if i != 1]
    assert torch.equal(before.chosen[kept], after.chosen[kept])
    assert torch.equal(before.rejected[kept], after.rejected[kept])
    assert before.chosen[1] != after.chosen[1]
    assert before.rejected[1] != after.rejected[1]  # the same completion after another prompt


def assert_sides_are_apart(engine: Engine, net: nn.Module, rows: Sequence[Example]) -> None:
    """Other rejected tokens leave the chosen side's numbers as they are, bit for bit."""
    other = [e._replace(rejected=64 - e.rejected) for e in rows]
    before, after = (engine.logps(net, batch, pairwise=True) for batch in (rows, other))
    assert torch.equal(before.chosen, after.chosen)
    assert not torch.equal(before.rejected, after.rejected)


def assert_neighbours_do_not_matter(engine: Engine, net: nn.Module, rows: Sequence[Example]) -> None:
    """A pair in a batch of its own has the same numbers."""
    together = engine.logps(net, rows, pairwise=True)
    for i, row in enumerate(rows):
        alone = engine.logps(net, [row], pairwise=True)
        assert alone.chosen.item() == pytest.approx(together.chosen[i].item(), abs=1e-10)
        assert alone.rejected.item() == pytest.approx(together.rejected[i].item(), abs=1e-10)


def assert_checkpointing_changes_no_bit(make: Callable[[], nn.Module], engine: Engine, rows: Sequence[Example]) -> None:
    """Gradients with gradient checkpointing, and without. make: a model in training mode, without dropout."""
    found = []
    for checkpointing in (False, True):
        net = make()
        if checkpointing:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        engine.logps(net, rows, pairwise=True).chosen.sum().backward()
        found.append(gradients(net))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
