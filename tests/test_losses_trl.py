"""Every loss that TRL has against TRL's own code: trl_losses.py runs its trainers in an environment with its wheel.

TRL 1.12 computes at the precision of its input, here float64; TRL 1.16 in float32 in parts, whatever comes in.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.testing import assert_close

from prefpipe.logps import PairLogps
from prefpipe.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    FDPO,
    IPO,
    LDDPO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    WPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    DPONorm,
    Hinge,
    Loss,
    LossOutput,
    PairLoss,
    RobustDPO,
    SimPO,
)

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 16
Batch = dict[str, Tensor]


class Case(NamedTuple):
    """A loss, and the trainer and its settings by which TRL has it.

    exact: whether TRL computes it in float64 where its input is.
    """

    loss: Loss
    knobs: dict[str, Any]
    trainer: str = "dpo"
    batch: str = "ragged"
    exact: bool = True

    @property
    def name(self) -> str:
        knobs = ",".join(f"{key}={value}" for key, value in self.knobs.items())
        return f"{self.trainer}:{knobs}:{self.batch}".replace(" ", "")


def dpo(loss: Loss, loss_type: str, batch: str = "ragged", *, exact: bool = True, **knobs: Any) -> Case:
    """With the loss's beta, and its NLL term by TRL's list of losses."""
    types: dict[str, Any] = {"loss_type": [loss_type]}
    if weight := getattr(loss, "nll_weight", 0.0):
        types = {"loss_type": [loss_type, "sft"], "loss_weights": [1.0, weight]}
    return Case(loss, {**types, "beta": getattr(loss, "beta", 0.1), **knobs}, "dpo", batch, exact)


def cpo(loss: CPO | SimPO, batch: str = "ragged") -> Case:
    """By CPOTrainer, with every knob of the loss."""
    knobs: dict[str, Any] = {"beta": loss.beta, "cpo_alpha": loss.nll_weight, "loss_type": "sigmoid"}
    if isinstance(loss, SimPO):
        knobs |= {"loss_type": "simpo", "simpo_gamma": loss.gamma, "alpha": loss.alpha}
    return Case(loss, knobs, "cpo", batch)


def orpo(loss: ORPO, batch: str) -> Case:
    """By ORPOTrainer, which goes to float32 by itself."""
    return Case(loss, {"beta": loss.beta}, "orpo", batch, exact=False)


def f_dpo(divergence: str, theirs: str, alpha: float | None = None, batch: str = "ragged") -> Case:
    """TRL has the alpha-divergence in float32 only."""
    knobs = {"f_divergence_type": theirs} | ({} if alpha is None else {"f_alpha_divergence_coef": alpha})
    return dpo(FDPO(divergence=divergence, alpha=alpha), "sigmoid", batch, exact=alpha is None, **knobs)


SAME = [
    dpo(DPO(), "sigmoid"),
    dpo(DPO(beta=0.5), "sigmoid"),
    dpo(RobustDPO(label_smoothing=0.2), "robust", label_smoothing=0.2),
    dpo(IPO(), "ipo"),
    dpo(DPONorm(), "sigmoid_norm"),
    dpo(Hinge(beta=0.5), "hinge"),
    dpo(EXO(), "exo_pair", label_smoothing=1e-3),
    dpo(EXO(label_smoothing=0.1), "exo_pair", label_smoothing=0.1),
    dpo(NCA(), "nca_pair"),
    dpo(BCO(), "bco_pair"),
    dpo(SPPO(), "sppo_hard"),
    dpo(SPPO(beta=0.1), "sppo_hard"),
    dpo(AOT(), "aot"),
    dpo(AOT(label_smoothing=0.2), "aot", label_smoothing=0.2),
    dpo(AOTUnpaired(), "aot_unpaired"),
    dpo(AOTUnpaired(label_smoothing=0.2), "aot_unpaired", label_smoothing=0.2),
    dpo(APOZero(), "apo_zero"),
    dpo(APODown(), "apo_down"),
    dpo(DiscoPOP(), "discopop"),
    dpo(DiscoPOP(tau=1.0), "discopop", discopop_tau=1.0),
    f_dpo("reverse_kl", "reverse_kl"),
    f_dpo("forward_kl", "forward_kl"),
    f_dpo("js", "js_divergence"),
    f_dpo("alpha", "alpha_divergence", 0.5),
    f_dpo("alpha", "alpha_divergence", 0.3),
    *(dpo(LDDPO(alpha=alpha), "sigmoid", ld_alpha=alpha) for alpha in (0.0, 0.5, 1.0)),
    dpo(WPO(), "sigmoid", "even", use_weighting=True),
    cpo(CPO(nll_weight=0.0)),
    cpo(SimPO()),
    cpo(SimPO(beta=2.5, gamma_beta_ratio=0.3)),
    cpo(SimPO(alpha=0.25)),
    # With as many tokens in every completion and prompts of one token, an NLL is the same mean for all.
    dpo(DPO(nll_weight=0.7), "sigmoid", "even"),
    dpo(IPO(nll_weight=0.7), "ipo", "even"),
    dpo(APOZero(nll_weight=0.7), "apo_zero", "even"),
    dpo(BCO(nll_weight=0.7), "bco_pair", "even"),
    cpo(CPO(), "even"),
    cpo(SimPO(nll_weight=1.0), "even"),
    orpo(ORPO(), "even"),
    orpo(ORPO(beta=1.0), "even"),
]
RAGGED_NLL = [
    dpo(DPO(nll_weight=0.7), "sigmoid"),
    dpo(SPPO(beta=0.1, nll_weight=0.7), "sppo_hard"),
    cpo(CPO()),
    cpo(SimPO(nll_weight=1.0)),
    orpo(ORPO(), "ragged"),
]
ONLY_NLL = dpo(SFT(), "sft")
SMOOTHED = dpo(DPO(label_smoothing=0.2), "sigmoid", label_smoothing=0.2)
WEIGHTED = dpo(WPO(), "sigmoid", use_weighting=True)
FAR_DISCOPOP = dpo(DiscoPOP(beta=1.0), "discopop", "far", exact=False)
FAR_ALPHA = f_dpo("alpha", "alpha_divergence", 0.0, "far")
CASES = {case.name: case for case in [*SAME, *RAGGED_NLL, ONLY_NLL, SMOOTHED, WEIGHTED, FAR_DISCOPOP, FAR_ALPHA]}
BY_NAME = {"argvalues": SAME, "ids": [f"{case.loss.describe()}-{case.batch}".replace(" ", ",") for case in SAME]}


# Inputs.


def batch_of(seed: int, prompts: Tensor, lengths: Tensor, sharpness: float, distance: float) -> Batch:
    """Chosen rows, then rejected ones, in numbers that float32 has too.

    prompts, lengths: [2 B] tokens each. sharpness: tokens are drawn from softmax(sharpness * logits), so that 1 is
    what the policy would write and 0 anything. distance: standard deviation of the reference's logits from its own.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns, vocabulary = len(prompts), int((prompts + lengths).max()), 24
    logits, noise = torch.randn(2, rows, columns, vocabulary, generator=generator)
    logits = 2.0 * logits
    drawn = torch.multinomial((sharpness * logits).softmax(-1).flatten(0, 1), 1, generator=generator)
    place = torch.arange(columns)
    ends = (prompts + lengths)[:, None]
    return {
        "logits": logits.double(),
        "ref_logits": (logits + distance * noise).double(),
        "input_ids": drawn.view(rows, columns).roll(1, dims=1),
        "attention_mask": (place < ends).long(),
        "completion_mask": ((place >= prompts[:, None]) & (place < ends)).long(),
    }


