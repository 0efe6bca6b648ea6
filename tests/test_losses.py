"""Losses against numbers by hand, closed forms, float64 finite differences, and each other."""

import math

import pytest
import torch

from prefpipe.components import COMPONENTS
from prefpipe.errors import ConfigError
from prefpipe.logps import PairLogps
from prefpipe.losses import DPO, IPO, SFT, SPPO, Loss, PairScores, SimPO

LOSSES = sorted(COMPONENTS["loss"])
PAIRWISE = [name for name in LOSSES if COMPONENTS["loss"][name].pairwise]

MAY_RISE = {"apo_down": "made to push chosen down where it is above the reference, and rejected further"}
"""Losses that may rise when chosen becomes likelier, and why; tests/test_losses_oracle.py pins what they do."""

WITHIN_REACH = {"slic": {"delta": 20.0}}
"""Knobs with which the generic inputs, 10 nats apart, are not past a margin where the loss reads nothing any more."""


PARTS = ["token_logps", "collision", "kl"]
SCORES = PairScores(torch.tensor([2.0]), torch.tensor([0.5]))


def whole(chosen: torch.Tensor, rejected: torch.Tensor, chosen_tokens: int = 4, rejected_tokens: int = 2) -> PairLogps:
    """One pair with every optional part; its collision moves with its log-probabilities, so WPO's weight does not."""
    return PairLogps(
        chosen,
        rejected,
        torch.tensor([chosen_tokens]),
        torch.tensor([rejected_tokens]),
        chosen_token_logps=chosen[:, None] / chosen_tokens * torch.ones(chosen_tokens),
        rejected_token_logps=rejected[:, None] / rejected_tokens * torch.ones(rejected_tokens),
        chosen_collision=chosen.detach() + 0.5 * chosen_tokens,
        rejected_collision=rejected.detach() + 0.25 * rejected_tokens,
        chosen_kl=torch.tensor([0.5]),
        rejected_kl=torch.tensor([0.75]),
    )


def logps(chosen: float, rejected: float, chosen_tokens: int = 4, rejected_tokens: int = 2) -> PairLogps:
    values = (torch.tensor([v], dtype=torch.float64) for v in (chosen, rejected))
    return whole(*values, chosen_tokens, rejected_tokens)


def stacked(*pairs: PairLogps) -> PairLogps:
    """Several pairs of one shape as a batch."""
    return PairLogps(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))


def test_dpo_by_hand():
    """margin = 0.1 * ((-10 - -12) - (-20 - -15)) = 0.7; loss = log(1 + e^-0.7) = 0.4032"""
    out = DPO(beta=0.1)(logps(-10.0, -20.0), logps(-12.0, -15.0))
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.7)), abs=1e-12)
    assert out.chosen_rewards.item() == pytest.approx(0.2, abs=1e-12)
    assert out.rejected_rewards.item() == pytest.approx(-0.5, abs=1e-12)


@pytest.mark.parametrize(("epsilon", "expected"), [(0.0, 0.598139), (0.1, 0.618139)])
def test_dpo_worked_numbers(epsilon, expected):
    """policy (-12, -15), reference (-13, -14): h = 2; beta 0.1."""
    out = DPO(beta=0.1, label_smoothing=epsilon)(logps(-12.0, -15.0), logps(-13.0, -14.0))
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)


def test_ipo_takes_means_not_sums():
    """(-12/4 - -13/4) - (-15/2 - -14/2) = 0.25 + 0.5 = 0.75; (0.75 - 5)^2 = 18.0625"""
    out = IPO(beta=0.1)(logps(-12.0, -15.0), logps(-13.0, -14.0))
    assert out.loss.item() == pytest.approx(18.0625, abs=1e-12)


def test_ipo_does_not_change_when_every_token_is_doubled():
    once = IPO()(logps(-12.0, -15.0, 4, 2), logps(-13.0, -14.0, 4, 2)).loss
    twice = IPO()(logps(-24.0, -30.0, 8, 4), logps(-26.0, -28.0, 8, 4)).loss
    assert torch.equal(once, twice)


