"""Metrics against numbers worked out by hand, and the alarm."""

import pytest
import torch

from prefpipe.logps import PairLogps
from prefpipe.losses import DPO, SFT, LossOutput
from prefpipe.training.diagnostics import ALARM_WINDOW, FallingChosen, Measured, metrics, speed


def measured() -> Measured:
    """Two micro-batches, of two pairs and of one."""
    parts = []
    for rows in ([0, 1], [2]):
        pick = torch.tensor(rows)
        policy = PairLogps(
            torch.tensor([-6.0, -8.0, -2.0])[pick],
            torch.tensor([-5.0, -9.0, -7.0])[pick],
            torch.tensor([4, 2, 2])[pick],
            torch.tensor([2, 4, 2])[pick],
        )
        reference = policy._replace(chosen=policy.chosen - 1.0, rejected=policy.rejected + 2.0)
        out = LossOutput(*(torch.tensor(v)[pick] for v in ([1.0, 2.0, 6.0], [0.5, -1.0, 0.0], [0.0, 1.0, 0.0])))
        parts.append(Measured.of(out, policy, reference))
    return Measured.joined(parts)


def test_means_over_the_global_batch():
    found = metrics(measured(), 3, loss=DPO(), with_reference=True)
    assert found == pytest.approx(
        {
            "train/loss": 3.0,
            "train/logps/chosen": -16 / 3,
            "train/logps/rejected": -7.0,
            "train/rewards/chosen": -0.5 / 3,
            "train/rewards/rejected": 1 / 3,
            "train/rewards/margin": (0.5 - 2.0 + 0.0) / 3,
            "train/rewards/accuracy": 1 / 3,
            "train/rewards/accuracy_longer": 1.0,
            "train/rewards/accuracy_shorter": 0.0,
            "train/log_ratio/chosen": 3 / 8,
            "train/log_ratio/rejected": -6 / 8,
        }
    )


def test_sft_says_loss_and_log_probability_alone():
    assert set(metrics(measured(), 8, loss=SFT(), with_reference=False)) == {"train/loss", "train/logps/chosen"}


def test_the_alarm_rings_once_and_only_for_a_lasting_fall(caplog):
    alarm = FallingChosen()
    for step in range(3 * ALARM_WINDOW):
        alarm.see({"train/log_ratio/chosen": -0.2 if step % 2 else 0.1})
    assert not caplog.text
    for _ in range(3 * ALARM_WINDOW):
        alarm.see({"train/log_ratio/chosen": -0.5})
    assert caplog.text.count("chosen completions have become less likely") == 1


def test_speed_counts_six_operations_for_each_parameter_and_token():
    row = speed(2.0, 1000, 10**9, torch.device("cpu"))
    assert (row["seconds"], row["tokens_per_second"], row["tflops"]) == (2.0, 500.0, 3.0)
    assert row["peak_memory_gb"] > 0.01
    assert "mfu" not in row
