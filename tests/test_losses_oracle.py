"""Every pairwise loss against formulas written a second time, in mpmath with 150 digits and without torch.

l, r, n, a, h and D are those of prefpipe/losses.py.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mpmath
import pytest
import torch
from mpmath import mpf
from omegaconf import OmegaConf

from prefpipe.components import COMPONENTS
from prefpipe.config import CONF_DIR
from prefpipe.errors import ConfigError
from prefpipe.logps import PairLogps
from prefpipe.losses import (
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    FDPO,
    IPO,
    NCA,
    ORPO,
    RDPO,
    SPPO,
    APODown,
    APOZero,
    ChiPO,
    DiscoPOP,
    DPONorm,
    Hinge,
    Loss,
    LossOutput,
    PairLoss,
    RobustDPO,
    SimPO,
    SLiC,
)

mpmath.mp.dps = 150  # 1 - sigma(200) keeps 60 of them, and a difference of 1e-20 the rest

PAIRWISE: dict[str, type[PairLoss]] = {name: cls for name, cls in COMPONENTS["loss"].items() if cls.pairwise}


class Row(NamedTuple):
    """One pair: summed log-probabilities under policy and reference, and token counts."""

    l_w: Any
    l_l: Any
    r_w: Any
    r_l: Any
    n_w: int
    n_l: int


def sigma(x):
    return 1 / (1 + mpmath.exp(-x))


def ls(x):
    return mpmath.log1p(mpmath.exp(-x))


def exp_with_tangent(x):
    """e^x, above 80 its tangent at 80."""
    return mpmath.exp(x) if x <= 80 else mpmath.exp(80) * (1 + x - 80)


# name → (row, knobs) → the loss without its NLL term. Knobs come as an object with the fields of the loss.


def dpo(p, k):
    margin = k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l))
    return (1 - k.label_smoothing) * ls(margin) + k.label_smoothing * ls(-margin)


def robust(p, k):
    margin = k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l))
    return ((1 - k.label_smoothing) * ls(margin) - k.label_smoothing * ls(-margin)) / (1 - 2 * k.label_smoothing)


def ipo(p, k):
    n_w, n_l = (p.n_w, p.n_l) if k.normalize == "mean" else (1, 1)
    return ((p.l_w - p.r_w) / n_w - (p.l_l - p.r_l) / n_l - 1 / (2 * k.beta)) ** 2


def simpo(p, k):
    a_w, a_l = p.l_w / p.n_w, p.l_l / p.n_l
    if k.alpha:
        a_w, a_l = ((1 - exp_with_tangent(-k.alpha * a)) / k.alpha for a in (a_w, a_l))
    return ls(k.beta * (a_w - a_l) - k.gamma)


def dpo_norm(p, k):
    return ls(k.beta * ((p.l_w - p.r_w) / p.n_w - (p.l_l - p.r_l) / p.n_l))


def rdpo(p, k):
    return ls(k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l)) + k.alpha * (p.n_w - p.n_l))


def dpop(p, k):
    fallen = p.r_w - p.l_w if p.r_w - p.l_w > mpf("0.001") else 0
    return ls(k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l) - k.dpop_lambda * fallen))


def fdpo(p, k):
    derivative = {
        "reverse_kl": lambda h: h,
        "forward_kl": lambda h: 1 - exp_with_tangent(-h),
        "js": lambda h: mpmath.log(2) - ls(h),
        "alpha": lambda h: (exp_with_tangent((k.alpha - 1) * h) - 1) / (k.alpha - 1) if k.alpha != 1 else h,
    }[k.divergence]
    return ls(k.beta * (derivative(p.l_w - p.r_w) - derivative(p.l_l - p.r_l)))


def chi_po(p, k):
    u_w, u_l = (mpmath.exp(min(h, k.max_log_ratio)) + h for h in (p.l_w - p.r_w, p.l_l - p.r_l))
    margin = k.beta * (u_w - u_l)
    if k.max_margin is not None:
        margin = max(-k.max_margin, min(k.max_margin, margin))
    return ls(margin)


def discopop(p, k):
    x = k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l))
    m = sigma(x / k.tau)
    return (1 - m) * ls(x) + m * mpmath.exp(-x)


def hinge(p, k):
    return max(mpf(0), 1 - k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l)))


def exo(p, k):
    margin = k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l))
    ours, theirs = (sigma(margin), sigma(-margin)), (1 - k.label_smoothing, k.label_smoothing)
    return sum(q * mpmath.log(q / t) for q, t in zip(ours, theirs, strict=True))


def nca(p, k):
    h_w, h_l = p.l_w - p.r_w, p.l_l - p.r_l
    return ls(k.beta * h_w) + ls(-k.beta * h_w) / 2 + ls(-k.beta * h_l) / 2


def bco(p, k):
    h_w, h_l = p.l_w - p.r_w, p.l_l - p.r_l
    return ls(k.beta * h_w - k.delta) + ls(-(k.beta * h_l - k.delta))


def sppo(p, k):
    return (p.l_w - p.r_w - 1 / (2 * k.beta)) ** 2 + (p.l_l - p.r_l + 1 / (2 * k.beta)) ** 2


def apo_zero(p, k):
    return 1 - sigma(k.beta * (p.l_w - p.r_w)) + sigma(k.beta * (p.l_l - p.r_l))


def apo_down(p, k):
    h_w, h_l = p.l_w - p.r_w, p.l_l - p.r_l
    return sigma(k.beta * h_w) + 1 - sigma(k.beta * (h_w - h_l))


def cpo(p, k):
    return ls(k.beta * (p.l_w - p.l_l))


def orpo(p, k):
    odds_w, odds_l = (mpmath.exp(a) / (1 - mpmath.exp(a)) for a in (p.l_w / p.n_w, p.l_l / p.n_l))
    return k.beta * ls(mpmath.log(odds_w / odds_l))


def slic(p, k):
    return max(mpf(0), k.delta - p.l_w + p.l_l)


ORACLE: dict[str, Callable[[Row, Any], Any]] = {
    formula.__name__: formula
    for group in (
        (dpo, robust, ipo, simpo, dpo_norm, rdpo, dpop, fdpo, chi_po, discopop),
        (hinge, exo, nca, bco, sppo, apo_zero, apo_down, cpo, orpo, slic),
    )
    for formula in group
}

VARIANTS: list[PairLoss] = [
    *(cls() for cls in PAIRWISE.values()),
    *(cls(nll_weight=0.3) for cls in PAIRWISE.values()),
    DPO(beta=0.5, label_smoothing=0.2),
    RobustDPO(label_smoothing=0.4),
    IPO(beta=1.0, normalize="sum"),
    SimPO(beta=10.0, gamma_beta_ratio=0.3),
    SimPO(alpha=0.25),
    SimPO(alpha=-0.5),
    RDPO(alpha=0.2),
    DPOP(beta=0.05, dpop_lambda=0.5),
    FDPO(divergence="reverse_kl"),
    FDPO(divergence="forward_kl"),
    FDPO(divergence="alpha"),
    FDPO(divergence="alpha", alpha=0.9),
    FDPO(divergence="alpha", alpha=1.0),
    ChiPO(max_margin=2.0),
    ChiPO(beta=0.01, max_log_ratio=3.0),
    DiscoPOP(tau=5.0),
    EXO(label_smoothing=0.1),
    BCO(delta=-0.7),
    SPPO(beta=0.1),
    SLiC(delta=30.0),
    ORPO(beta=1.0, nll_weight=0.0),
]
IDS = [f"{index}-{loss.describe().replace(' ', ',')}" for index, loss in enumerate(VARIANTS)]


def expected_loss(loss: PairLoss, row: Row) -> Any:
    """In all digits, from the exact values of the floats."""
    values = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)}
    exact = {key: mpf(value) if isinstance(value, float) else value for key, value in values.items()}
    knobs = dataclasses.make_dataclass("Knobs", list(exact))(**exact)
    exact_row = Row(*(mpf(value) for value in row))
    return ORACLE[loss.name](exact_row, knobs) - knobs.nll_weight * exact_row.l_w / exact_row.n_w


def expected_gradient(loss: PairLoss, row: Row) -> tuple[Any, Any]:
    """With respect to l_w and l_l, by central differences of 1e-20, which err by 1e-40 times the third derivative."""
    step = mpf(10) ** -20

    def along(side: str) -> Any:
        here = mpf(getattr(row, side))
        up, down = (expected_loss(loss, row._replace(**{side: here + shift})) for shift in (step, -step))
        return (up - down) / (2 * step)

    return along("l_w"), along("l_l")


def tensors(rows: list[Row], dtype: torch.dtype = torch.float64) -> tuple[PairLogps, PairLogps]:
    """(policy, with gradients, reference), each [B]."""
    l_w, l_l, r_w, r_l = (torch.tensor([row[i] for row in rows], dtype=dtype) for i in range(4))
    n_w, n_l = (torch.tensor([row[i] for row in rows]) for i in (4, 5))
    return PairLogps(l_w.requires_grad_(), l_l.requires_grad_(), n_w, n_l), PairLogps(r_w, r_l, n_w, n_l)


def evaluated(
    loss: Loss, rows: list[Row], dtype: torch.dtype = torch.float64
) -> tuple[LossOutput, list[float], list[tuple[float, float]]]:
    """(output, losses, gradients with respect to (l_w, l_l))."""
    policy, reference = tensors(rows, dtype)
    out = loss(policy, reference)
    gradients = torch.autograd.grad(out.loss.sum(), (policy.chosen, policy.rejected), allow_unused=True)
    of_w, of_l = ([0.0] * len(rows) if g is None else g.tolist() for g in gradients)
    return out, out.loss.tolist(), list(zip(of_w, of_l, strict=True))


def grid() -> Iterator[Row]:
    """Pairs like those of training, pairs far from the reference, and single tokens with probability near 1."""
    rng = random.Random(0)
    for spread in (0.1, 1.0, 5.0, 30.0):
        for _ in range(8):
            n_w, n_l = rng.randint(1, 40), rng.randint(1, 40)
            r_w, r_l = (-n * rng.uniform(0.05, 3.0) for n in (n_w, n_l))
            l_w, l_l = (min(r + rng.gauss(0, spread), -1e-3 * n) for r, n in ((r_w, n_w), (r_l, n_l)))
            yield Row(l_w, l_l, r_w, r_l, n_w, n_l)
    for h_w, h_l in itertools.product((-999.0, -100.5, 99.5, 998.0), repeat=2):
        yield Row(h_w - 1000.25, h_l - 1003.5, -1000.25, -1003.5, 400, 500)
    for a in (-1e-9, math.log1p(-1e-9), -1e-5):
        yield Row(a, -2.5, -0.5, -3.0, 1, 1)
        yield Row(-2.5, a, -0.5, -3.0, 1, 2)


GRID = list(grid())


def assert_close(found: list[float], expected: list[Any], relative: float, conditions: list[Any]) -> None:
    """Within a relative error, plus what rounding of the inputs alone can do; below 1e-300 float64 ends."""
    for row, value, exact, condition in zip(GRID, found, expected, conditions, strict=True):
        allowed = relative * abs(exact) + condition + mpf("1e-300")
        if abs(mpf(value) - exact) > allowed:
            pytest.fail(f"{row}: {value} is not {mpmath.nstr(exact, 17)}")


def condition_of(loss: PairLoss, row: Row, gradient: tuple[Any, Any]) -> Any:
    """What 1e-15 of the larger of l and r does to a loss, and 1e-15 of the parts where these are of order 1."""
    g_w, g_l = (abs(g) for g in gradient)
    moved = g_w * max(-row.l_w, -row.r_w) + g_l * max(-row.l_l, -row.r_l)
    parts = 2 + (abs(row.l_w - row.r_w) + abs(row.l_l - row.r_l)) * 0.1 if loss.name in {"robust", "exo"} else 0
    return mpf("1e-15") * (moved + parts)


@pytest.mark.parametrize("loss", VARIANTS, ids=IDS)
def test_values_and_gradients_are_those_of_the_formulas(loss: PairLoss) -> None:
    _, losses, gradients = evaluated(loss, GRID)
    exact = [expected_loss(loss, row) for row in GRID]
    slopes = [expected_gradient(loss, row) for row in GRID]
    conditions = [condition_of(loss, row, slope) for row, slope in zip(GRID, slopes, strict=True)]
    assert_close(losses, exact, 1e-12, conditions)
    for side in (0, 1):
        assert_close([g[side] for g in gradients], [s[side] for s in slopes], 1e-10, [mpf("1e-14")] * len(GRID))


def test_the_oracle_covers_every_pairwise_loss() -> None:
    assert sorted(ORACLE) == sorted(PAIRWISE)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_finite_up_to_a_thousand_nats_of_log_ratio(name: str, dtype: torch.dtype) -> None:
    ratios = [0.0, 1e-6, 1.0, 30.0, 80.0, 100.0, 710.0, 1000.0]
    both = [sign * h for h in ratios for sign in (1, -1)]
    rows = [Row(h_w - 1000.0, h_l - 1000.0, -1000.0, -1000.0, 7, 3) for h_w in both for h_l in both]
    # DiscoPOP with tau above 1 really grows like e^-x, out of float32.
    variants = [loss for loss in VARIANTS if loss.name == name and not (isinstance(loss, DiscoPOP) and loss.tau > 1)]
    for loss in variants:
        out, losses, gradients = evaluated(loss, rows, dtype)
        assert out.loss.dtype == dtype
        assert all(map(math.isfinite, losses)), loss.describe()
        assert all(math.isfinite(g) for pair in gradients for g in pair), loss.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [0.0, -1e-30, -1e-9, -1e-7, -5.0, -1e3])
@pytest.mark.parametrize("rejected", [0.0, -1e-30, -1e-9, -1e-7, -5.0, -1e3])
def test_orpo_is_finite_where_a_probability_is_1(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    _, (loss,), (gradient,) = evaluated(ORPO(), [Row(chosen, rejected, 0.0, 0.0, 1, 1)], dtype)
    assert math.isfinite(loss)
    assert all(map(math.isfinite, gradient))


def test_orpo_of_a_token_with_probability_1_minus_1e_9() -> None:
    """odds_w = 1e9 and odds_l = 1: the loss is -log(1 - 1e-9) + 0.1 log(1 + 1e-9) = 1.1e-9."""
    row = Row(math.log1p(-1e-9), -math.log(2), 0.0, 0.0, 1, 1)
    _, (loss,), (gradient,) = evaluated(ORPO(), [row])
    assert loss == pytest.approx(1.1e-9, rel=1e-7)
    assert loss == pytest.approx(float(expected_loss(ORPO(), row)), rel=1e-12)
    assert gradient == pytest.approx([float(g) for g in expected_gradient(ORPO(), row)], rel=1e-10)


SAME = Row(-10.0, -21.0, -10.0, -21.0, 4, 2)
"""Policy = reference; means -2.5 and -10.5."""


@pytest.mark.parametrize(
    ("loss", "value", "gradient"),
    [
        (DPO(beta=0.2), math.log(2), (-0.1, 0.1)),
        (DPO(beta=0.2, label_smoothing=0.3), math.log(2), (-0.1 * 0.4, 0.1 * 0.4)),
        (RobustDPO(beta=0.2, label_smoothing=0.3), math.log(2), (-0.1 / 0.4, 0.1 / 0.4)),
        (IPO(beta=0.1), 25.0, (-10 / 4, 10 / 2)),
        (IPO(beta=0.1, normalize="sum"), 25.0, (-10.0, 10.0)),
        (Hinge(beta=0.2), 1.0, (-0.2, 0.2)),
        (EXO(beta=0.2, label_smoothing=0.1), 0.5108256237659907, (-0.05 * math.log(9), 0.05 * math.log(9))),
        (NCA(beta=0.2), 2 * math.log(2), (-0.05, 0.05)),
        (BCO(beta=0.2), 2 * math.log(2), (-0.1, 0.1)),
        (SPPO(beta=0.2), 12.5, (-5.0, 5.0)),
        (APOZero(beta=0.2), 1.0, (-0.05, 0.05)),
        (APODown(beta=0.2), 1.0, (0.0, 0.05)),
        (DiscoPOP(beta=0.2), 0.5 * math.log(2) + 0.5, (0.2 * 0.7842640972002735, -0.2 * 0.7842640972002735)),
        (DPONorm(beta=5.0), math.log(2), (-2.5 / 4, 2.5 / 2)),
        (DPOP(beta=0.2), math.log(2), (-0.1, 0.1)),
        (FDPO(beta=0.2, divergence="reverse_kl"), math.log(2), (-0.1, 0.1)),
        (FDPO(beta=0.2, divergence="forward_kl"), math.log(2), (-0.1, 0.1)),
        (FDPO(beta=0.2, divergence="js"), math.log(2), (-0.05, 0.05)),
        (FDPO(beta=0.2, divergence="alpha", alpha=0.3), math.log(2), (-0.1, 0.1)),
        (ChiPO(beta=0.2), math.log(2), (-0.2, 0.2)),
        (DPO(beta=0.2, nll_weight=0.5), math.log(2) + 0.5 * 2.5, (-0.1 - 0.5 / 4, 0.1)),
    ],
    ids=lambda value: value.describe() if isinstance(value, Loss) else "",
)
def test_values_and_gradients_where_policy_equals_reference(loss: Loss, value: float, gradient: tuple) -> None:
    _, (found,), (slopes,) = evaluated(loss, [SAME])
    assert found == pytest.approx(value, rel=1e-14)
    assert slopes == pytest.approx(gradient, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "row", "value"),
    [
        (SimPO(gamma=1.4), Row(-10.0, -5.0, 0.0, 0.0, 4, 2), math.log1p(math.exp(1.4))),
        (SimPO(gamma=1.4, alpha=0.5), Row(-10.0, -5.0, 0.0, 0.0, 4, 2), math.log1p(math.exp(1.4))),
        (CPO(nll_weight=0.0), Row(-6.0, -6.0, 0.0, 0.0, 4, 2), math.log(2)),
        (CPO(nll_weight=0.7), Row(-6.0, -6.0, 0.0, 0.0, 4, 2), math.log(2) + 0.7 * 1.5),
        (ORPO(beta=0.3), Row(-10.0, -5.0, 0.0, 0.0, 4, 2), 2.5 + 0.3 * math.log(2)),
        (SLiC(delta=1.5, nll_weight=0.7), Row(-6.0, -6.0, 0.0, 0.0, 4, 2), 1.5 + 0.7 * 1.5),
        (RDPO(alpha=0.2), Row(-6.0, -6.0, -6.0, -6.0, 3, 3), math.log(2)),
        (RDPO(alpha=0.2), Row(-6.0, -6.0, -6.0, -6.0, 13, 3), math.log1p(math.exp(-2.0))),
    ],
    ids=lambda value: value.describe() if isinstance(value, Loss) else "",
)
def test_values_of_equal_log_probabilities(loss: Loss, row: Row, value: float) -> None:
    assert evaluated(loss, [row])[1] == pytest.approx([value], rel=1e-14)


def test_the_hand_worked_vector_of_torchtune() -> None:
    """beta 0.1; the margins of rewards are 0, 1 and 2."""
    rows = [
        Row(-0.5, -0.1, -0.5, -0.1, 1, 1),
        Row(-10.0, -30.0, -10.1, -20.1, 1, 1),
        Row(-1.0, -21.0, -0.1, -0.1, 1, 1),
    ]
    assert evaluated(DPO(), rows)[1] == pytest.approx([math.log1p(math.exp(-x)) for x in (0, 1, 2)], rel=1e-12)
    assert evaluated(Hinge(), rows)[1] == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)


def test_the_numbers_of_ms_swift_10167() -> None:
    """One token, beta 0.1, margin 6."""
    row = Row(-1.0, -6.0, -2.0, -1.0, 1, 1)
    for loss, value, slope in ((DPO(), 0.437488, -0.035434), (Hinge(), 0.4, -0.1), (IPO(), 1.0, 2.0)):
        _, (found,), (gradient,) = evaluated(loss, [row])
        assert (found, *gradient) == pytest.approx((value, slope, -slope), abs=5e-7)


def test_hand_worked_sums_of_the_seed_systems() -> None:
    """policy (-12, -15), reference (-13, -14): D = 2; IPO (2 - 5)^2 and SPPO (1 - 5)^2 + (-1 + 5)^2."""
    row = Row(-12.0, -15.0, -13.0, -14.0, 4, 2)
    for loss, value in ((IPO(normalize="sum"), 9.0), (Hinge(), 0.8), (SPPO(beta=0.1), 32.0)):
        assert evaluated(loss, [row])[1] == pytest.approx([value], rel=1e-12)


# Relations between losses.

TRAINING = GRID[:32]


def same(first: Loss, second: Loss, rows: list[Row] = TRAINING, relative: float = 1e-12) -> bool:
    """Whether values and gradients agree."""
    (_, values, slopes), (_, others, other_slopes) = evaluated(first, rows), evaluated(second, rows)
    return values == pytest.approx(others, rel=relative, abs=1e-13) and all(
        pair == pytest.approx(other, rel=relative, abs=1e-13) for pair, other in zip(slopes, other_slopes, strict=True)
    )


@pytest.mark.parametrize(
    "loss",
    [
        DPO(label_smoothing=0.0),
        RobustDPO(label_smoothing=0.0),
        DPOP(beta=0.1, dpop_lambda=0.0),
        RDPO(alpha=0.0),
        FDPO(divergence="reverse_kl"),
        FDPO(divergence="alpha", alpha=1.0),
    ],
    ids=lambda loss: loss.describe(),
)
def test_with_its_knob_off_a_loss_is_dpo(loss: Loss) -> None:
    assert same(loss, DPO())


def test_ends_and_limits_of_knobs() -> None:
    assert same(FDPO(divergence="alpha", alpha=0.0), FDPO(divergence="forward_kl"))
    assert same(FDPO(divergence="alpha", alpha=1 - 1e-9), DPO(), relative=1e-5)
    assert not same(FDPO(divergence="alpha", alpha=0.9), DPO(), relative=1e-5)
    assert same(SimPO(alpha=1e-9), SimPO(), relative=1e-6)
    assert same(ChiPO(max_margin=1e12), ChiPO())


def test_discopop_with_a_wide_change_is_half_dpo_and_half_exponential() -> None:
    for row, loss in zip(TRAINING, evaluated(DiscoPOP(tau=1e12), TRAINING)[1], strict=True):
        x = 0.1 * ((row.l_w - row.r_w) - (row.l_l - row.r_l))
        assert loss == pytest.approx(0.5 * math.log1p(math.exp(-x)) + 0.5 * math.exp(-x), rel=1e-10)


def test_discopop_has_its_minimum_at_minus_0_12_and_its_hump_at_0_07() -> None:
    """x = D with beta 1. Known and documented; what the paper found."""
    positions = [-0.5, -0.2, -0.13, -0.11, 0.0, 0.06, 0.08, 0.5, 5.0]
    rows = [Row(x - 1.0, -1.0, -1.0, -1.0, 1, 1) for x in positions]
    signs = [math.copysign(1, slope) for slope, _ in evaluated(DiscoPOP(beta=1.0), rows)[2]]
    assert signs == [-1, -1, -1, 1, 1, 1, -1, -1, -1]


def test_dpop_is_dpo_where_only_rounding_tells_policy_from_reference() -> None:
    rows = [Row(h - 10.0, -21.0, -10.0, -21.0, 4, 2) for h in (-9e-4, -1e-7, 0.0, 1e-7)]
    assert same(DPOP(), DPO(beta=0.3), rows)
    assert not same(DPOP(), DPO(beta=0.3), [Row(-10.0011, -21.0, -10.0, -21.0, 4, 2)])


def test_dpo_is_simpo_on_single_tokens_with_the_references_margin_as_gamma() -> None:
    for row in TRAINING:
        single = row._replace(n_w=1, n_l=1)
        gamma = 0.1 * (row.r_w - row.r_l)
        assert same(SimPO(beta=0.1, gamma=gamma), DPO(beta=0.1), [single])


def test_dpo_norm_and_ipo_by_sums_are_the_plain_ones_on_single_tokens() -> None:
    single = [row._replace(n_w=1, n_l=1) for row in TRAINING]
    assert same(DPONorm(beta=0.1), DPO(beta=0.1), single)
    assert same(IPO(normalize="sum"), IPO(normalize="mean"), single)


def test_ipo_by_sums_takes_no_notice_of_lengths_and_by_means_none_of_repetition() -> None:
    longer = [row._replace(n_w=row.n_w * 3, n_l=row.n_l * 5) for row in TRAINING]
    assert evaluated(IPO(normalize="sum"), TRAINING)[1] == evaluated(IPO(normalize="sum"), longer)[1]
    doubled = [Row(*(2 * value for value in row)) for row in TRAINING]
    assert evaluated(IPO(), TRAINING)[1] == evaluated(IPO(), doubled)[1]


def swapped(row: Row) -> Row:
    return Row(row.l_l, row.l_w, row.r_l, row.r_w, row.n_l, row.n_w)


@pytest.mark.parametrize("name", PAIRWISE)
def test_swapping_the_sides_swaps_the_rewards(name: str) -> None:
    loss = PAIRWISE[name]()
    forward, backward = evaluated(loss, TRAINING)[0], evaluated(loss, [swapped(row) for row in TRAINING])[0]
    assert torch.equal(forward.chosen_rewards, backward.rejected_rewards)
    assert torch.equal(forward.rejected_rewards, backward.chosen_rewards)


@pytest.mark.parametrize("loss", [DPO(), DPONorm(), RDPO(), FDPO(), CPO(nll_weight=0.0)], ids=lambda loss: loss.name)
def test_swapping_the_sides_adds_the_margin_to_a_logistic_loss(loss: Loss) -> None:
    """ls(-x) - ls(x) = x; the margin of R-DPO has its lengths in it."""
    out, losses, _ = evaluated(loss, TRAINING)
    margin = out.chosen_rewards - out.rejected_rewards
    if isinstance(loss, RDPO):
        margin = margin + loss.alpha * torch.tensor([float(row.n_w - row.n_l) for row in TRAINING]).double()
    backward = evaluated(loss, [swapped(row) for row in TRAINING])[1]
    assert backward == pytest.approx([x + m for x, m in zip(losses, margin.tolist(), strict=True)], abs=1e-12)


def test_swapping_the_sides_swaps_the_weights_of_cdpo() -> None:
    """cDPO(epsilon) of the swapped pair is (1 - epsilon) ls(-x) + epsilon ls(x)."""
    for row, loss in zip(TRAINING, evaluated(DPO(label_smoothing=0.2), [swapped(r) for r in TRAINING])[1], strict=True):
        x = 0.1 * ((row.l_w - row.r_w) - (row.l_l - row.r_l))
        assert loss == pytest.approx(0.8 * math.log1p(math.exp(x)) + 0.2 * math.log1p(math.exp(-x)), rel=1e-12)


@pytest.mark.parametrize("name", [name for name, cls in PAIRWISE.items() if cls.needs_reference])
@pytest.mark.parametrize("side", ["w", "l"])
def test_a_constant_in_policy_and_reference_changes_nothing(name: str, side: str) -> None:
    moved = [
        row._replace(**{f"l_{side}": getattr(row, f"l_{side}") - 8, f"r_{side}": getattr(row, f"r_{side}") - 8})
        for row in TRAINING
    ]
    before, after = (evaluated(PAIRWISE[name](), rows)[1] for rows in (TRAINING, moved))
    assert after == pytest.approx(before, rel=1e-9, abs=1e-12)


OF_DIFFERENCES = {"dpo", "robust", "ipo", "simpo", "dpo_norm", "rdpo", "discopop", "hinge", "exo", "cpo", "slic"}
"""Losses of the difference of the two log-probabilities (or of their means), which is all they see of the policy."""


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_constant_in_both_completions_matters_unless_a_loss_is_one_of_differences(name: str) -> None:
    """With equal lengths, where a constant in the sums is one in the means."""
    loss = PAIRWISE[name](nll_weight=0.0)
    rows = [row._replace(n_w=5, n_l=5) for row in TRAINING]
    moved = [row._replace(l_w=row.l_w - 8, l_l=row.l_l - 8) for row in rows]
    before, after = (evaluated(loss, r)[1] for r in (rows, moved))
    assert (after == pytest.approx(before, rel=1e-9, abs=1e-12)) is (name in OF_DIFFERENCES)


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_pair_does_not_know_its_batch(name: str) -> None:
    loss, rows = PAIRWISE[name](), TRAINING[:6]
    singly = [evaluated(loss, [row])[1][0] for row in rows]
    assert evaluated(loss, rows)[1] == pytest.approx(singly, rel=1e-14)
    assert evaluated(loss, rows[::-1])[1] == pytest.approx(singly[::-1], rel=1e-14)


# The NLL term.


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_nll_term_is_the_cross_entropy_per_token_of_each_pair(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, dtype=torch.float64, generator=generator)
    labels = torch.randint(11, (3, 6), generator=generator)
    tokens = [6, 1, 3]
    logps = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    chosen = torch.stack([logps[i, :n].sum() for i, n in enumerate(tokens)])
    policy = PairLogps(chosen, chosen - 3.0, torch.tensor(tokens), torch.tensor([2, 4, 4]))
    reference = policy._replace(chosen=chosen - 0.5)
    without, with_ = (PAIRWISE[name](nll_weight=weight)(policy, reference) for weight in (0.0, 0.25))
    nll = [torch.nn.functional.cross_entropy(logits[i, :n], labels[i, :n]).item() for i, n in enumerate(tokens)]
    # abs: SPPO's 500,000 of which the term is a small part
    found = ((with_.loss - without.loss) / 0.25).tolist()
    assert found == pytest.approx(nll, rel=1e-12, abs=1e-14 * without.loss.abs().max().item() + 1e-13)
    assert torch.equal(with_.chosen_rewards, without.chosen_rewards)
    assert torch.equal(with_.rejected_rewards, without.rejected_rewards)


def test_the_nll_term_is_said_in_the_log_where_there_is_one() -> None:
    assert DPO(nll_weight=0.5).describe() == "dpo beta=0.1 label_smoothing=0.0 nll_weight=0.5"
    assert ORPO().describe() == "orpo beta=0.1 nll_weight=1.0"
    assert SimPO(alpha=0.25).describe() == "simpo beta=2.0 gamma=1 (gamma/beta=0.5) alpha=0.25"


def test_sft_has_no_nll_weight() -> None:
    assert [field.name for field in dataclasses.fields(COMPONENTS["loss"]["sft"])] == ["name"]


# Knobs.

SCALED = [name for name in PAIRWISE if name != "slic"]
CHOICES = {("ipo", "normalize"): ["sum"], ("fdpo", "divergence"): ["reverse_kl", "forward_kl", "alpha"]}
KNOBS = [
    (name, field.name)
    for name, cls in COMPONENTS["loss"].items()
    for field in dataclasses.fields(cls)
    if field.name != "name"
]
FAR = [Row(-50.0, -20.0, -20.0, -50.0, 9, 4), Row(-30.0, -45.0, -49.0, -41.0, 9, 4), *TRAINING[:8]]
"""Pairs with which every knob has something to do: chosen fallen and risen, lengths unequal, log-ratios to 30."""


@pytest.mark.parametrize(("name", "knob"), KNOBS)
def test_every_knob_changes_the_loss_or_is_refused(name: str, knob: str) -> None:
    cls = COMPONENTS["loss"][name]
    default = getattr(cls(), knob)
    plain = evaluated(cls(), FAR)[1]
    if isinstance(default, str):
        values: list[Any] = CHOICES[name, knob]
    else:
        values = [0.3] if default is None else [default * 1.5, default * 0.5, default + 0.01]
    changed = 0
    for value in values:
        if value == default:
            continue
        try:
            loss = cls(**{knob: value})
        except ConfigError as error:
            assert f"loss.{knob}=" in str(error)
            continue
        assert evaluated(loss, FAR)[1] != plain, f"{knob}={value}"
        changed += 1
    assert changed or (name, knob) == ("fdpo", "alpha")  # that one has a test of its own


def test_alpha_of_fdpo_is_refused_where_it_would_be_ignored() -> None:
    with pytest.raises(ConfigError, match=r"loss\.alpha=0\.3 would be ignored with loss\.divergence=js"):
        FDPO(alpha=0.3)
    half, less = (evaluated(FDPO(divergence="alpha", alpha=alpha), FAR)[1] for alpha in (None, 0.3))
    assert half == evaluated(FDPO(divergence="alpha", alpha=0.5), FAR)[1] != less


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        *((name, {"nll_weight": -0.1}, "loss.nll_weight=-0.1 must be at least 0") for name in PAIRWISE),
        *((name, {"nll_weight": math.nan}, "loss.nll_weight=nan must be at least 0") for name in PAIRWISE),
        *((name, {"beta": 0.0}, "loss.beta=0.0 must be above 0") for name in SCALED),
        *((name, {"beta": -1.0}, "loss.beta=-1.0 must be above 0") for name in SCALED),
        *((name, {"beta": math.inf}, "loss.beta=inf must be above 0") for name in SCALED),
        *((name, {"beta": math.nan}, "loss.beta=nan must be above 0") for name in SCALED),
        ("dpo", {"label_smoothing": 0.5}, "loss.label_smoothing=0.5 must be in [0, 0.5); 0 is plain DPO"),
        ("robust", {"label_smoothing": 0.5}, "loss.label_smoothing=0.5 must be in [0, 0.5); 0 is plain DPO"),
        ("robust", {"label_smoothing": -0.1}, "loss.label_smoothing=-0.1 must be in [0, 0.5)"),
        ("exo", {"label_smoothing": 0.0}, "loss.label_smoothing=0.0 must be in (0, 0.5); at 0 EXO is infinite"),
        ("ipo", {"normalize": "token"}, "loss.normalize=token must be one of mean, sum"),
        ("fdpo", {"divergence": "kl"}, "loss.divergence=kl must be one of reverse_kl, forward_kl, js, alpha"),
        ("fdpo", {"divergence": "alpha", "alpha": 1.5}, "loss.alpha=1.5 must be in [0, 1]"),
        ("rdpo", {"alpha": -0.1}, "loss.alpha=-0.1 must be at least 0"),
        ("dpop", {"dpop_lambda": -1.0}, "loss.dpop_lambda=-1.0 must be at least 0"),
        ("discopop", {"tau": 0.0}, "loss.tau=0.0 must be above 0"),
        ("chi_po", {"max_margin": 0.0}, "loss.max_margin=0.0 must be above 0, or null"),
        ("chi_po", {"max_log_ratio": 700.0}, "loss.max_log_ratio=700.0 must be in (0, 80.0]"),
        ("slic", {"delta": -1.0}, "loss.delta=-1.0 must be at least 0"),
        ("bco", {"delta": math.inf}, "loss.delta=inf must be a reward"),
        ("simpo", {"alpha": math.nan}, "loss.alpha=nan must be 0 for SimPO"),
        ("simpo", {"gamma": math.nan}, "loss.gamma=nan must be"),
    ],
)
def test_a_knob_out_of_range_is_refused_by_its_key(name: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        COMPONENTS["loss"][name](**knobs)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", COMPONENTS["loss"])
def test_the_file_of_a_loss_says_every_knob_and_the_default_of_the_class(name: str) -> None:
    said = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "loss" / f"{name}.yaml"))
    assert isinstance(said, dict)
    del said["defaults"]
    cls = COMPONENTS["loss"][name]
    assert said == {field.name: field.default for field in dataclasses.fields(cls) if field.name != "name"}