@pytest.mark.parametrize(
    ("beta", "gamma", "means", "expected"),
    [(2.0, 1.0, (-1.0, -1.1), 1.171101), (10.0, 3.0, (-0.8, -1.5), 0.018150), (2.0, 1.0, (-1.0, -1.5), math.log(2))],
)
def test_simpo_worked_numbers(beta, gamma, means, expected):
    policy = logps(means[0] * 4, means[1] * 2)
    assert SimPO(beta=beta, gamma=gamma)(policy, None).loss.item() == pytest.approx(expected, abs=1e-6)
    ratio = SimPO(beta=beta, gamma_beta_ratio=gamma / beta)
    assert ratio(policy, None).loss.item() == pytest.approx(expected, abs=1e-6)
    assert ratio.gamma == pytest.approx(gamma)


def test_simpo_defaults_are_beta_2_and_an_absolute_gamma_of_1():
    loss = SimPO()
    assert (loss.beta, loss.gamma) == (2.0, 1.0)
    equal_means = logps(-4.0, -2.0)
    assert loss(equal_means, None).loss.item() == pytest.approx(math.log1p(math.e), abs=1e-12)


def test_simpo_says_gamma_and_its_ratio():
    assert SimPO(beta=2.5, gamma_beta_ratio=0.55).describe() == "simpo beta=2.5 gamma=1.375 (gamma/beta=0.55)"
    assert DPO().describe() == "dpo beta=0.1 label_smoothing=0.0"


def test_simpo_refuses_two_spellings_of_its_margin():
    with pytest.raises(ConfigError, match=r"loss\.gamma=1\.0 and loss\.gamma_beta_ratio=0\.5"):
        SimPO(gamma=1.0, gamma_beta_ratio=0.5)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_values_where_policy_equals_reference(beta):
    same = logps(-10.0, -20.0)
    assert DPO(beta=beta)(same, same).loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert DPO(beta=beta, label_smoothing=0.3)(same, same).loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert IPO(beta=beta)(same, same).loss.item() == pytest.approx(1 / (4 * beta**2), rel=1e-12)


def test_gradients_where_policy_equals_reference():
    """DPO (-beta/2, +beta/2); IPO -(1/beta) (1/n_w, -1/n_l)."""
    for loss, expected in ((DPO(beta=0.1), (-0.05, 0.05)), (IPO(beta=0.1), (-10 / 4, 10 / 2))):
        start = logps(-10.0, -20.0)
        policy = start._replace(chosen=start.chosen.requires_grad_(), rejected=start.rejected.requires_grad_())
        loss(policy, logps(-10.0, -20.0)).loss.sum().backward()
        assert policy.chosen.grad is not None
        assert policy.rejected.grad is not None
        assert (policy.chosen.grad.item(), policy.rejected.grad.item()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_finite_differences(name):
    loss: Loss = COMPONENTS["loss"][name]()
    reference = logps(-11.0, -19.0)

    def value(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return loss(whole(chosen, rejected), reference, SCORES).loss

    inputs = tuple(torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (-10.0, -20.0))
    if not loss.pairwise:
        inputs = (inputs[0], inputs[1].detach())
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_needs_reference_is_true_exactly_when_the_reference_is_read(name):
    loss, policy = COMPONENTS["loss"][name](), logps(-10.0, -20.0)
    first, second = loss(policy, logps(-12.0, -15.0), SCORES), loss(policy, logps(-9.0, -30.0), SCORES)
    assert torch.equal(first.loss, second.loss) is not loss.needs_reference


@pytest.mark.parametrize("name", LOSSES)
def test_pairwise_is_true_exactly_when_the_rejected_side_is_read(name):
    loss = COMPONENTS["loss"][name](**WITHIN_REACH.get(name, {}))
    first, second = (loss(logps(-10.0, rejected), logps(-11.0, -20.0), SCORES).loss for rejected in (-20.0, -21.0))
    assert torch.equal(first, second) is not loss.pairwise


@pytest.mark.parametrize("name", LOSSES)
def test_reads_says_exactly_which_optional_parts_are_read(name):
    loss, policy, reference = COMPONENTS["loss"][name](), logps(-10.0, -20.0), logps(-12.0, -15.0)
    unread = {f"{side}_{part}": None for side in ("chosen", "rejected") for part in PARTS if part not in loss.reads}
    plain = loss(policy._replace(**unread), reference._replace(**unread), SCORES).loss
    assert torch.equal(plain, loss(policy, reference, SCORES).loss)
    for part in loss.reads:
        other = policy._replace(**{f"chosen_{part}": getattr(policy, f"chosen_{part}") + 1.0})
        assert not torch.equal(plain, loss(other, reference, SCORES).loss), part
    assert loss.reads <= {*PARTS}


@pytest.mark.parametrize("loss", [*(cls() for cls in COMPONENTS["loss"].values()), SPPO(labels="scores")])
def test_needs_scores_is_true_exactly_when_the_scores_are_read(loss):
    pairs = (logps(-10.0, -20.0), logps(-12.0, -15.0))
    first, second = (loss(*pairs, SCORES._replace(chosen=torch.tensor([s]))).loss for s in (1.0, 3.0))
    assert torch.equal(first, second) is not loss.needs_scores
    if not loss.needs_scores:
        assert torch.equal(first, loss(*pairs).loss)


@pytest.mark.parametrize("name", LOSSES)
def test_batch_wise_is_true_exactly_when_another_pair_of_the_batch_is_read(name):
    loss, scores = COMPONENTS["loss"][name](), PairScores(*(s.expand(3) for s in SCORES))
    reference = stacked(logps(-11.0, -19.0), logps(-11.0, -18.0), logps(-14.0, -15.0))
    first, second = (
        loss(stacked(logps(-10.0, -20.0), logps(third, -17.0), logps(third, -18.0)), reference, scores).loss
        for third in (-12.5, -3.0)
    )
    assert torch.equal(first[:1], second[:1]) is not loss.batch_wise


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in MAY_RISE])
def test_loss_falls_when_chosen_becomes_likelier(name):
    chosen = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
    policy = whole(chosen, torch.tensor([-20.0]))
    COMPONENTS["loss"][name]()(policy, logps(-11.0, -20.0), SCORES).loss.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() < 0


