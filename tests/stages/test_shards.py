"""Sharded generation: every row once, the merged artifact is that of one job, and no wrong shard gets into it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.generators import Generator
from prefpipe.generators.hf import HF
from prefpipe.generators.replay import Replay
from prefpipe.records import Completion, Prompt, Split, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.stages.generate import generate
from prefpipe.stages.shards import shard_folder, shard_of

TINY = ModelConfig(name="tiny", path="builtin:tiny")
CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)
NUM_SHARDS, NUM_PROMPTS = 3, 40

Run = Callable[..., None]


def prompt(number: int) -> Prompt:
    """Every fifth is held out, every seventh has no recorded completion."""
    messages = [{"role": "user", "content": f"question {number}"}]
    split = Split.heldout if number % 5 == 0 else Split.train
    return Prompt(prompt_id=prompt_id(messages), messages=messages, source="test", split=split)


def write(out: Path, rows: list[Prompt]) -> Path:
    with artifacts.draft(out, Plan("prepare", Prompt.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    return out


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """stage=generate with recorded completions, whose number differs from prompt to prompt."""
    rows = [prompt(number) for number in range(NUM_PROMPTS)]
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_bytes(
        b"\n".join(
            orjson.dumps({"prompt_id": row.prompt_id, "texts": [f"answer {number}.{i}" for i in range(number % 3 + 1)]})
            for number, row in enumerate(rows)
            if number % 7
        )
    )
    prompts = write(tmp_path / "prompts", rows)

    def call(
        out: Path, *, shard: int | None = None, num_shards: int = NUM_SHARDS, seed: int = 0, **other: object
    ) -> None:
        generator = Replay(path=str(recorded), num_samples=3, prompts_per_part=6, shard=shard, num_shards=num_shards)
        settings = {"model": TINY, "folder": None, "hardware": CPU, "seed": seed, "round_": 0, "generator": generator}
        generate([prompts], out, **{**settings, **other})  # type: ignore[arg-type]

    return call


def shards(run: Run, out: Path) -> None:
    for shard in range(NUM_SHARDS):
        run(out, shard=shard)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "provenance.json"}


def test_the_merged_artifact_is_that_of_one_job_in_every_byte(run, tmp_path):
    """Its manifest too: parts, counts by reason, settings and parents."""
    run(tmp_path / "whole", num_shards=1)
    shards(run, tmp_path / "completions")
    run(tmp_path / "completions")
    assert contents(tmp_path / "completions") == contents(tmp_path / "whole")
    found = artifacts.manifest(tmp_path / "completions")
    assert found["counts"]["filtered"] == {"heldout": 8, "no_completion": 4}
    assert (found["counts"]["rows_in"], found["counts"]["rows_out"]) == (40, 28)
    assert len(found["parts"]) == 7


def test_one_job_takes_a_merged_artifact_for_its_own(run, tmp_path, caplog):
    shards(run, tmp_path / "completions")
    run(tmp_path / "completions")
    before = (tmp_path / "completions" / "provenance.json").read_bytes()
    for shard in range(NUM_SHARDS):
        shutil.rmtree(shard_folder(tmp_path / "completions", shard, NUM_SHARDS))
    run(tmp_path / "completions", num_shards=1)
    run(tmp_path / "completions")
    assert (tmp_path / "completions" / "provenance.json").read_bytes() == before


@given(st.text(), st.integers(1, 1000))
def test_a_shard_is_a_number_below_num_shards(identity, num_shards):
    assert 0 <= shard_of(identity, num_shards) < num_shards
    assert shard_of(identity, num_shards) == shard_of(identity, num_shards)


def test_membership_never_changes_and_is_even():
    """sha256 of "shard/<id>", its first 8 bytes as a big-endian number, modulo num_shards."""
    assert [shard_of(identity, 8) for identity in ("00", "01", "0123456789abcdef")] == [1, 7, 5]
    sizes = [0] * 8
    for number in range(4000):
        sizes[shard_of(prompt(number).prompt_id, 8)] += 1
    assert min(sizes) > 430  # 500 expected, standard deviation 21
    assert max(sizes) < 570


def test_a_shard_holds_its_own_prompts_alone_in_their_order(run, tmp_path):
    shards(run, tmp_path / "completions")
    order = [prompt(number).prompt_id for number in range(NUM_PROMPTS)]
    seen: list[str] = []
    for shard in range(NUM_SHARDS):
        folder = shard_folder(tmp_path / "completions", shard, NUM_SHARDS)
        found = list(dict.fromkeys(row.prompt_id for row in artifacts.read(folder, Completion, key="k")))
        assert found == [i for i in order if i in found]
        assert {shard_of(i, NUM_SHARDS) for i in found} == {shard}
        seen += found
    assert len(seen) == len(set(seen)) == 28


def test_a_missing_shard_is_named_with_what_makes_it(run, tmp_path):
    for shard in (0, 2):
        run(tmp_path / "completions", shard=shard)
    with pytest.raises(
        ArtifactError,
        match=r"1 of 3 shards are missing: 1; run stage=generate generator.num_shards=3 generator.shard=1",
    ):
        run(tmp_path / "completions")
    assert not artifacts.is_complete(tmp_path / "completions")


def test_swapped_and_doubled_shards_are_refused(run, tmp_path):
    out = tmp_path / "completions"
    shards(run, out)
    first, second = (shard_folder(out, shard, NUM_SHARDS) for shard in (0, 1))
    shutil.move(first, tmp_path / "aside")
    shutil.copytree(second, first)
    with pytest.raises(ArtifactError, match=r"shard-0-of-3 is not shard 0 of .*: shard '1 of 3' -> '0 of 3'"):
        run(out)
    shutil.rmtree(second)
    shutil.move(tmp_path / "aside", second)
    with pytest.raises(ArtifactError, match="shard-0-of-3 is not shard 0"):
        run(out)


def test_a_shard_of_another_number_of_shards_is_refused(run, tmp_path):
    out = tmp_path / "completions"
    shards(run, out)
    run(out, shard=0, num_shards=4)
    shutil.rmtree(shard_folder(out, 0, 3))
    shutil.move(shard_folder(out, 0, 4), shard_folder(out, 0, 3))
    with pytest.raises(ArtifactError, match="shard '0 of 4' -> '0 of 3'"):
        run(out)


def test_stale_shards_are_refused(run, tmp_path):
    out = tmp_path / "completions"
    shards(run, out)
    with pytest.raises(ArtifactError, match=r"shard-0-of-3 is not shard 0 .*: seed 0 -> 1"):
        run(out, seed=1)
    shutil.rmtree(tmp_path / "prompts")
    write(tmp_path / "prompts", [prompt(number) for number in range(1, NUM_PROMPTS)])
    with pytest.raises(ArtifactError, match="its input 'prompts' has other content"):
        run(out)
    run(out, shard=0, overwrite=True)
    with pytest.raises(ArtifactError, match="shard-1-of-3 is not shard 1"):
        run(out)


@pytest.mark.parametrize("harm", ["cut", "doubled", "swapped", "bit", "gone"])
def test_a_shard_that_was_changed_is_refused(run, tmp_path, harm):
    out = tmp_path / "completions"
    shards(run, out)
    part = shard_folder(out, 1, NUM_SHARDS) / "part-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    changed = {
        "cut": lines[:-1],
        "doubled": [lines[0], *lines],
        "swapped": [lines[1], lines[0], *lines[2:]],
        "bit": [lines[0].replace(b"answer", b"answes"), *lines[1:]],
    }
    if harm == "gone":
        part.unlink()
    else:
        part.write_bytes(b"".join(changed[harm]))
    with pytest.raises(ArtifactError, match=r"part-00000.jsonl"):
        run(out)
    assert not artifacts.is_complete(out)


@pytest.mark.parametrize("harm", ["doubled", "foreign", "lost", "uncounted"])
def test_a_shard_whose_manifest_agrees_with_wrong_rows_is_refused(run, tmp_path, harm):
    """As a bug would write it: the digests are right, the rows are not those of the prompts."""
    out = tmp_path / "completions"
    shards(run, out)
    folder = shard_folder(out, 1, NUM_SHARDS)
    rows = list(artifacts.read(folder, Completion, key="k"))
    other = next(artifacts.read(shard_folder(out, 0, NUM_SHARDS), Completion, key="k"))
    lost = [row for row in rows if row.prompt_id != rows[0].prompt_id]
    wrong = {"doubled": [*rows, *rows[-3:]], "foreign": [*rows, other], "lost": lost, "uncounted": lost}[harm]
    plan = Plan("generate", Completion.schema, **_uses_and_parents(folder, tmp_path))
    counts = artifacts.manifest(folder)["counts"]
    filtered = counts["filtered"] | (
        {"invented": 1 + len({row.prompt_id for row in rows})} if harm == "uncounted" else {}
    )
    with artifacts.draft(folder, plan, overwrite=True) as draft:
        total = counts["rows_out"] + sum(filtered.values())
        draft.commit(0, wrong, rows_in=total, rows_out=counts["rows_out"], filtered=filtered)
    message = {
        "doubled": "is doubled, out of order, or of a prompt that is not in this shard",
        "foreign": "is doubled, out of order, or of a prompt that is not in this shard",
        "lost": "shard-1-of-3: rows are lost",
        "uncounted": r"shard-1-of-3 counts more prompts as left out \(invented\)",
    }[harm]
    with pytest.raises(ArtifactError, match=message):
        run(out)
    assert not artifacts.is_complete(out)


def _uses_and_parents(folder: Path, tmp_path: Path) -> dict[str, object]:
    return {"uses": artifacts.manifest(folder)["uses"], "parents": {"prompts": [tmp_path / "prompts"]}}


def test_a_killed_shard_goes_on_after_its_last_part(run, tmp_path, monkeypatch):
    """Nothing is lost, doubled, or asked for again."""
    asked: list[str] = []
    real = Replay.generate

    def dying(self, prompts, **other):
        if len(asked) >= 4 and dying.armed:
            raise RuntimeError("killed")
        asked.extend(p.prompt_id for p in prompts)
        yield from real(self, prompts, **other)

    dying.armed = True
    monkeypatch.setattr(Replay, "generate", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "completions", shard=0)
    assert asked
    dying.armed = False
    shards(run, tmp_path / "completions")
    assert len(asked) == len(set(asked)) == 32
    run(tmp_path / "completions")
    run(tmp_path / "whole", num_shards=1)
    assert contents(tmp_path / "completions") == contents(tmp_path / "whole")


def test_a_killed_merge_is_done_again_from_the_shards(run, tmp_path, monkeypatch):
    from prefpipe.stages import shards as module

    out = tmp_path / "completions"
    shards(run, out)
    real, calls = module._Shard.take, []

    def dying(self, wanted):
        calls.append(wanted)
        if len(calls) == 20:
            raise RuntimeError("killed")
        return real(self, wanted)

    monkeypatch.setattr(module._Shard, "take", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(out)
    assert list(artifacts.partial_path(out).glob("part-*.jsonl"))
    monkeypatch.setattr(module._Shard, "take", real)
    run(out)
    run(tmp_path / "whole", num_shards=1)
    assert contents(out) == contents(tmp_path / "whole")


def test_sampled_shards_are_the_same_rows_as_one_job(tmp_path, tiny_folder):
    """Token for token; log-probabilities to rounding, as a batch of other rows may add up in another order."""
    prompts = write(tmp_path / "prompts", [prompt(number) for number in range(12)])

    def sample(out: Path, **shards: int) -> None:
        generator = HF(num_samples=2, max_new_tokens=12, prompts_per_part=5, **shards)
        settings = {"model": TINY, "folder": tiny_folder, "hardware": CPU, "seed": 0, "round_": 0}
        generate([prompts], out, generator=generator, **settings)  # type: ignore[arg-type]

    sample(tmp_path / "whole")
    for shard in range(2):
        sample(tmp_path / "completions", num_shards=2, shard=shard)
    sample(tmp_path / "completions", num_shards=2)
    whole, merged = (list(artifacts.read(tmp_path / name, Completion, key="k")) for name in ("whole", "completions"))
    assert [(c.completion_id, c.token_ids, c.seed) for c in merged] == [
        (c.completion_id, c.token_ids, c.seed) for c in whole
    ]
    assert [c.logp for c in merged] == pytest.approx([c.logp for c in whole], abs=1e-4)
    assert artifacts.manifest(tmp_path / "whole")["uses"] == artifacts.manifest(tmp_path / "completions")["uses"]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({"shard": 0}, "generator.shard=0 needs generator.num_shards above 1"),
        ({"num_shards": 0}, "generator.num_shards=0 must be at least 1"),
        ({"num_shards": 2, "shard": 2}, r"generator.shard=2 must be from 0 to generator.num_shards - 1 = 1"),
        ({"num_shards": 2, "shard": -1}, "generator.shard=-1 must be from 0"),
    ],
)
def test_impossible_shards_are_refused(shards, message):
    with pytest.raises(ConfigError, match=message):
        Generator(name="hf", **shards)


def test_a_sweep_over_shards_writes_into_one_run(cli, tmp_path):
    """As an array of jobs would: one run folder, and the command without a shard merges."""
    common = ("stage=generate", "debug=tiny", "generator.num_shards=3")
    cli("stage=prepare", "debug=tiny", "data_mixer.sources.arithmetic.num=24")
    assert "3 of 3 shards are missing: 0,1,2" in cli(*common, check=False).stderr
    cli("-m", *common, "generator.shard=range(0,3)")
    cli(*common)
    folder = tmp_path / "runs" / "default"
    assert sorted(path.name for path in (folder / "round_0").iterdir() if path.is_dir()) == [
        "completions", *(f"completions.shard-{shard}-of-3" for shard in range(3)),
    ]  # fmt: skip
    assert not (folder / "points").exists()
    assert (folder / "logs" / "generate-shard-1-of-3-round_0.log").is_file()
    before = artifacts.digest(folder / "round_0" / "completions")
    cli("stage=generate", "debug=tiny")
    assert artifacts.digest(folder / "round_0" / "completions") == before
    refused = cli("stage=evaluate", "debug=tiny", "generator.num_shards=3", "generator.shard=1", check=False).stderr
    assert "generator.shard=1 would be ignored by stage=evaluate" in refused