def batches() -> dict[str, Batch]:
    """ragged: as in training. even: one length, prompts of one token, tokens that the policy would not write. far: as
    ragged, but written by the reference, from which the policy has gone hundreds of nats away.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 7, (PAIRS,), generator=generator).repeat(2)
    lengths = torch.randint(1, 41, (2 * PAIRS,), generator=generator)
    same = torch.ones(2 * PAIRS, dtype=torch.long)
    far = batch_of(3, prompts, lengths, sharpness=1.0, distance=20.0)
    return {
        "ragged": batch_of(1, prompts, lengths, sharpness=1.2, distance=0.4),
        "even": batch_of(2, same, 12 * same, sharpness=0.0, distance=0.4),
        "far": {**far, "logits": far["ref_logits"], "ref_logits": far["logits"]},
    }


BATCHES = batches()


# prefpipe's side.


def logps_of(logits: Tensor, batch: Batch) -> PairLogps:
    """From logits [2 B, T, V], in plain terms."""
    full = logits[:, :-1].log_softmax(-1)
    labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    tokens = full.gather(-1, labels[..., None])[..., 0] * mask
    collision = ((2 * full.detach()).logsumexp(-1) * mask).sum(-1)
    first = batch["completion_mask"].argmax(-1)[:, None] - 1
    moved = tokens.gather(1, (torch.arange(tokens.shape[1]) + first).clamp(max=tokens.shape[1] - 1))
    behind = torch.arange(tokens.shape[1]) >= mask.sum(-1)[:, None]
    parts = (tokens.sum(-1), mask.sum(-1), moved.masked_fill(behind, 0.0), collision)
    return PairLogps(*(side for part in parts for side in part.chunk(2)))


class Ours(NamedTuple):
    """gradient: of the mean over pairs, with respect to the logits, [2 B, T, V]."""

    out: LossOutput
    gradient: Tensor
    policy: PairLogps
    reference: PairLogps

    @property
    def mean(self) -> float:
        return self.out.loss.mean().item()

    @property
    def mean_rewards(self) -> list[float]:
        return [self.out.chosen_rewards.mean().item(), self.out.rejected_rewards.mean().item()]


def ours(loss: Loss, name: str) -> Ours:
    """In float64."""
    batch = BATCHES[name]
    logits = batch["logits"].clone().requires_grad_()
    policy, reference = logps_of(logits, batch), logps_of(batch["ref_logits"], batch)
    out = loss(policy, reference)
    (gradient,) = torch.autograd.grad(out.loss.mean(), logits)
    return Ours(out, gradient, *(PairLogps(*map(detached, logps)) for logps in (policy, reference)))


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


# TRL's side.


def packages(version: str) -> Path:
    """A folder with TRL's wheel alone: what it needs is here already. Kept under .cache; made whole or not at all."""
    folder = ROOT / ".cache" / f"trl-{version}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=folder.parent) as made:
        if not folder.exists():
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            download = ["download", "--no-deps", "--retries", "1", "--dest", made, f"trl=={version}"]
            fetched = subprocess.run([*pip, *download], capture_output=True, text=True)
            if fetched.returncode:
                pytest.skip(f"the package index gives no trl=={version}: {fetched.stderr.strip().splitlines()[-1:]}")
            (wheel,) = Path(made).glob("*.whl")
            install = ["install", "--no-deps", "--no-index", "--target", f"{made}/packages", str(wheel)]
            subprocess.run([*pip, *install], check=True)
            shutil.move(f"{made}/packages", folder)
    return folder