@pytest.mark.parametrize("name", LOSSES)
def test_one_value_per_pair_and_detached_rewards(name):
    batch = stacked(*[logps(-10.0, -20.0)] * 3)
    chosen = batch.chosen.clone().requires_grad_()
    policy = batch._replace(chosen=chosen, chosen_token_logps=chosen[:, None] / 4 * torch.ones(4))
    out = COMPONENTS["loss"][name]()(policy, batch, PairScores(*(s.expand(3) for s in SCORES)))
    assert out.loss.shape == out.chosen_rewards.shape == out.rejected_rewards.shape == (3,)
    assert out.loss.requires_grad
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_loss_is_finite_for_any_log_probability(name, scale):
    policy, reference = logps(-10.0 * scale, -20.0 * scale), logps(-20.0 * scale, -10.0 * scale)
    assert torch.isfinite(COMPONENTS["loss"][name]()(policy, reference, SCORES).loss).all()


def test_swapping_the_sides_negates_the_margin():
    forward = DPO()(logps(-10.0, -20.0), logps(-12.0, -15.0))
    backward = DPO()(logps(-20.0, -10.0), logps(-15.0, -12.0))
    margin = forward.chosen_rewards - forward.rejected_rewards
    assert torch.equal(backward.chosen_rewards - backward.rejected_rewards, -margin)
    assert backward.loss.item() == pytest.approx(forward.loss.item() + margin.item(), abs=1e-12)


def test_label_smoothing_changes_the_loss_and_its_range_is_checked():
    args = (logps(-10.0, -20.0), logps(-12.0, -15.0))
    assert DPO(label_smoothing=0.1)(*args).loss != DPO()(*args).loss
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing=0\.5"):
        DPO(label_smoothing=0.5)


@pytest.mark.parametrize("cls", [DPO, IPO, SimPO])
@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_beta_must_be_above_0(cls, beta):
    with pytest.raises(ConfigError, match=r"loss\.beta="):
        cls(beta=beta)


def test_sft_is_the_summed_negative_log_likelihood():
    assert SFT()(logps(-10.0, 0.0), None).loss.item() == 10.0
