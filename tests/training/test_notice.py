"""At Slurm's notice training writes a state, and goes on from it to the same bits; nobody waits for nothing."""

import logging
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from test_loop import TRAINING, job

from prefpipe.launch import notice
from prefpipe.losses import DPO
from prefpipe.training import loop
from prefpipe.training.loop import train


class KilledError(Exception):
    """Stands for the end of the job."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(notice.VARIABLE, "of no job")  # undone after the test, as expect sets it for good
    found = tmp_path / "attempts" / "train-round_0"
    found.parent.mkdir()
    notice.expect(found)
    return found


@pytest.mark.parametrize("given_in", [1, 3, 5])
def test_a_state_is_written_at_the_notice_and_leads_to_the_same_bits(
    tmp_path, tiny_folder, place, given_in, monkeypatch, caplog
):
    """In the first, the third and the last step. No other state is asked for."""
    assert TRAINING.save_every_steps is None
    train(job(tmp_path / "whole", tiny_folder, DPO()))
    assert not (tmp_path / "whole" / "state").exists()
    assert list(place.parent.iterdir()) == []
    answers: list[bool] = []
    job_process = threading.Thread(target=lambda: answers.append(notice.give(place, 60)))
    heard, answer = notice.Listener.heard, notice.Listener.answer
    looks = count(1)

    def given_before(listener: notice.Listener) -> bool:
        if next(looks) == given_in:
            job_process.start()
            while not list(place.parent.glob("*.notice")):
                pass
        return heard(listener)

    def answer_then_die(listener: notice.Listener) -> None:
        answer(listener)
        raise KilledError

    monkeypatch.setattr(notice.Listener, "heard", given_before)
    monkeypatch.setattr(notice.Listener, "answer", answer_then_die)
    with pytest.raises(KilledError):
        train(job(tmp_path / "stopped", tiny_folder, DPO()))
    job_process.join()
    assert answers == [True]
    assert [folder.name for folder in (tmp_path / "stopped" / "state").iterdir()] == [f"step-{given_in:06d}"]
    monkeypatch.setattr(notice.Listener, "heard", heard)
    monkeypatch.setattr(notice.Listener, "answer", answer)
    with caplog.at_level(logging.INFO, logger="prefpipe"):
        train(job(tmp_path / "stopped", tiny_folder, DPO()))
    assert f"going on after step {given_in}" in caplog.text
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_notice_just_before_a_regular_state_is_answered_by_that(tmp_path, tiny_folder, place, monkeypatch):
    """It is not heard in this step any more, and what it asks for is written all the same."""
    save = loop._save_state
    answers: list[bool] = []

    def given_then_save(*args: object) -> None:
        thread = threading.Thread(target=lambda: answers.append(notice.give(place, 60)))
        thread.start()
        while not list(place.parent.glob("*.notice")):
            pass
        save(*args)
        threads.append(thread)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(loop, "_save_state", given_then_save)
    train(job(tmp_path / "work", tiny_folder, DPO(), replace(TRAINING, save_every_steps=4)))
    for thread in threads:
        thread.join()
    assert answers == [True]
    assert [folder.name for folder in (tmp_path / "work" / "state").iterdir()] == ["step-000004"]


def test_where_nobody_listens_nobody_waits(place):
    assert not notice.give(place, 3600)
    assert list(place.parent.iterdir()) == []


def test_what_a_killed_attempt_left_is_forgotten(place):
    notice.Listener(listens=True).__enter__()
    notice.expect(place)
    assert not notice.give(place, 3600)


def test_training_that_does_not_come_to_it_is_not_waited_for_longer(place, caplog):
    with notice.Listener(listens=True) as listener:
        assert not notice.give(place, 0.1)
        assert "training wrote no state within 0 s of Slurm's notice" in caplog.text
        assert listener.heard()
        assert not notice.give(place, 0.1)  # Slurm may say it twice
    assert list(place.parent.iterdir()) == []


def test_only_the_process_that_writes_listens_and_only_in_a_job(place, monkeypatch):
    with notice.Listener(listens=False) as other:
        assert not notice.give(place, 3600)
        assert not other.heard()
    monkeypatch.delenv(notice.VARIABLE)
    with notice.Listener(listens=True) as first:
        assert not first.heard()
        first.answer()
    assert list(place.parent.iterdir()) == []
