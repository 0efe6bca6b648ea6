"""Log-probabilities against a loop in numpy float64."""

import numpy as np
import pytest
import torch

from prefpipe.logps import IGNORE_INDEX, PairLogps, completion_logps


def by_hand(logits: np.ndarray, labels: np.ndarray) -> tuple[list[float], list[int]]:
    sums, counts = [], []
    for row in range(len(labels)):
        total, count = 0.0, 0
        for position in range(1, labels.shape[1]):
            if labels[row, position] != IGNORE_INDEX:
                scores = logits[row, position - 1]
                peak = scores.max()
                total += scores[labels[row, position]] - peak - np.log(np.exp(scores - peak).sum())
                count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


def shifted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a position predict the label of the next."""
    return completion_logps(logits[:, :-1], labels[:, 1:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_completion_logps_equal_a_loop(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 9, 11, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 11, (5, 9), generator=generator)
    labels[:, :3] = IGNORE_INDEX
    labels[2, 6:] = IGNORE_INDEX
    labels[3, 4:] = IGNORE_INDEX
    sums, counts = by_hand(logits.double().numpy(), labels.numpy())
    found, tokens = shifted(logits, labels)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(sums, abs=tolerance)
    assert tokens.tolist() == counts


def test_a_uniform_model_gives_minus_log_v_for_each_token():
    labels = torch.tensor([[IGNORE_INDEX, 3, 4, 1]])
    found, tokens = shifted(torch.zeros(1, 4, 50), labels)
    assert found.item() == pytest.approx(-3 * np.log(50), abs=1e-6)
    assert tokens.item() == 3


def test_the_first_completion_token_counts():
    """Off by one here would hide a difference in the first token (fw-ai/cookbook#388)."""
    logits = torch.zeros(2, 3, 4)
    logits[:, 0, 1] = 5.0
    labels = torch.tensor([[IGNORE_INDEX, 1, 2], [IGNORE_INDEX, 3, 2]])
    found, _ = shifted(logits, labels)
    assert found[0] - found[1] == pytest.approx(5.0, abs=1e-6)


def test_gradient_is_zero_on_prompt_and_padding():
    logits = torch.randn(1, 5, 7, requires_grad=True)
    shifted(logits, torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 3, 4, IGNORE_INDEX]]))[0].sum().backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(dim=-1)[0] > 0
    assert touched.tolist() == [False, True, True, False, False]


def test_sums_of_2000_bf16_tokens_keep_half_a_percent():
    logits = torch.randn(1, 2001, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels = torch.randint(0, 32, (1, 2001), generator=torch.Generator().manual_seed(2))
    exact = by_hand(logits.double().numpy(), labels.numpy())[0][0]
    assert shifted(logits, labels)[0].item() == pytest.approx(exact, rel=5e-3)


def test_per_token_divides_by_the_tokens_summed():
    logps = PairLogps(torch.tensor([-6.0]), torch.tensor([-4.0]), torch.tensor([4]), torch.tensor([2]))
    chosen, rejected = logps.per_token()
    assert (chosen.item(), rejected.item()) == (-1.5, -2.0)
