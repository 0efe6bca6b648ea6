"""Every pairwise loss against formulas written a second time, in mpmath with 150 digits and without torch.

l, r, n, a, h and D are those of prefpipe/losses/__init__.py, c and k those of WPO and TDPO.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
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
    AOT,
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    FDPO,
    IPO,
    LDDPO,
    NCA,
    ORPO,
    RDPO,
    RPO,
    SPPO,
    TDPO,
    WPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BetaDPO,
    CalDPO,
    ChiPO,
    DiscoPOP,
    DPONorm,
    Hinge,
    Loss,
    LossOutput,
    PairLoss,
    PairScores,
    RobustDPO,
    SimPO,
    SLiC,
)

mpmath.mp.dps = 150  # 1 - sigma(200) keeps 60 of them, and a difference of 1e-20 the rest

PAIRWISE: dict[str, type[PairLoss]] = {n: cls for n, cls in COMPONENTS["loss"].items() if issubclass(cls, PairLoss)}


class Row(NamedTuple):
    """One pair: summed log-probabilities under policy and reference, token counts, and what some losses read.

    c: sums of log sum_v p(v)^2; None is l, with which WPO's weight is 1. k: sums of KL(reference || policy). s: scores.
    Of a sum over n tokens, the i-th has the share 2 i / (n (n + 1)).
    """

    l_w: Any
    l_l: Any
    r_w: Any
    r_l: Any
    n_w: int
    n_l: int
    c_w: Any = None
    c_l: Any = None
    k_w: Any = 0.0
    k_l: Any = 0.0
    s_w: Any = 1.5
    s_l: Any = 0.25


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
    target = ((1 if k.labels == "hard" else sigma(p.s_w - p.s_l)) - mpf(1) / 2) / k.beta
    return (p.l_w - p.r_w - target) ** 2 + (p.l_l - p.r_l + target) ** 2


def cal_dpo(p, k):
    h_w, h_l = p.l_w - p.r_w, p.l_l - p.r_l
    return ls(h_w - h_l) + (h_w - 1 / (2 * k.beta)) ** 2 + (h_l + 1 / (2 * k.beta)) ** 2


def rpo(p, k):
    x, y = k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l)), k.eta * (p.s_w - p.s_l)
    if k.distance == "squared":
        return (x - y) ** 2
    from_, to = (y, x) if k.distance == "backward_kl" else (x, y)
    return sum(sigma(z * from_) * (ls(z * to) - ls(z * from_)) for z in (1, -1))


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


def ld_dpo(p, k):
    shared = min(p.n_w, p.n_l)

    def weighted(total, n):
        first, all_ = shared * (shared + 1), n * (n + 1)  # twice the sums of 1 to shared and of 1 to n
        return total * (first + k.alpha * (all_ - first)) / all_

    base_w, base_l = (weighted(p.r_w, p.n_w), weighted(p.r_l, p.n_l)) if k.reference == "both" else (p.r_w, p.r_l)
    return ls(k.beta * (weighted(p.l_w, p.n_w) - base_w - weighted(p.l_l, p.n_l) + base_l))


# (row, knobs, the same row held) → the loss: what has no gradient is read from the row that is held.


def wpo(p, k, held):
    c_w, c_l = (held.l_w if p.c_w is None else p.c_w), (held.l_l if p.c_l is None else p.c_l)
    weight = mpmath.exp((held.l_w - c_w) / p.n_w + (held.l_l - c_l) / p.n_l)
    return min(mpf(1), weight) * ls(k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l)))


def tdpo(p, k, held):
    kl = p.k_l - p.k_w if k.version == 1 else k.alpha * (p.k_l - held.k_w)
    return ls(k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l) - kl))


# (rows of a batch, knobs, the same rows held) → their losses.


def beta_dpo(rows, k, held):
    margins, ours = ([k.beta * ((p.l_w - p.r_w) - (p.l_l - p.r_l)) for p in batch] for batch in (held, rows))
    mean = sum(margins) / len(margins)
    scales = [max(mpf("0.01"), 1 + k.alpha * (m - mean)) for m in margins]
    count = max(1, math.ceil(float(k.keep_fraction) * len(rows) - 1e-9))
    furthest = sorted(abs(m - mean) for m in margins)[count - 1]
    weights = [mpf(abs(m - mean) <= furthest) for m in margins]
    return [w * len(rows) / sum(weights) * ls(scale * m) for w, scale, m in zip(weights, scales, ours, strict=True)]


def smoothed_against_sorted(values, others, k):
    ordered, sorted_values = sorted(others), sorted(values)
    differences = [k.beta * (value - ordered[sorted_values.index(value)]) for value in values]
    return [(1 - k.label_smoothing) * ls(d) + k.label_smoothing * ls(-d) for d in differences]


def aot(rows, k, held):
    return smoothed_against_sorted([p.l_w - p.l_l for p in rows], [p.r_w - p.r_l for p in rows], k)


def aot_unpaired(rows, k, held):
    return smoothed_against_sorted([p.l_w - p.r_w for p in rows], [p.l_l - p.r_l for p in rows], k)


OF_ROWS: dict[str, Callable[[Row, Any], Any]] = {
    formula.__name__: formula
    for group in (
        (dpo, robust, ipo, simpo, dpo_norm, rdpo, dpop, fdpo, chi_po, discopop, ld_dpo, rpo),
        (hinge, exo, nca, bco, sppo, cal_dpo, apo_zero, apo_down, cpo, orpo, slic),
    )
    for formula in group
}
OF_HELD_ROWS: dict[str, Callable[[Row, Any, Row], Any]] = {"wpo": wpo, "tdpo": tdpo}
OF_BATCHES: dict[str, Callable[[list[Row], Any, list[Row]], list[Any]]] = {
    formula.__name__: formula for formula in (beta_dpo, aot, aot_unpaired)
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
    SPPO(beta=0.1, labels="scores"),
    CalDPO(beta=0.1),
    RPO(distance="forward_kl"),
    RPO(beta=0.5, eta=0.3, distance="squared"),
    LDDPO(alpha=0.0),
    LDDPO(alpha=0.3, reference="policy"),
    TDPO(version=1),
    TDPO(alpha=2.0),
    BetaDPO(alpha=2.0, keep_fraction=0.8),
    BetaDPO(alpha=0.05),
    AOT(label_smoothing=0.2),
    AOTUnpaired(label_smoothing=0.2),
]
IDS = [f"{index}-{loss.describe().replace(' ', ',')}" for index, loss in enumerate(VARIANTS)]


def exactly(rows: list[Row]) -> list[Row]:
    """With the exact values of the floats."""
    return [Row(*(value if value is None or isinstance(value, int) else mpf(value) for value in row)) for row in rows]


def expected_losses(loss: PairLoss, rows: list[Row], held: list[Row] | None = None) -> list[Any]:
    """In all digits, from the exact values of the floats; what has no gradient is read from the rows held."""
    values = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)}
    exact = {key: mpf(value) if isinstance(value, float) else value for key, value in values.items()}
    knobs = dataclasses.make_dataclass("Knobs", list(exact))(**exact)
    rows, held = exactly(rows), exactly(held or rows)
    if loss.name in OF_BATCHES:
        compared = OF_BATCHES[loss.name](rows, knobs, held)
    elif loss.name in OF_HELD_ROWS:
        compared = [OF_HELD_ROWS[loss.name](row, knobs, kept) for row, kept in zip(rows, held, strict=True)]
    else:
        compared = [OF_ROWS[loss.name](row, knobs) for row in rows]
    return [value - knobs.nll_weight * row.l_w / row.n_w for value, row in zip(compared, rows, strict=True)]


def expected_loss(loss: PairLoss, row: Row) -> Any:
    """Of one pair."""
    return expected_losses(loss, [row])[0]


def expected_gradient(loss: PairLoss, rows: list[Row], index: int, sides: Sequence[str] = ("l_w", "l_l")) -> list[Any]:
    """Of the sum of the losses, with respect to parts of one row, by central differences of 1e-20.

    They err by 1e-40 times the third derivative.
    """
    step = mpf(10) ** -20
    if loss.name not in OF_BATCHES:
        rows, index = [rows[index]], 0

    def along(side: str) -> Any:
        def moved(shift: Any) -> Any:
            row = rows[index]._replace(**{side: mpf(getattr(rows[index], side)) + shift})
            return sum(expected_losses(loss, [*rows[:index], row, *rows[index + 1 :]], rows))

        return (moved(step) - moved(-step)) / (2 * step)

    return [along(side) for side in sides]


Leaves = dict[str, torch.Tensor]


def tensors(rows: list[Row], dtype: torch.dtype = torch.float64) -> tuple[PairLogps, PairLogps, PairScores, Leaves]:
    """(policy, reference, scores, what has gradients: l_w, l_l, k_w, k_l), each [B]."""
    columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
    columns |= {
        f"c_{side}": [getattr(row, f"l_{side}") if (c := getattr(row, f"c_{side}")) is None else c for row in rows]
        for side in "wl"
    }
    of = {key: torch.tensor(values, dtype=dtype) for key, values in columns.items() if key not in ("n_w", "n_l")}
    leaves = {key: of[key].requires_grad_() for key in ("l_w", "l_l", "k_w", "k_l")}
    n_w, n_l = torch.tensor(columns["n_w"]), torch.tensor(columns["n_l"])

    def tokens(total: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        place = torch.arange(1, int(n.max()) + 1)
        shares = torch.where(place <= n[:, None], 2 * place / (n * (n + 1))[:, None].to(dtype), 0.0)
        return total[:, None] * shares

    policy = PairLogps(
        of["l_w"],
        of["l_l"],
        n_w,
        n_l,
        tokens(of["l_w"], n_w),
        tokens(of["l_l"], n_l),
        of["c_w"],
        of["c_l"],
        of["k_w"],
        of["k_l"],
    )
    reference = PairLogps(of["r_w"], of["r_l"], n_w, n_l, tokens(of["r_w"], n_w), tokens(of["r_l"], n_l))
    return policy, reference, PairScores(of["s_w"], of["s_l"]), leaves


def evaluated(
    loss: Loss, rows: list[Row], dtype: torch.dtype = torch.float64, sides: Sequence[str] = ("l_w", "l_l")
) -> tuple[LossOutput, list[float], list[tuple[float, ...]]]:
    """(output, losses, gradients with respect to the sides)."""
    policy, reference, scores, leaves = tensors(rows, dtype)
    out = loss(policy, reference, scores)
    gradients = torch.autograd.grad(out.loss.sum(), [leaves[side] for side in sides], allow_unused=True)
    columns = [[0.0] * len(rows) if g is None else g.tolist() for g in gradients]
    return out, out.loss.tolist(), list(zip(*columns, strict=True))


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


def completed(rows: Iterator[Row]) -> Iterator[Row]:
    """With collisions that make WPO's weight anything from e^-6 to 1, KLs up to half the log-ratios, and scores."""
    rng = random.Random(1)
    for row in rows:
        c_w, c_l = row.l_w + row.n_w * rng.uniform(-1, 3), row.l_l + row.n_l * rng.uniform(-1, 3)
        k_w, k_l = (rng.uniform(0, 0.5) * abs(h) for h in (row.l_w - row.r_w, row.l_l - row.r_l))
        yield row._replace(c_w=c_w, c_l=c_l, k_w=k_w, k_l=k_l, s_w=rng.gauss(1, 2), s_l=rng.gauss(0, 2))


