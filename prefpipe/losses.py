"""Losses as pure functions of log-probabilities. To add one: a class here and conf/loss/<name>.yaml.

A PairLoss (a BetaLoss, if it has a beta) defines `compare` and gets an NLL term; a Loss defines `__call__` itself.

In the formulas, l is a completion's log-probability under the policy, summed over its tokens, r the same under the
reference, n the number of its tokens, a = l / n, h = l - r; _w marks the chosen, _l the rejected completion, and
D = h_w - h_l. sigma is the logistic function and ls(x) = -log sigma(x).

Nothing here imports torch at the top: the config needs these classes, and `prefpipe --help` should not wait for torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from prefpipe.components import register
from prefpipe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from prefpipe.logps import PairLogps


class LossOutput(NamedTuple):
    """Per-pair results, all [B]. Rewards are for logging, never for gradients: a loss returns them detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass
class Loss:
    """What every loss has: a name, and what it reads.

    needs_reference: whether `reference` log-probabilities change it. pairwise: whether it reads the rejected side.
    """

    name: str = "???"
    needs_reference: ClassVar[bool] = True
    pairwise: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        """Per-pair loss.

        Args:
            policy: of the model that is trained, [B] each, nats, summed over completion tokens.
            reference: the same of the frozen model; None only where needs_reference is False.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def describe(self) -> str:
        """Name and knobs, for the log."""
        return " ".join([self.name, *self.knobs()])

    def knobs(self) -> list[str]:
        """`key=value` of every knob that is not said elsewhere."""
        kept = [field.name for field in fields(self) if field.name not in {"name", "nll_weight"}]
        return [f"{key}={getattr(self, key)}" for key in kept]


@dataclass
class PairLoss(Loss):
    """A comparison of chosen with rejected, to which the negative log-likelihood of chosen can be added.

    loss = compare(policy, reference) + nll_weight * (-l_w / n_w)

    nll_weight: 0 is none; Iterative RPO (Pang et al. 2024, arXiv:2404.19733) uses 1.0 on DPO. Also known as RPO-alpha
        (`rpo_alpha` in ms-swift), `nll_loss_coef` (OpenRLHF), `pref_ftx` (LLaMA-Factory), `cpo_alpha` and the loss type
        `sft` (TRL). Each pair's mean per token weighs the same here, in OpenRLHF and in LLaMA-Factory; TRL and the
        authors of CPO and SimPO take the mean over all chosen tokens of a micro-batch, where long completions weigh
        more and the value depends on how a batch is cut.
    """

    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        check("nll_weight", self.nll_weight, self.nll_weight >= 0, "at least 0; 0 adds no NLL term")

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        """See Loss. The NLL term stands here, for all, and never reaches the rewards (huggingface/trl#5079)."""
        loss, chosen, rejected = self.compare(policy, reference)
        if self.nll_weight:
            loss = loss - self.nll_weight * policy.chosen / policy.chosen_tokens
        return LossOutput(loss, chosen.detach(), rejected.detach())

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        """Per-pair loss without the NLL term, and rewards, which need not be detached."""
        raise NotImplementedError(f"{type(self).__name__} defines no comparison")

    def describe(self) -> str:
        return super().describe() + (f" nll_weight={self.nll_weight}" if self.nll_weight else "")


@dataclass
class BetaLoss(PairLoss):
    """A pair loss whose rewards beta scales. Every loss has its own default beta; they are not comparable."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check("beta", self.beta, self.beta > 0, "above 0")


@register("loss")
@dataclass
class DPO(BetaLoss):
    """Direct Preference Optimization, Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.

    loss = (1 - epsilon) ls(beta D) + epsilon ls(-beta D)

    beta: strength of the pull towards the reference; the paper uses 0.1 to 0.5, later work down to 0.01.
    label_smoothing: epsilon, the probability in [0, 0.5) that a label is flipped (conservative DPO, Mitchell 2023);
        0 is plain DPO. The optimum is sigma(beta D) = 1 - epsilon. TRL 1.x accepts the key and ignores it here.
    """

    name: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing, "0 is plain DPO")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        margin = chosen - rejected
        loss = -(1 - self.label_smoothing) * log_sigmoid(margin) - self.label_smoothing * log_sigmoid(-margin)
        return LossOutput(loss, chosen, rejected)


@register("loss")
@dataclass
class RobustDPO(BetaLoss):
    """Provably robust DPO, Chowdhury et al. 2024, arXiv:2403.00409: unbiased where labels are flipped at a known rate.

    loss = ((1 - epsilon) ls(beta D) - epsilon ls(-beta D)) / (1 - 2 epsilon)

    Unlike dpo's label_smoothing it has no optimum at a finite margin, and it falls below 0 there.

    beta: as in DPO, 0.1 to 0.5.
    label_smoothing: epsilon, the rate of flipped labels in [0, 0.5), usually 0.1; 0 is plain DPO.
    """

    name: str = "robust"
    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing, "0 is plain DPO")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        margin, epsilon = chosen - rejected, self.label_smoothing
        loss = (epsilon * log_sigmoid(-margin) - (1 - epsilon) * log_sigmoid(margin)) / (1 - 2 * epsilon)
        return LossOutput(loss, chosen, rejected)


@register("loss")
@dataclass
class IPO(BetaLoss):
    """Identity Preference Optimization, Azar et al. 2023, arXiv:2310.12036, Eq. 17.

    loss = (h_w / n_w - h_l / n_l - 1 / (2 beta))^2

    beta: the paper's tau; the log-ratio margin is pulled to 1 / (2 beta), so a smaller beta asks for a larger margin.
    normalize: `mean` as above, the authors' correction, without which beta depends on completion length
        (huggingface/trl#1265), as in TRL, LLaMA-Factory and HALOs; `sum` is (D - 1 / (2 beta))^2, as in OpenRLHF and
        DPO's own repository.
    """

    name: str = "ipo"
    beta: float = 0.1
    normalize: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("normalize", self.normalize, ["mean", "sum"])

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        ratios = mean_log_ratios if self.normalize == "mean" else log_ratios
        chosen, rejected = ratios(policy, reference)
        loss = (chosen - rejected - 1 / (2 * self.beta)) ** 2
        return LossOutput(loss, *scaled(self.beta, (chosen, rejected)))


@register("loss")
@dataclass
class SimPO(BetaLoss):
    """Simple Preference Optimization, Meng et al. 2024, arXiv:2405.14734, Eq. 6. Needs no reference.

    loss = ls(beta (a_w - a_l) - gamma), or with alpha, ls(beta (u_w - u_l) - gamma), u = (1 - e^(-alpha a)) / alpha

    TRL and ms-swift add an NLL term by default (`cpo_alpha` 1.0) and TRL, LLaMA-Factory and ms-swift spell the margin
    as gamma; the authors' repository, open-instruct and HALOs as its ratio to beta.

    beta: reward scale. The authors use 2.0 to 2.5, sometimes 10; not comparable with DPO's beta.
    gamma: target reward margin, the paper's gamma (TRL: `simpo_gamma`), 0.3 to 1.6; 1.0 when neither is given.
    gamma_beta_ratio: the same margin in units of beta, as the authors' repository spells it. Giving both is an error.
    alpha: shape of the reward, AlphaPO (Gupta et al. 2025, arXiv:2501.03884); 0, its limit, is SimPO. Above 0,
        probabilities near 0 count for more.
    """

    name: str = "simpo"
    beta: float = 2.0
    gamma: float | None = None
    gamma_beta_ratio: float | None = None
    alpha: float = 0.0
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ConfigError(
                f"loss.gamma={self.gamma} and loss.gamma_beta_ratio={self.gamma_beta_ratio} both set SimPO's margin "
                f"(gamma = ratio x beta); give one of the two"
            )
        if self.gamma is None:
            self.gamma = 1.0 if self.gamma_beta_ratio is None else self.gamma_beta_ratio * self.beta
        check("gamma", self.gamma, True, "a margin, 0.3 to 1.6")
        check("alpha", self.alpha, True, "0 for SimPO, or AlphaPO's alpha")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        assert self.gamma is not None
        chosen, rejected = policy.per_token()
        if self.alpha:
            chosen, rejected = (-expm1(-self.alpha * mean) / self.alpha for mean in (chosen, rejected))
        chosen, rejected = scaled(self.beta, (chosen, rejected))
        return LossOutput(-log_sigmoid(chosen - rejected - self.gamma), chosen, rejected)

    def knobs(self) -> list[str]:
        assert self.gamma is not None
        gamma = f"gamma={self.gamma:g} (gamma/beta={self.gamma / self.beta:g})"
        return [f"beta={self.beta}", gamma, *([f"alpha={self.alpha}"] if self.alpha else [])]


@register("loss")
@dataclass
class DPONorm(BetaLoss):
    """Length-normalized DPO, as trained for Tülu 3, Lambert et al. 2024, arXiv:2411.15124.

    loss = ls(beta (h_w / n_w - h_l / n_l))

    TRL calls it `sigmoid_norm`, open-instruct `dpo_norm`.

    beta: 5.0, as open-instruct: log-ratios per token are smaller than DPO's by the completion's length, so that DPO's
        0.1 would leave rewards of a few thousandths; 2 to 10.
    """

    name: str = "dpo_norm"
    beta: float = 5.0

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, mean_log_ratios(policy, reference))
        return LossOutput(-log_sigmoid(chosen - rejected), chosen, rejected)


@register("loss")
@dataclass
class RDPO(BetaLoss):
    """Length-regularized DPO, Park et al. 2024, arXiv:2403.19159.

    loss = ls(beta D + alpha (n_w - n_l))

    What a token more costs the reward must be made good by the log-ratio: a chosen completion that is the longer one
    is pushed less, one that is the shorter one more. Rewards are beta h, without the length.

    beta: as in DPO, 0.01 to 0.1.
    alpha: reward per token of length, at least 0; 0 is DPO. The authors of SimPO search 0.05 to 1.0 for it; alpha times
        the usual difference of lengths should be of the order of 1.
    """

    name: str = "rdpo"
    beta: float = 0.1
    alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check("alpha", self.alpha, self.alpha >= 0, "at least 0; 0 is DPO")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        # A float times an integer tensor would be float32, whatever the log-probabilities are.
        longer = self.alpha * (policy.chosen_tokens - policy.rejected_tokens).to(chosen.dtype)
        return LossOutput(-log_sigmoid(chosen - rejected + longer), chosen, rejected)


@register("loss")
@dataclass
class DPOP(BetaLoss):
    """DPO-Positive (Smaug), Pal et al. 2024, arXiv:2402.13228: keeps the chosen completion from becoming less likely.

    loss = ls(beta (D - lambda max(0, r_w - l_w)))

    The penalty has its kink where training from its own reference starts. A fall of at most 0.001 nats is therefore
    none: the first step is DPO's, and rounding does not decide about lambda times its gradient.

    beta: as in DPO; 0.1 to 0.3.
    dpop_lambda: the paper's lambda, weight of the penalty, at least 0; 0 is DPO, the paper's value is 50.
    """

    name: str = "dpop"
    beta: float = 0.3
    dpop_lambda: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check("dpop_lambda", self.dpop_lambda, self.dpop_lambda >= 0, "at least 0; 0 is DPO")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        ratios = log_ratios(policy, reference)
        chosen, rejected = scaled(self.beta, ratios)
        penalty = self.dpop_lambda * -chosen * (ratios[0] < -1e-3)
        return LossOutput(-log_sigmoid(chosen - rejected - penalty), chosen, rejected)


@register("loss")
@dataclass
class FDPO(BetaLoss):
    """DPO with other divergences than the reverse KL, Wang et al. 2023, arXiv:2309.16240.

    loss = ls(beta (u_w - u_l)), u = f'(e^h) - f'(1), which by divergence is
    reverse_kl: h, so DPO. forward_kl: 1 - e^-h. js: log 2 + log sigma(h). alpha: (e^((alpha-1) h) - 1) / (alpha - 1)

    Constants of f' cancel between chosen and rejected. Above an exponent of 80, e^x goes on as its tangent, to stay
    finite in float32 (TRL clips there, which ends the gradient too). Rewards are beta u.

    beta: as in DPO, 0.1 to 0.5.
    divergence: js by default, between the two KLs.
    alpha: with divergence=alpha only, in [0, 1]: 0 is forward_kl, 1 reverse_kl, 0.5 the default there; TRL's
        `f_alpha_divergence_coef`. The paper's alpha is 1 - ours.
    """

    name: str = "fdpo"
    beta: float = 0.1
    divergence: str = "js"
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("divergence", self.divergence, ["reverse_kl", "forward_kl", "js", "alpha"])
        if self.divergence == "alpha":
            self.alpha = 0.5 if self.alpha is None else self.alpha
            check("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        elif self.alpha is not None:
            raise ConfigError(
                f"loss.alpha={self.alpha} would be ignored with loss.divergence={self.divergence}; "
                f"drop it, or use loss.divergence=alpha"
            )

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = (self.beta * self.derivative(h) for h in log_ratios(policy, reference))
        return LossOutput(-log_sigmoid(chosen - rejected), chosen, rejected)

    def derivative(self, h: Tensor) -> Tensor:
        """f'(e^h) - f'(1), [B]."""
        if self.divergence == "forward_kl":
            return -expm1(-h)
        if self.divergence == "js":
            return math.log(2) + log_sigmoid(h)
        if self.alpha is None or self.alpha == 1:
            return h
        return expm1((self.alpha - 1) * h) / (self.alpha - 1)


@register("loss")
@dataclass
class ChiPO(BetaLoss):
    """Chi-squared Preference Optimization, Huang et al. 2024, arXiv:2407.13399: pessimistic where data is thin.

    loss = ls(clip(beta (u_w - u_l), max_margin)), u = e^min(h, max_log_ratio) + h

    The slope of u is 2 at the start, so a first step is twice DPO's. Rewards are beta u.

    beta: as in DPO, though smaller ones hold up better than DPO's do; 0.01 to 0.1.
    max_margin: bound of the margin of rewards on both sides, the paper's 2 R_max; no gradient beyond it. null: none.
    max_log_ratio: bound of the exponent, for finite numbers; beyond it u grows by h alone.
    """

    name: str = "chi_po"
    beta: float = 0.1
    max_margin: float | None = None
    max_log_ratio: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_margin is not None:
            check("max_margin", self.max_margin, self.max_margin > 0, "above 0, or null for no bound")
        check("max_log_ratio", self.max_log_ratio, 0 < self.max_log_ratio <= MAX_EXPONENT, f"in (0, {MAX_EXPONENT}]")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = log_ratios(policy, reference)
        of_chosen, of_rejected = (h.clamp(max=self.max_log_ratio).exp() for h in (chosen, rejected))
        # Each part by itself: two exponentials at the bound cancel, and would take the digits of h with them.
        margin = self.beta * ((of_chosen - of_rejected) + (chosen - rejected))
        if self.max_margin is not None:
            margin = margin.clamp(-self.max_margin, self.max_margin)
        rewards = scaled(self.beta, (of_chosen + chosen, of_rejected + rejected))
        return LossOutput(-log_sigmoid(margin), *rewards)


@register("loss")
@dataclass
class DiscoPOP(BetaLoss):
    """Discovered Preference Optimization, Lu et al. 2024, arXiv:2406.08414, Eq. 5.

    loss = (1 - m) ls(x) + m e^-x, x = beta D, m = sigma(x / tau)

    Not convex: at tau=0.05 the slope in x is +0.78 where policy = reference, the other sign. Left to itself, a pair
    goes down to the minimum at x = -0.12; beyond the hump at x = 0.07 the loss falls as x grows.

    beta: as in DPO, 0.01 to 0.1.
    tau: width in x of the change from the one part to the other; the paper's 0.05.
    """

    name: str = "discopop"
    beta: float = 0.1
    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check("tau", self.tau, self.tau > 0, "above 0")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        x = chosen - rejected
        # m e^-x in one exponential: as a product, it is 0 times infinity for rejected pairs, as in TRL.
        loss = -(-x / self.tau).sigmoid() * log_sigmoid(x) + (log_sigmoid(x / self.tau) - x).exp()
        return LossOutput(loss, chosen, rejected)


@register("loss")
@dataclass
class Hinge(BetaLoss):
    """Hinge loss on DPO's margin, RSO's hinge-norm, Liu et al. 2023, arXiv:2309.06657.

    loss = max(0, 1 - beta D)

    TRL, LLaMA-Factory and torchtune compute the same; HALOs' `slic` is the loss of that name here.

    beta: the paper's gamma, 1 / the margin at which a pair counts as learnt; 0.05 to 0.5.
    """

    name: str = "hinge"
    beta: float = 0.1

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput((1 - (chosen - rejected)).relu(), chosen, rejected)


@register("loss")
@dataclass
class EXO(BetaLoss):
    """Efficient Exact Optimization, Ji et al. 2024, arXiv:2402.00856, Eq. 16, for pairs.

    loss = KL([q, 1 - q] || [1 - epsilon, epsilon]), q = sigma(beta D)

    The reverse of the KL that cDPO minimizes, with the same optimum q = 1 - epsilon.

    beta: as in DPO, 0.1 to 0.5.
    label_smoothing: epsilon in (0, 0.5), as at 0 the loss is infinite (ms-swift changes 0 to 0.001 without a word).
    """

    name: str = "exo"
    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.label_smoothing, "at 0 EXO is infinite, 0.001 is usual", zero=False)

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        margin, epsilon = chosen - rejected, self.label_smoothing
        of_chosen = margin.sigmoid() * (log_sigmoid(margin) - math.log1p(-epsilon))
        of_rejected = (-margin).sigmoid() * (log_sigmoid(-margin) - math.log(epsilon))
        return LossOutput(of_chosen + of_rejected, chosen, rejected)


@register("loss")
@dataclass
class NCA(BetaLoss):
    """Noise Contrastive Alignment, Chen et al. 2024, arXiv:2402.05369, for pairs.

    loss = ls(beta h_w) + ls(-beta h_w) / 2 + ls(-beta h_l) / 2

    Rewards are held near 0, where DPO only holds their difference: the likelihood of chosen does not drop freely.

    beta: as in DPO, 0.01 to 0.1.
    """

    name: str = "nca"
    beta: float = 0.1

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        loss = -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2
        return LossOutput(loss, chosen, rejected)


@register("loss")
@dataclass
class BCO(BetaLoss):
    """Binary Classifier Optimization, Jung et al. 2024, arXiv:2404.04656, on pairs and with a constant shift.

    loss = ls(beta h_w - delta) + ls(delta - beta h_l)

    beta: as in DPO, 0.01 to 0.1.
    delta: the reward that separates good from bad. The paper, LLaMA-Factory and ms-swift keep a running mean of the
        rewards, which makes a pair's loss depend on the batches before it; TRL 1.x fixes it at 0, as here by default.
    """

    name: str = "bco"
    beta: float = 0.1
    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check("delta", self.delta, True, "a reward; 0 is usual")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput(-log_sigmoid(chosen - self.delta) - log_sigmoid(self.delta - rejected), chosen, rejected)


@register("loss")
@dataclass
class SPPO(BetaLoss):
    """Self-Play Preference Optimization with hard labels, Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P = 1 and 0.

    loss = (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2

    The paper's soft labels need the scores of a preference model, which pairs do not carry.

    beta: 1 / the paper's eta. Log-ratios of whole completions are pulled to +-1 / (2 beta); the paper's 0.001 asks for
        500 nats and loses 1 / (2 beta^2) = 500,000 at the start, so watch training.max_grad_norm.
    """

    name: str = "sppo"
    beta: float = 0.001

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = log_ratios(policy, reference)
        target = 1 / (2 * self.beta)
        return LossOutput((chosen - target) ** 2 + (rejected + target) ** 2, *scaled(self.beta, (chosen, rejected)))


@register("loss")
@dataclass
class APOZero(BetaLoss):
    """Anchored Preference Optimization, zero, D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.

    loss = 1 - sigma(beta h_w) + sigma(beta h_l)

    For chosen completions that are better than what the model writes: chosen goes up, rejected down, each by itself.

    beta: as in DPO, 0.05 to 0.5.
    """

    name: str = "apo_zero"
    beta: float = 0.1

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput((-chosen).sigmoid() + rejected.sigmoid(), chosen, rejected)


@register("loss")
@dataclass
class APODown(BetaLoss):
    """Anchored Preference Optimization, down, D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.

    loss = sigma(beta h_w) + 1 - sigma(beta D)

    For chosen completions that are worse than what the model writes: both go down, rejected further.

    beta: as in DPO, 0.05 to 0.5.
    """

    name: str = "apo_down"
    beta: float = 0.1

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, log_ratios(policy, reference))
        return LossOutput(chosen.sigmoid() + (rejected - chosen).sigmoid(), chosen, rejected)


@register("loss")
@dataclass
class CPO(BetaLoss):
    """Contrastive Preference Optimization, Xu et al. 2024, arXiv:2401.08417. Needs no reference.

    loss = ls(beta (l_w - l_l)) + nll_weight (-l_w / n_w)

    The paper's NLL is a sum over tokens, the authors' code and TRL take the mean over a micro-batch's tokens.

    beta: 0.1, as the paper; 0.01 to 0.1. Sums, not means: long completions have the larger rewards.
    nll_weight: 1.0, as the paper (`cpo_alpha` in TRL and ms-swift).
    """

    name: str = "cpo"
    nll_weight: float = 1.0
    beta: float = 0.1
    needs_reference: ClassVar[bool] = False

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = scaled(self.beta, (policy.chosen, policy.rejected))
        return LossOutput(-log_sigmoid(chosen - rejected), chosen, rejected)


@register("loss")
@dataclass
class ORPO(BetaLoss):
    """Odds Ratio Preference Optimization, Hong et al. 2024, arXiv:2403.07691. Needs no reference.

    loss = nll_weight (-a_w) + beta ls(log(odds_w / odds_l)), odds = e^a / (1 - e^a)

    The authors' code and TRL take the NLL over prompt and completion, LLaMA-Factory over the completion, as here.

    beta: the paper's lambda, weight of the odds ratio, 0.1 to 1 (`beta` in TRL too).
    nll_weight: 1.0, as the paper; 0 leaves the odds ratio alone.
    """

    name: str = "orpo"
    nll_weight: float = 1.0
    beta: float = 0.1
    needs_reference: ClassVar[bool] = False

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        chosen, rejected = policy.per_token()
        log_odds = chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))
        return LossOutput(-self.beta * log_sigmoid(log_odds), *scaled(self.beta, (chosen, rejected)))


@register("loss")
@dataclass
class SLiC(PairLoss):
    """Sequence Likelihood Calibration, SLiC-HF, Zhao et al. 2023, arXiv:2305.10425. Needs no reference.

    loss = max(0, delta - l_w + l_l) + nll_weight (-l_w / n_w)

    The paper's regularizer is a likelihood of the reference text of its SFT data, which may be another than chosen.
    TRL's and LLaMA-Factory's `hinge`, once called slic, is `hinge` here. Rewards are l.

    delta: margin of the summed log-probabilities, nats, at least 0; 0.5 to 10.
    nll_weight: the paper's lambda; 0.1 to 10 in the grid of SimPO's authors, for a sum over tokens.
    """

    name: str = "slic"
    nll_weight: float = 1.0
    delta: float = 1.0
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check("delta", self.delta, self.delta >= 0, "at least 0")

    def compare(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        return LossOutput((self.delta - policy.chosen + policy.rejected).relu(), policy.chosen, policy.rejected)


@register("loss")
@dataclass
class SFT(Loss):
    """Supervised fine-tuning on the chosen completions: their summed negative log-likelihood.

    The training loop divides by the tokens of the whole global batch, not by pairs: a token counts the same wherever it
    stands (the accumulation bug of huggingface/transformers#34191).
    """

    name: str = "sft"
    needs_reference: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> LossOutput:
        return LossOutput(-policy.chosen, policy.chosen.detach(), policy.rejected.detach())


MAX_EXPONENT = 80.0
"""e^80 = 5.5e34 and its product with a log-probability of 1,000 nats are finite in float32."""


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """h of chosen and rejected, ([B], [B]), nats, summed over tokens."""
    assert reference is not None
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def mean_log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """h / n of chosen and rejected, ([B], [B]), nats per token."""
    assert reference is not None
    (policy_chosen, policy_rejected), (chosen, rejected) = policy.per_token(), reference.per_token()
    return policy_chosen - chosen, policy_rejected - rejected


def scaled(beta: float, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both times beta."""
    return beta * pair[0], beta * pair[1]


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)) without overflow."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact near 0 where log1p(-e^x) is not; at 0 itself large and without a gradient."""
    import torch

    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).tiny)))


def expm1(x: Tensor) -> Tensor:
    """e^x - 1, continued by its tangent above MAX_EXPONENT: finite, with a gradient."""
    return x.clamp(max=MAX_EXPONENT).expm1() + math.exp(MAX_EXPONENT) * (x - MAX_EXPONENT).relu()


def check(key: str, value: float, holds: bool, rule: str) -> None:
    """Raise ConfigError unless loss.<key> is finite and the rule holds."""
    if not (math.isfinite(value) and holds):
        raise ConfigError(f"loss.{key}={value} must be {rule}")


def check_smoothing(value: float, remark: str, *, zero: bool = True) -> None:
    """Raise ConfigError unless loss.label_smoothing is in [0, 0.5), or, without zero, in (0, 0.5)."""
    allowed = 0 <= value < 0.5 and (zero or value > 0)
    check("label_smoothing", value, allowed, f"in {'[' if zero else '('}0, 0.5); {remark}")


def check_choice(key: str, value: str, choices: list[str]) -> None:
    """Raise ConfigError unless loss.<key> is one of the choices."""
    if value not in choices:
        raise ConfigError(f"loss.{key}={value} must be one of {', '.join(choices)}")