class Theirs(NamedTuple):
    """results: by name of case, what trl_losses.py says. exact: whether in float64 where TRL has it."""

    results: dict[str, dict[str, Any]]
    exact: bool

    def tolerance(self, case: Case) -> float:
        return 1e-12 if self.exact and case.exact else 2e-5


@pytest.fixture(scope="module", params=["1.12.0", "1.16.0"])
def trl(request, tmp_path_factory, tiny_folder) -> Theirs:
    """All cases by one version of TRL."""
    version, exact = request.param, request.param == "1.12.0"
    jobs, results = (tmp_path_factory.mktemp("trl") / name for name in ("jobs.pt", "results.pt"))
    kinds = {name: "float64" if exact and case.exact else "float32" for name, case in CASES.items()}
    cases = {
        name: {"trainer": case.trainer, "knobs": case.knobs, "batch": case.batch, "dtype": kinds[name]}
        for name, case in CASES.items()
    }
    torch.save({"tokenizer": str(tiny_folder), "batches": BATCHES, "cases": cases}, jobs)
    script = Path(__file__).with_name("trl_losses.py")
    environment = {
        **os.environ,
        "PYTHONPATH": str(packages(version)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, script, jobs, results]
    done = subprocess.run(command, env=environment, cwd=jobs.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(results)
    assert found["version"] == version
    return Theirs(found["results"], exact)


def agree(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """To so much of the largest element."""
    assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("case", **BY_NAME)
def test_loss_and_gradient_are_those_of_trl(trl: Theirs, case: Case) -> None:
    found, expected = trl.results[case.name], ours(case.loss, case.batch)
    assert found["loss"] == pytest.approx(expected.mean, rel=trl.tolerance(case))
    agree(found["gradient"], expected.gradient, trl.tolerance(case))


def test_the_inputs_are_like_those_of_training() -> None:
    """Pairs on both sides of 0 and log-ratios of some nats, so that agreement means something."""
    made = ours(DPO(), "ragged")
    h_w, h_l = made.policy.chosen - made.reference.chosen, made.policy.rejected - made.reference.rejected
    margin = h_w - h_l
    assert PAIRS / 4 <= (margin > 0).sum() <= PAIRS * 3 / 4
    assert 1 < margin.abs().mean() < 10
    assert 0.5 < -(made.policy.chosen / made.policy.chosen_tokens).mean() < 4
    assert len(set(made.policy.chosen_tokens.tolist())) > PAIRS / 2


# Rewards, which TRL's DPOTrainer logs as beta h for every loss.

OWN_REWARDS = (IPO, DPONorm, FDPO)


@pytest.mark.parametrize("case", **BY_NAME)
def test_rewards_are_those_of_trl_but_for_losses_that_compare_something_else(trl: Theirs, case: Case) -> None:
    found, expected = trl.results[case.name]["rewards"], ours(case.loss, case.batch).mean_rewards
    near = trl.tolerance(case)
    if isinstance(case.loss, OWN_REWARDS) and getattr(case.loss, "divergence", "") != "reverse_kl":
        assert expected != pytest.approx(found, rel=1e-2)
        expected = ours(DPO(beta=case.loss.beta), case.batch).mean_rewards
    assert found == pytest.approx(expected, rel=near, abs=near)


# The mean of an NLL: of each pair's tokens here, of all tokens of a micro-batch in TRL.


def token_mean(made: Ours) -> float:
    """The NLL of all chosen tokens as one sample."""
    return -(made.policy.chosen.sum() / made.policy.chosen_tokens.sum()).item()


def test_sft_divided_by_the_tokens_of_the_batch_is_trls(trl: Theirs) -> None:
    """The training loop divides so, TRL's loss by itself."""
    found, made = trl.results[ONLY_NLL.name], ours(SFT(), "ragged")
    pairs_per_token = PAIRS / made.policy.chosen_tokens.sum().item()
    assert found["loss"] == pytest.approx(made.mean * pairs_per_token, rel=trl.tolerance(ONLY_NLL))
    agree(found["gradient"], made.gradient * pairs_per_token, trl.tolerance(ONLY_NLL))


@pytest.mark.parametrize("case", RAGGED_NLL, ids=lambda case: case.loss.describe().replace(" ", ","))
def test_trls_nll_term_weighs_tokens_where_ours_weighs_pairs(trl: Theirs, case: Case) -> None:
    """ORPOTrainer counts the prompt's tokens too."""
    found, made = trl.results[case.name]["loss"], ours(case.loss, "ragged")
    assert isinstance(case.loss, PairLoss)
    nll = prompt_and_completion_mean() if case.trainer == "orpo" else token_mean(made)
    per_pair = -(made.policy.chosen / made.policy.chosen_tokens).mean().item()
    assert found == pytest.approx(made.mean + case.loss.nll_weight * (nll - per_pair), rel=trl.tolerance(case))
    assert nll != pytest.approx(per_pair, rel=1e-2)


def prompt_and_completion_mean() -> float:
    """The NLL of all tokens of the chosen rows but the first of each."""
    batch = BATCHES["ragged"]
    logps = batch["logits"][:PAIRS, :-1].log_softmax(-1)
    labels, mask = batch["input_ids"][:PAIRS, 1:], batch["attention_mask"][:PAIRS, 1:]
    tokens = logps.gather(-1, labels[..., None])[..., 0] * mask
    return -(tokens.sum() / mask.sum()).item()


# Where TRL does something else.


def test_trl_ignores_label_smoothing_with_sigmoid(trl: Theirs) -> None:
    found = trl.results[SMOOTHED.name]["loss"]
    smoothed, plain = (ours(loss, "ragged").mean for loss in (SMOOTHED.loss, DPO()))
    assert found == pytest.approx(plain, rel=trl.tolerance(SMOOTHED))
    assert found != pytest.approx(smoothed, rel=1e-3)


def test_trl_weighs_without_a_bound_of_1(trl: Theirs) -> None:
    """Pairs of weight below 1 are the same, the others count as the weight says."""
    found, made = trl.results[WEIGHTED.name], ours(WPO(), "ragged")
    policy = made.policy
    weight = (
        (policy.chosen - policy.chosen_collision) / policy.chosen_tokens
        + (policy.rejected - policy.rejected_collision) / policy.rejected_tokens
    ).exp()
    assert 2 <= (weight > 1).sum() <= PAIRS - 2
    factor = weight.clamp(min=1)
    assert found["loss"] == pytest.approx((factor * made.out.loss).mean().item(), rel=trl.tolerance(WEIGHTED))
    agree(found["gradient"], factor.repeat(2)[:, None, None] * made.gradient, trl.tolerance(WEIGHTED))


def test_trls_discopop_is_not_a_number_far_from_the_reference(trl: Theirs) -> None:
    assert torch.tensor(trl.results[FAR_DISCOPOP.name]["loss"]).isnan()
    single = (logps_of(BATCHES["far"][key].float(), BATCHES["far"]) for key in ("logits", "ref_logits"))
    losses = DiscoPOP(beta=1.0)(*single).loss
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()


def test_trl_has_no_gradient_where_it_clips_the_alpha_divergence(trl: Theirs) -> None:
    """Ours goes on as a tangent, and so pulls a chosen completion back that is far below the reference."""
    found, made = trl.results[FAR_ALPHA.name], ours(FAR_ALPHA.loss, "far")
    below = made.reference.chosen - made.policy.chosen > 80
    lost = below & (made.out.chosen_rewards < made.out.rejected_rewards)
    assert lost.any()
    theirs, own = (part[:PAIRS].abs().amax(dim=(1, 2)) for part in (found["gradient"], made.gradient))
    assert (theirs[lost] == 0).all()
    assert (own[lost] > 0).all()