GRID = list(completed(grid()))


def assert_close(
    rows: list[Row], found: list[float], expected: list[Any], relative: float, conditions: list[Any]
) -> None:
    """Within a relative error, plus what rounding of the inputs alone can do; below 1e-300 float64 ends."""
    for row, value, exact, condition in zip(rows, found, expected, conditions, strict=True):
        allowed = relative * abs(exact) + condition + mpf("1e-300")
        if abs(mpf(value) - exact) > allowed:
            pytest.fail(f"{row}: {value} is not {mpmath.nstr(exact, 17)}, by {mpmath.nstr(mpf(value) - exact, 3)}")


def condition_of(loss: PairLoss, rows: list[Row], index: int, gradient: list[Any]) -> Any:
    """What 1e-15 of the larger of l and r does to a loss, and 1e-15 of the parts where these are of order 1."""
    row, (g_w, g_l) = rows[index], (abs(g) for g in gradient)
    if loss.batch_wise:
        return mpf("4e-15") * (g_w + g_l) * max(-value for other in rows for value in other[:4])
    moved = g_w * max(-row.l_w, -row.r_w) + g_l * max(-row.l_l, -row.r_l)
    difference = abs(row.l_w - row.r_w) + abs(row.l_l - row.r_l)
    parts = 2 + difference * 0.1 + abs(row.s_w - row.s_l) if loss.name in {"robust", "exo", "rpo"} else 0
    return mpf("1e-15") * (moved + parts)


