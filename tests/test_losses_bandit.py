"""Where training ends: a bandit with two completions, of which raters prefer the first with a known probability.

Its expected loss is minimized to convergence, and the log-ratio margin D of the first completion over the second is
compared with the closed form of the optimum.
"""

import math

import pytest
import torch

from prefpipe.logps import PairLogps
from prefpipe.losses import DPO, EXO, IPO, RPO, DPONorm, Loss, PairScores, RobustDPO

ONE = torch.tensor([1, 1])
REFERENCE = torch.tensor([-0.4, 0.9], dtype=torch.float64).log_softmax(0)


def optimum(loss: Loss, preferred: float, scores: tuple[float, float] = (0.0, 0.0)) -> float:
    """D at the minimum of the expected loss over the policies of the bandit, by L-BFGS from the reference."""
    logits = REFERENCE.clone().requires_grad_()
    weights = torch.tensor([preferred, 1 - preferred], dtype=torch.float64)
    scored = torch.tensor(scores, dtype=torch.float64)
    settings = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 1e-15, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], **settings)

    def expected_loss() -> torch.Tensor:
        """Of the batch of both labels: the first completion chosen, the second chosen."""
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        sides = (PairLogps(logps, logps.flip(0), ONE, ONE) for logps in (policy, REFERENCE))
        value = (weights * loss(*sides, PairScores(scored, scored.flip(0))).loss).sum()
        value.backward()
        return value

    optimizer.step(expected_loss)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6, "not converged"
    ratios = (logits.log_softmax(0) - REFERENCE).tolist()
    return float(ratios[0] - ratios[1])


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize("preferred", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_dpo_ends_at_the_log_odds_of_the_preference(preferred: float, beta: float) -> None:
    """Minus the derivative of p ls(beta D) + (1 - p) ls(-beta D) is beta (p - sigma(beta D))."""
    assert optimum(DPO(beta=beta), preferred) == pytest.approx(logit(preferred) / beta, abs=1e-3)
    assert optimum(DPONorm(beta=beta), preferred) == pytest.approx(logit(preferred) / beta, abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_cdpo_and_exo_end_at_1_minus_epsilon_where_labels_are_certain(epsilon: float, beta: float) -> None:
    for loss in (DPO(beta=beta, label_smoothing=epsilon), EXO(beta=beta, label_smoothing=epsilon)):
        assert 1 / (1 + math.exp(-beta * optimum(loss, 1.0))) == pytest.approx(1 - epsilon, abs=1e-3)
        assert optimum(loss, 1.0) == pytest.approx(logit(1 - epsilon) / beta, abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.1, 0.2])
def test_robust_dpo_ends_at_the_preference_behind_flipped_labels(epsilon: float) -> None:
    """A label that prefers the first with 0.8 is seen with 0.8 (1 - epsilon) + 0.2 epsilon."""
    seen = 0.8 * (1 - epsilon) + 0.2 * epsilon
    assert optimum(RobustDPO(beta=0.5, label_smoothing=epsilon), seen) == pytest.approx(logit(0.8) / 0.5, abs=1e-3)


@pytest.mark.parametrize("preferred", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_ipo_ends_at_the_expected_label_over_two_beta(preferred: float, beta: float, normalize: str) -> None:
    """p (D - 1 / (2 beta))^2 + (1 - p) (D + 1 / (2 beta))^2 is least at (2 p - 1) / (2 beta)."""
    found = optimum(IPO(beta=beta, normalize=normalize), preferred)
    assert found == pytest.approx((2 * preferred - 1) / (2 * beta), abs=1e-3)


@pytest.mark.parametrize("distance", ["squared", "forward_kl", "backward_kl"])
def test_rpo_ends_at_the_margin_of_the_scores_whatever_the_label(distance: str) -> None:
    """beta D = eta (s_1 - s_2), and the pair with the other label says the same."""
    loss = RPO(beta=0.5, eta=0.8, distance=distance)
    for preferred in (0.3, 1.0):
        assert optimum(loss, preferred, (2.5, 0.5)) == pytest.approx(0.8 * 2.0 / 0.5, abs=1e-3)
