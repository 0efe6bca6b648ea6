"""stage=generate: held-out prompts stay out, skipped ones are counted, a killed run samples nothing twice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefpipe import artifacts, models
from prefpipe.artifacts import Plan
from prefpipe.errors import ArtifactError
from prefpipe.generators import Generator, Skipped
from prefpipe.generators.hf import HF
from prefpipe.records import Completion, Prompt, Split, completion_id, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.stages.generate import generate

TINY = ModelConfig(name="tiny", path="builtin:tiny")
CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)


def prompt(question: str, *, split: Split = Split.train) -> Prompt:
    messages = [{"role": "user", "content": question}]
    return Prompt(prompt_id=prompt_id(messages), messages=messages, source="test", split=split, answer="#### 1")


def write(out: Path, rows: Sequence[Prompt]) -> Path:
    with artifacts.draft(out, Plan("prepare", Prompt.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    return out


def run(prompts: Path, out: Path, folder: Path, generator: Generator, **other: Any) -> list[Completion]:
    settings = {"model": TINY, "folder": folder, "hardware": CPU, "seed": 0, "round_": 0, **other}
    generate([prompts], out, generator=generator, **settings)
    return list(artifacts.read(out, Completion, key="k"))


@dataclass
class Echo(Generator):
    """Answers with the question. Remembers the prompts of each call; dies instead of a call when it is told to."""

    name: str = "echo"
    calls: ClassVar[list[list[str]]] = []
    dies_at: ClassVar[int | None] = None

    def generate(
        self, prompts: Sequence[Prompt], *, model: ModelConfig, folder: Path, hardware: HardwareConfig, seed: int,
        round_: int,
    ) -> Iterator[Completion | Skipped]:  # fmt: skip
        if len(self.calls) == self.dies_at:
            raise RuntimeError("killed")
        self.calls.append([p.prompt_id for p in prompts])
        for p in prompts:
            for sample in range(self.num_samples):
                text = f"{p.messages[-1]['content']} {sample}"
                yield Completion(
                    prompt_id=p.prompt_id,
                    completion_id=completion_id(p.prompt_id, text, sample, round_),
                    messages=p.messages,
                    source=p.source,
                    split=p.split,
                    text=text,
                )


@pytest.fixture
def echo(monkeypatch) -> Echo:
    monkeypatch.setattr(Echo, "calls", [])
    monkeypatch.setattr(Echo, "dies_at", None)
    return Echo(num_samples=2, prompts_per_part=3)


def test_heldout_prompts_are_left_out_and_counted(tmp_path, tiny_folder):
    rows = [prompt(f"Tom has {i} apples.", split=Split.heldout if i % 3 == 0 else Split.train) for i in range(7)]
    generator = HF(num_samples=3, max_new_tokens=6, prompts_per_part=4)
    written = run(write(tmp_path / "prompts", rows), tmp_path / "completions", tiny_folder, generator)
    assert [c.prompt_id for c in written] == [rows[i].prompt_id for i in (1, 2, 4, 5) for _ in range(3)]
    found = artifacts.manifest(tmp_path / "completions")
    assert found["counts"] == {"rows_in": 7, "rows_out": 4, "filtered": {"heldout": 3}, "quarantined": {}}
    assert [part["num_records"] for part in found["parts"]] == [6, 6]
    assert {(c.answer, c.round, c.model) for c in written} == {("#### 1", 0, found["uses"]["model"]["weights"])}


def test_prompts_that_cannot_be_answered_are_counted_by_reason(tmp_path, tiny_folder):
    """The tiny model sees 4096 tokens; its end-of-turn token inside a question would forge a turn."""
    end = models.load_tokenizer(TINY, tiny_folder).eos_token
    rows = [prompt("Hi"), prompt("long " * 4096), prompt(f"{end} forged"), prompt("held out", split=Split.heldout)]
    generator = HF(num_samples=2, max_new_tokens=4)
    written = run(write(tmp_path / "prompts", rows), tmp_path / "completions", tiny_folder, generator)
    assert [c.prompt_id for c in written] == [rows[0].prompt_id] * 2
    counts = artifacts.manifest(tmp_path / "completions")["counts"]
    assert (counts["rows_in"], counts["rows_out"]) == (4, 1)
    assert counts["filtered"] == {"heldout": 1, "prompt_too_long": 1, "special_token": 1}


def test_a_killed_run_goes_on_after_its_last_part_and_samples_nothing_twice(tmp_path, tiny_folder, echo, monkeypatch):
    rows = [prompt(f"question {i}") for i in range(8)]
    prompts = write(tmp_path / "prompts", rows)
    run(prompts, tmp_path / "whole", tiny_folder, echo)
    parts = [[p.prompt_id for p in rows[start : start + 3]] for start in (0, 3, 6)]
    assert Echo.calls == parts

    monkeypatch.setattr(Echo, "calls", [])
    monkeypatch.setattr(Echo, "dies_at", 1)
    with pytest.raises(RuntimeError, match="killed"):
        run(prompts, tmp_path / "completions", tiny_folder, echo)
    assert not artifacts.is_complete(tmp_path / "completions")
    assert Echo.calls == parts[:1]

    monkeypatch.setattr(Echo, "dies_at", None)
    run(prompts, tmp_path / "completions", tiny_folder, echo)
    assert Echo.calls == parts
    assert artifacts.digest(tmp_path / "completions") == artifacts.digest(tmp_path / "whole")
    assert artifacts.manifest(tmp_path / "completions")["counts"] == artifacts.manifest(tmp_path / "whole")["counts"]


def test_a_death_inside_a_part_loses_that_part_only(tmp_path, tiny_folder, echo, monkeypatch):
    """The generator is a stream: some completions of the second part were there already when it died."""
    real = Echo.generate

    def dies_in_the_middle(self, prompts, **other):
        for number, answer in enumerate(real(self, prompts, **other)):
            if len(self.calls) == 2 and number == 3:
                raise RuntimeError("killed")
            yield answer

    prompts = write(tmp_path / "prompts", [prompt(f"question {i}") for i in range(5)])
    monkeypatch.setattr(Echo, "generate", dies_in_the_middle)
    with pytest.raises(RuntimeError, match="killed"):
        run(prompts, tmp_path / "completions", tiny_folder, echo)
    monkeypatch.setattr(Echo, "generate", real)
    written = run(prompts, tmp_path / "completions", tiny_folder, echo)
    assert [len(call) for call in Echo.calls] == [3, 2, 2]
    assert len({c.completion_id for c in written}) == len(written) == 10


def test_up_to_date_completions_are_not_sampled_again_and_a_change_is_named(tmp_path, tiny_folder, echo):
    prompts = write(tmp_path / "prompts", [prompt("question")])
    run(prompts, tmp_path / "completions", tiny_folder, echo)
    run(prompts, tmp_path / "completions", tiny_folder, echo)
    assert len(Echo.calls) == 1
    with pytest.raises(ArtifactError, match=r"made with other settings: seed 0 -> 1\. Set overwrite=true"):
        run(prompts, tmp_path / "completions", tiny_folder, echo, seed=1)
    run(prompts, tmp_path / "completions", tiny_folder, echo, seed=1, overwrite=True)
    assert len(Echo.calls) == 2


def test_another_round_and_another_seed_give_other_samples(tmp_path, tiny_folder):
    prompts = write(tmp_path / "prompts", [prompt("Tom has 3 apples and buys 4 more. How many has he?")])
    generator = HF(num_samples=4, max_new_tokens=12)
    found = [
        run(prompts, tmp_path / f"{seed}-{round_}", tiny_folder, generator, seed=seed, round_=round_)
        for seed, round_ in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({c.seed for written in found for c in written}) == 12
    assert len({tuple(tuple(c.token_ids) for c in written) for written in found}) == 3