@pytest.mark.parametrize("loss", VARIANTS, ids=IDS)
def test_values_and_gradients_are_those_of_the_formulas(loss: PairLoss) -> None:
    """A loss of batches sees a batch like those of training."""
    rows = GRID[:24] if loss.batch_wise else GRID
    sides = ("l_w", "l_l", "k_w", "k_l")[: 4 if loss.name == "tdpo" else 2]
    _, losses, gradients = evaluated(loss, rows, sides=sides)
    exact = expected_losses(loss, rows)
    slopes = [expected_gradient(loss, rows, index, sides) for index in range(len(rows))]
    conditions = [condition_of(loss, rows, index, slope[:2]) for index, slope in enumerate(slopes)]
    assert_close(rows, losses, exact, 1e-12, conditions)
    for side in range(len(sides)):
        found, wanted = ([of_row[side] for of_row in table] for table in (gradients, slopes))
        assert_close(rows, found, wanted, 1e-12, [mpf("1e-14")] * len(rows))


def test_the_oracle_covers_every_pairwise_loss() -> None:
    assert sorted([*OF_ROWS, *OF_HELD_ROWS, *OF_BATCHES]) == sorted(PAIRWISE)


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
    assert gradient == pytest.approx([float(g) for g in expected_gradient(ORPO(), [row], 0)], rel=1e-12)


SAME = Row(-10.0, -21.0, -10.0, -21.0, 4, 2)
"""Policy = reference; means -2.5 and -10.5; the scores are 1.25 apart."""

PREFERRED = 1 / (1 + math.exp(-1.25))
TILT = PREFERRED - 0.5
ENTROPY = -PREFERRED * math.log(PREFERRED) - (1 - PREFERRED) * math.log(1 - PREFERRED)


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
        (LDDPO(beta=0.2, alpha=0.5), math.log(2), (-0.1 * (0.3 + 0.5 * 0.7), 0.1)),
        (WPO(beta=0.2), math.log(2), (-0.1, 0.1)),
        (TDPO(beta=0.2, version=1), math.log(2), (-0.1, 0.1)),
        (TDPO(beta=0.2), math.log(2), (-0.1, 0.1)),
        (BetaDPO(beta=0.2), math.log(2), (-0.1, 0.1)),
        (AOT(beta=0.2), math.log(2), (-0.1, 0.1)),
        (AOT(beta=0.2, label_smoothing=0.3), math.log(2), (-0.04, 0.04)),
        (AOTUnpaired(beta=0.2), math.log(2), (-0.1, 0.1)),
        (CalDPO(beta=0.1), math.log(2) + 50.0, (-10.5, 10.5)),
        (SPPO(beta=0.2, labels="scores"), 2 * TILT**2 / 0.04, (-2 * TILT / 0.2, 2 * TILT / 0.2)),
        (RPO(beta=0.2, distance="squared"), 1.25**2, (-2 * 0.2 * 1.25, 2 * 0.2 * 1.25)),
        (RPO(beta=0.2), math.log(2) - ENTROPY, (-0.2 * TILT, 0.2 * TILT)),
        (RPO(beta=0.2, distance="forward_kl"), math.log(math.cosh(0.625)), (-0.05 * 1.25, 0.05 * 1.25)),
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
        LDDPO(alpha=1.0),
        LDDPO(alpha=1.0, reference="policy"),
        TDPO(alpha=0.0),
        BetaDPO(alpha=0.0),
    ],
    ids=lambda loss: loss.describe(),
)
def test_with_its_knob_off_a_loss_is_dpo(loss: Loss) -> None:
    assert same(loss, DPO())


def test_wpo_with_weights_of_1_is_dpo_and_without_a_gradient_through_them_a_multiple() -> None:
    assert same(WPO(), DPO(), [row._replace(c_w=None, c_l=None) for row in TRAINING])
    weights = [min(1.0, math.exp((r.l_w - r.c_w) / r.n_w + (r.l_l - r.c_l) / r.n_l)) for r in TRAINING]
    assert 1e-6 < min(weights) < 0.1 < max(weights) == 1
    (_, losses, slopes), (_, plain, plain_slopes) = evaluated(WPO(), TRAINING), evaluated(DPO(), TRAINING)
    assert losses == pytest.approx([w * x for w, x in zip(weights, plain, strict=True)], rel=1e-12)
    for weight, slope, of_dpo in zip(weights, slopes, plain_slopes, strict=True):
        assert slope == pytest.approx([weight * g for g in of_dpo], rel=1e-12)


@pytest.mark.parametrize("confidence", [0.01, 1.0, 10.0])
def test_wpo_of_a_models_own_logits_has_weights_in_0_to_1(confidence: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = confidence * torch.randn(2, 8, 300, 50, dtype=torch.float64, generator=generator)
    logps = logits.log_softmax(-1)
    sampled = torch.multinomial(logps.exp().flatten(0, 2), 1, generator=generator).view(2, 8, 300, 1)
    sums, collision = logps.gather(-1, sampled).sum((2, 3)), (2 * logps).logsumexp(-1).sum(-1)
    tokens = torch.full((8,), 300)
    policy = PairLogps(sums[0], sums[1], tokens, tokens)._replace(
        chosen_collision=collision[0], rejected_collision=collision[1]
    )
    weight = WPO()(policy, policy).loss / math.log(2)
    assert (weight > 1e-6).all()
    assert (weight <= 1).all()


def test_tdpo_without_kl_is_dpo() -> None:
    rows = [row._replace(k_w=0.0, k_l=0.0) for row in TRAINING]
    assert same(TDPO(), DPO(), rows)
    assert same(TDPO(version=1), DPO(), rows)


def test_only_tdpo_1_has_a_gradient_in_the_kl_of_chosen() -> None:
    for loss, of_chosen in ((TDPO(version=1), True), (TDPO(alpha=1.0), False)):
        slopes = evaluated(loss, TRAINING, sides=("k_w", "k_l"))[2]
        assert all(rejected > 0 for _, rejected in slopes)
        assert all((chosen < 0) is of_chosen for chosen, _ in slopes)
    assert evaluated(TDPO(version=1), TRAINING)[1] == evaluated(TDPO(alpha=1.0), TRAINING)[1]


def test_ld_dpo_starts_at_ln_2_at_any_alpha_only_with_the_reference_weighted() -> None:
    start = [row._replace(l_w=row.r_w, l_l=row.r_l) for row in TRAINING]
    for alpha in (0.0, 0.4, 1.0):
        assert evaluated(LDDPO(alpha=alpha), start)[1] == pytest.approx([math.log(2)] * len(start), rel=1e-12)
    longer = [row.n_w != row.n_l for row in start]
    of_policy = evaluated(LDDPO(alpha=0.4, reference="policy"), start)[1]
    assert [loss != pytest.approx(math.log(2), abs=1e-9) for loss in of_policy] == longer
    assert any(longer)


def test_ld_dpo_takes_no_notice_of_the_tail_at_alpha_0() -> None:
    policy, reference, _, _ = tensors([Row(-10.0, -21.0, -12.0, -15.0, 4, 2)])
    tail = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    other = policy._replace(chosen_token_logps=policy.chosen_token_logps - 3 * tail)
    for alpha, equal in ((0.0, True), (0.5, False)):
        assert (
            torch.equal(LDDPO(alpha=alpha)(policy, reference).loss, LDDPO(alpha=alpha)(other, reference).loss) is equal
        )


def test_rpo_is_0_with_no_gradient_where_the_margin_of_rewards_is_that_of_the_scores() -> None:
    """beta D = 0.5 x 2 = 1 = 0.25 x 4 = eta (s_w - s_l); it is above 0 on both sides."""
    at, below, above = (Row(l_w, -5.0, -10.0, -5.0, 4, 2, s_w=5.0, s_l=1.0) for l_w in (-8.0, -8.5, -7.5))
    for distance in ("squared", "forward_kl", "backward_kl"):
        _, losses, slopes = evaluated(RPO(beta=0.5, eta=0.25, distance=distance), [at, below, above])
        assert losses[0] == 0
        assert slopes[0] == pytest.approx((0, 0), abs=1e-16)
        assert min(losses[1:]) > 0
        assert slopes[1][0] < 0 < slopes[2][0]


def test_rpo_with_distant_scores_is_dpo() -> None:
    """Scores far apart are a hard label: KL([1, 0] || [q, 1 - q]) = -log q."""
    assert same(RPO(), DPO(), [row._replace(s_w=1e4, s_l=0.0) for row in TRAINING])


def test_sppo_with_distant_scores_has_hard_labels() -> None:
    assert same(SPPO(labels="scores"), SPPO(), [row._replace(s_w=1e4, s_l=0.0) for row in TRAINING])


def test_cal_dpo_is_sppo_and_dpo_with_beta_1() -> None:
    parts = zip(*(evaluated(loss, TRAINING)[1] for loss in (SPPO(beta=0.1), DPO(beta=1.0))), strict=True)
    assert evaluated(CalDPO(beta=0.1), TRAINING)[1] == pytest.approx([a + b for a, b in parts], rel=1e-12)


def test_aot_and_beta_dpo_of_a_single_pair_are_dpo() -> None:
    for row in TRAINING[:8]:
        for loss in (AOT(), AOTUnpaired(), BetaDPO(), BetaDPO(keep_fraction=0.5)):
            assert same(loss, DPO(), [row])


def test_aot_does_not_know_which_margin_of_the_reference_is_whose() -> None:
    turned = [row._replace(r_w=other.r_w, r_l=other.r_l) for row, other in zip(TRAINING, TRAINING[::-1], strict=True)]
    assert evaluated(AOT(), TRAINING)[1] == pytest.approx(evaluated(AOT(), turned)[1], rel=1e-12)
    assert evaluated(AOTUnpaired(), TRAINING)[1] != pytest.approx(evaluated(AOTUnpaired(), turned)[1], rel=1e-3)


def test_unpaired_aot_does_not_know_which_completions_are_a_pair() -> None:
    turned = [row._replace(l_l=other.l_l, r_l=other.r_l) for row, other in zip(TRAINING, TRAINING[::-1], strict=True)]
    assert evaluated(AOTUnpaired(), TRAINING)[1] == pytest.approx(evaluated(AOTUnpaired(), turned)[1], rel=1e-12)
    assert evaluated(AOT(), TRAINING)[1] != pytest.approx(evaluated(AOT(), turned)[1], rel=1e-3)


def test_aot_by_hand() -> None:
    """Margins 3 and -2 of the policy, 4 and 1 of the reference: 3 meets 4, -2 meets 1."""
    rows = [Row(-2.0, -5.0, -1.0, -2.0, 1, 1), Row(-4.0, -2.0, -1.0, -5.0, 1, 1)]
    assert evaluated(AOT(beta=1.0), rows)[1] == pytest.approx([math.log1p(math.exp(x)) for x in (1, 3)], rel=1e-12)


def test_beta_dpo_by_hand() -> None:
    """M = 0, 1, 5 with mean 2; alpha 0.4: 1 - 0.8, 1 - 0.4, 1 + 1.2. Half of three are the two nearest to 2."""
    rows = [Row(m - 10.0, -10.0, -10.0, -10.0, 1, 1) for m in (0.0, 1.0, 5.0)]
    losses = [math.log1p(math.exp(-x)) for x in (0.2 * 0, 0.6 * 1, 2.2 * 5)]
    assert evaluated(BetaDPO(beta=1.0, alpha=0.4), rows)[1] == pytest.approx(losses, rel=1e-12)
    kept = [1.5 * losses[0], 1.5 * losses[1], 0.0]
    assert evaluated(BetaDPO(beta=1.0, alpha=0.4, keep_fraction=0.5), rows)[1] == pytest.approx(kept, rel=1e-12)
    steep = [math.log1p(math.exp(-x)) for x in (0.01 * 0, 0.01 * 1, 7 * 5)]
    assert evaluated(BetaDPO(beta=1.0, alpha=2.0), rows)[1] == pytest.approx(steep, rel=1e-12)


def test_beta_dpo_keeps_ties_and_so_the_whole_of_a_batch_where_policy_is_reference() -> None:
    start = [row._replace(l_w=row.r_w, l_l=row.r_l) for row in TRAINING]
    assert evaluated(BetaDPO(keep_fraction=0.1), start)[1] == pytest.approx([math.log(2)] * len(start), rel=1e-12)


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
    """Neighbouring fields are the two sides of one thing."""
    return Row(*(row[i ^ 1] for i in range(len(row))))


@pytest.mark.parametrize("name", PAIRWISE)
def test_swapping_the_sides_swaps_the_rewards(name: str) -> None:
    loss = PAIRWISE[name]()
    forward, backward = evaluated(loss, TRAINING)[0], evaluated(loss, [swapped(row) for row in TRAINING])[0]
    assert torch.equal(forward.chosen_rewards, backward.rejected_rewards)
    assert torch.equal(forward.rejected_rewards, backward.chosen_rewards)


@pytest.mark.parametrize(
    "loss",
    [DPO(), DPONorm(), RDPO(), FDPO(), CPO(nll_weight=0.0), LDDPO(), TDPO(version=1)],
    ids=lambda loss: loss.name,
)
def test_swapping_the_sides_adds_the_margin_to_a_logistic_loss(loss: Loss) -> None:
    """ls(-x) - ls(x) = x; the margin of R-DPO has its lengths in it, that of TDPO the KL."""
    out, losses, _ = evaluated(loss, TRAINING)
    margin = out.chosen_rewards - out.rejected_rewards
    if isinstance(loss, RDPO):
        margin = margin + loss.alpha * torch.tensor([float(row.n_w - row.n_l) for row in TRAINING]).double()
    if isinstance(loss, TDPO):
        margin = margin - loss.beta * torch.tensor([row.k_l - row.k_w for row in TRAINING], dtype=torch.float64)
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
    """WPO's collision moves along: the weight is a matter of the policy alone."""
    moved = [
        row._replace(**{f"{part}_{side}": getattr(row, f"{part}_{side}") - 8 for part in "lrc"}) for row in TRAINING
    ]
    before, after = (evaluated(PAIRWISE[name](), rows)[1] for rows in (TRAINING, moved))
    assert after == pytest.approx(before, rel=1e-9, abs=1e-12)


OF_DIFFERENCES = {"dpo", "robust", "ipo", "simpo", "dpo_norm", "rdpo", "discopop", "hinge", "exo", "cpo", "slic"} | {
    *("rpo", "ld_dpo", "tdpo", "beta_dpo", "aot")
}
"""Losses of the difference of the two log-probabilities (or of their means), which is all they see of the policy."""


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_constant_in_both_completions_matters_unless_a_loss_is_one_of_differences(name: str) -> None:
    """With equal lengths, where a constant in the sums is one in the means."""
    loss = PAIRWISE[name](nll_weight=0.0)
    rows = [row._replace(n_w=5, n_l=5) for row in TRAINING]
    moved = [row._replace(l_w=row.l_w - 8 - i, l_l=row.l_l - 8 - i) for i, row in enumerate(rows)]
    before, after = (evaluated(loss, r)[1] for r in (rows, moved))
    assert (after == pytest.approx(before, rel=1e-9, abs=1e-12)) is (name in OF_DIFFERENCES)


@pytest.mark.parametrize("name", [name for name, cls in PAIRWISE.items() if not cls.batch_wise])
def test_a_pair_does_not_know_its_batch(name: str) -> None:
    loss, rows = PAIRWISE[name](), TRAINING[:6]
    singly = [evaluated(loss, [row])[1][0] for row in rows]
    assert evaluated(loss, rows)[1] == pytest.approx(singly, rel=1e-14)


@pytest.mark.parametrize("loss", VARIANTS, ids=IDS)
def test_the_order_of_a_batch_does_not_matter(loss: PairLoss) -> None:
    order = random.Random(2).sample(range(len(TRAINING)), len(TRAINING))
    (_, losses, slopes), (_, others, other_slopes) = (
        evaluated(loss, rows) for rows in (TRAINING, [TRAINING[i] for i in order])
    )
    assert others == pytest.approx([losses[i] for i in order], rel=1e-13)
    for found, i in zip(other_slopes, order, strict=True):
        assert found == pytest.approx(slopes[i], rel=1e-13, abs=1e-300)


# The NLL term.


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_nll_term_is_the_cross_entropy_per_token_of_each_pair(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, dtype=torch.float64, generator=generator)
    labels = torch.randint(11, (3, 6), generator=generator)
    tokens = [6, 1, 3]
    logps = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    chosen = torch.stack([logps[i, :n].sum() for i, n in enumerate(tokens)])
    others = dict.fromkeys(("chosen_collision", "rejected_collision", "chosen_kl", "rejected_kl"), torch.ones(3))
    parts = {"chosen_token_logps": logps, "rejected_token_logps": logps - 0.5, **others}
    policy = PairLogps(chosen, chosen - 3.0, torch.tensor(tokens), torch.tensor([2, 4, 4]), **parts)
    reference = policy._replace(chosen=chosen - 0.5)
    scores = PairScores(torch.ones(3), torch.zeros(3))
    without, with_ = (PAIRWISE[name](nll_weight=weight)(policy, reference, scores) for weight in (0.0, 0.25))
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
    assert [field.name for field in dataclasses.fields(COMPONENTS["loss"]["sft"])] == ["name", "turns"]


# Knobs.

SCALED = [name for name in PAIRWISE if name != "slic"]
CHOICES = {
    ("ipo", "normalize"): ["sum"],
    ("fdpo", "divergence"): ["reverse_kl", "forward_kl", "alpha"],
    ("sppo", "labels"): ["scores"],
    ("rpo", "distance"): ["squared", "forward_kl"],
    ("ld_dpo", "reference"): ["policy"],
}
KNOBS = [
    (name, field.name)
    for name, cls in COMPONENTS["loss"].items()
    for field in dataclasses.fields(cls)
    if field.name != "name" and (name, field.name) != ("sft", "turns")  # chooses tokens: tests/training/test_sft.py
]
FAR = [
    Row(-50.0, -20.0, -20.0, -50.0, 9, 4, k_w=3.0, k_l=7.0),
    Row(-30.0, -45.0, -49.0, -41.0, 9, 4, k_w=3.0, k_l=7.0),
    *TRAINING[:8],
]
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


def test_alpha_of_tdpo_is_refused_where_it_would_be_ignored() -> None:
    with pytest.raises(ConfigError, match=r"loss\.alpha=0\.3 would be ignored with loss\.version=1; drop it, or use"):
        TDPO(version=1, alpha=0.3)
    assert evaluated(TDPO(), FAR)[1] == evaluated(TDPO(alpha=0.5), FAR)[1] != evaluated(TDPO(alpha=0.3), FAR)[1]


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
        ("sppo", {"labels": "soft"}, "loss.labels=soft must be one of hard, scores"),
        ("rpo", {"eta": 0.0}, "loss.eta=0.0 must be above 0"),
        ("rpo", {"distance": "kl"}, "loss.distance=kl must be one of squared, forward_kl, backward_kl"),
        ("ld_dpo", {"alpha": 1.1}, "loss.alpha=1.1 must be in [0, 1]; 1 is DPO"),
        ("ld_dpo", {"reference": "none"}, "loss.reference=none must be one of both, policy"),
        ("tdpo", {"version": 3}, "loss.version=3 must be one of 1, 2"),
        ("tdpo", {"alpha": -1.0}, "loss.alpha=-1.0 must be at least 0"),
        ("beta_dpo", {"alpha": -1.0}, "loss.alpha=-1.0 must be at least 0"),
        ("beta_dpo", {"keep_fraction": 0.0}, "loss.keep_fraction=0.0 must be in (0, 1]; 1 keeps every pair"),
        ("aot", {"label_smoothing": 0.5}, "loss.label_smoothing=0.5 must be in [0, 0.5)"),
        ("aot_unpaired", {"label_smoothing": 0.5}, "loss.label_smoothing=0.5 must be in [0, 0.5)"),
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
