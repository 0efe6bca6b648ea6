"""sampling=citation_branches against one-at-a-time decoding, and what becomes of the branches up to a pair."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from citing_model import document
from fault_server import FaultServer, Script
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefpipe import artifacts
from prefpipe.api import ApiConfig
from prefpipe.artifacts import Plan
from prefpipe.citations import cited
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.generators import Generator, Skipped
from prefpipe.generators.hf import HF
from prefpipe.generators.openai import OpenAI
from prefpipe.generators.replay import Replay
from prefpipe.pairers import OriginalBest
from prefpipe.records import Completion, Pair, Prompt, ScoredCompletion
from prefpipe.sampling.citation_branches import CitationBranches
from prefpipe.scorers import ScoringContext
from prefpipe.scorers.context_ablation import ContextAblation
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.stages.generate import generate
from prefpipe.stages.pair import pair
from prefpipe.stages.score import score

CPU = HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1)
QUESTIONS = ["Who?", "What has Tom?", "How many plums are there?", "Is it so?"]
CITE = re.compile(r"<cite>(.*?)</cite>")


def model(folder: Path) -> ModelConfig:
    return ModelConfig(name="citing", path=str(folder))


def sampled(
    folder: Path, prompts: list[Prompt], *, sampling: CitationBranches | None = None, **knobs: Any
) -> list[Completion | Skipped]:
    generator = HF(**{"num_samples": 1, "max_new_tokens": 40, **knobs})

    def ask(asked: Generator, rows: Any) -> Any:
        return asked.generate(rows, model=model(folder), folder=folder, hardware=CPU, seed=3, round_=0)

    return list((sampling or CitationBranches(num_branches=6)).sample(prompts, generator, ask, seed=3, round_=0))


def greedy(folder: Path, prompt: Prompt, behind: str, most: int) -> str:
    """What a plain loop writes, one forward pass over the whole text a token."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    head = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False) + behind
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_branches_are_what_one_at_a_time_decoding_writes(citing_folder):
    """Sampled answers with greedy citations: for each of them, what the oracle goes on with."""
    prompts = [document(question) for question in QUESTIONS]
    sampling = CitationBranches(num_branches=1, temperature=0.0, top_p=1.0, max_citation_tokens=5)
    found = [row for row in sampled(citing_folder, prompts, sampling=sampling) if isinstance(row, Completion)]
    compared = 0
    for prompt in prompts:
        original, *branches = [row for row in found if row.prompt_id == prompt.prompt_id]
        assert original.meta == {"is_original": True}
        expected = []
        for statement, cite in enumerate(CITE.finditer(original.text)):
            before, after = original.text[: cite.start(1)], original.text[cite.end(1) :]
            written = greedy(citing_folder, prompt, before.removesuffix(">"), 5)
            citation = written[1:].partition("</cite>")[0]
            compared += 1
            if "</cite>" in written and cited(f"<cite>{citation}</cite>") not in ([[]], cited(cite[0])):
                clean = "".join(r for r in re.findall(r"\[\d-\d\]", citation) if r[1] <= r[3])
                if cited(cite[0]) != [[]]:
                    expected.append((statement, 0, cite[1], original.text))
                expected.append((statement, 1, clean, before + clean + after))
        made = [(b.meta["statement"], b.meta["branch"], b.meta["citation"], b.text) for b in branches]
        assert made == expected
    assert compared >= 4
    assert len(found) > len(prompts)


def test_meta_says_what_a_branch_is(citing_folder):
    prompt = document(QUESTIONS[0])
    rows = sampled(citing_folder, [prompt], num_samples=3, max_new_tokens=30)
    completions = [row for row in rows if isinstance(row, Completion)]
    originals = {row.completion_id: row for row in completions if row.meta["is_original"]}
    assert len(originals) == 3
    assert len({row.completion_id for row in completions}) == len(completions)
    for branch in completions:
        if branch.meta["is_original"]:
            assert branch.token_ids
            continue
        original = originals[branch.meta["branch_of"]]
        own, mine = CITE.findall(original.text), CITE.findall(branch.text)
        statement = branch.meta["statement"]
        assert own[statement] == branch.meta["original_citation"]
        assert mine[statement] == branch.meta["citation"]
        assert mine[:statement] + mine[statement + 1 :] == own[:statement] + own[statement + 1 :]
        assert (branch.meta["branch"] == 0) == (branch.text == original.text)
        assert cited(branch.text)[statement], "a citation of nothing makes no branch"
        assert branch.token_ids == []
        assert branch.logp is None
        assert branch.finish_reason == original.finish_reason
    for _, of_one in itertools.groupby(completions, lambda c: (c.meta.get("branch_of"), c.meta.get("statement"))):
        ranges = [str(cited(c.text)[c.meta["statement"]]) for c in of_one if not c.meta["is_original"]]
        assert len(set(ranges)) == len(ranges)
    assert len(completions) > 6
    assert {row.reason for row in rows if isinstance(row, Skipped)} <= {"citation_empty", "citation_unreadable"}


def bare(rows: list[Any]) -> list[Any]:
    """Without log-probabilities, whose last digits depend on the batch."""
    return [row if isinstance(row, Skipped) else replace(row, logp=None) for row in rows]


def test_branches_do_not_depend_on_the_batch(citing_folder):
    prompts = [document(question) for question in QUESTIONS]
    together = sampled(citing_folder, prompts)
    alone = [row for prompt in prompts for row in sampled(citing_folder, [prompt])]
    assert bare(together) == bare(alone)
    backwards = sampled(citing_folder, prompts[::-1], max_batch_tokens=1)
    assert sorted(map(repr, bare(backwards))) == sorted(map(repr, bare(together)))


def test_what_is_no_citation_is_counted_by_its_reason(citing_folder):
    """Two tokens are too few for `>`, a range and `</cite>`."""
    short = CitationBranches(num_branches=6, max_citation_tokens=2)
    rows = sampled(citing_folder, [document(QUESTIONS[0])], sampling=short)
    assert {row.reason for row in rows if isinstance(row, Skipped)} <= {"citation_unclosed", "citation_empty"}
    assert Skipped(rows[0].prompt_id, "citation_unclosed") in rows
    assert [row.meta["is_original"] for row in rows if isinstance(row, Completion)] == [True]


def write(out: Path) -> Path:
    rows = [document(question) for question in QUESTIONS]
    with artifacts.draft(out, Plan("prepare", Prompt.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    return out


def stage(prompts: Path, out: Path, folder: Path, generator: Generator | None = None, **knobs: Any) -> list[Completion]:
    generator = generator or HF(**{"num_samples": 1, "max_new_tokens": 40, "prompts_per_part": 2, **knobs})
    generate(
        [prompts], out, generator=generator, model=model(folder), folder=folder, hardware=CPU, seed=3, round_=0,
        sampling=CitationBranches(num_branches=6),
    )  # fmt: skip
    return list(artifacts.read(out, Completion, key="k")) if artifacts.is_complete(out) else []


def test_from_branches_to_a_pair(citing_folder, tmp_path):
    """generate, score, pair: chosen has the best citation of every statement, by the branches' own scores."""
    prompts = write(tmp_path / "prompts")
    written = stage(prompts, tmp_path / "completions", citing_folder)
    (tmp_path / "cache").mkdir()
    context = ScoringContext(
        model(citing_folder), lambda: citing_folder, CPU, cache=tmp_path / "cache", work=tmp_path / "cache"
    )
    score([tmp_path / "completions"], tmp_path / "scored", scorer=ContextAblation(), context=context)
    pair([tmp_path / "scored"], tmp_path / "pairs", pairer=OriginalBest(), seed=0)
    scored = list(artifacts.read(tmp_path / "scored", ScoredCompletion, key="k"))
    pairs = {made.prompt_id: made for made in artifacts.read(tmp_path / "pairs", Pair, key="k")}
    assert pairs
    for original in (row for row in written if row.meta["is_original"]):
        branches = [row for row in scored if row.meta.get("branch_of") == original.completion_id]
        citations = CITE.findall(original.text)
        for statement in range(len(citations)):
            found = [row for row in branches if row.meta["statement"] == statement]
            if found:
                best = max(row.scores["context_ablation"] for row in found)
                citations[statement] = next(
                    row.meta["citation"] for row in found if row.scores["context_ablation"] == best
                )
        parts = iter(citations)
        expected = CITE.sub(lambda _, parts=parts: f"<cite>{next(parts)}</cite>", original.text)  # type: ignore[misc]
        made = pairs.pop(original.prompt_id, None)
        assert (made is None) == (expected == original.text)
        if made is not None:
            assert (made.chosen, made.rejected) == (expected, original.text)
            assert made.rejected_id == original.completion_id
            assert "statement" not in made.meta
            assert made.chosen_score is not None
            assert made.rejected_score is None or made.chosen_score >= made.rejected_score
    assert pairs == {}


def test_a_killed_run_goes_on_and_shards_make_the_same_artifact(citing_folder, tmp_path, monkeypatch):
    prompts = write(tmp_path / "prompts")
    whole = stage(prompts, tmp_path / "whole", citing_folder)
    real = HF.generate
    calls = itertools.count()

    def killed(*args: Any, **named: Any) -> Any:
        if next(calls) == 3:  # the branches of the second part
            raise RuntimeError("killed")
        return real(*args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(HF, "generate", killed)
        with pytest.raises(RuntimeError, match="killed"):
            stage(prompts, tmp_path / "again", citing_folder)
    assert stage(prompts, tmp_path / "again", citing_folder) == whole
    for shard in range(2):
        stage(prompts, tmp_path / "merged", citing_folder, num_shards=2, shard=shard)
    assert bare(stage(prompts, tmp_path / "merged", citing_folder, num_shards=2)) == bare(whole)


def test_other_settings_are_another_artifact(citing_folder, tmp_path):
    prompts = write(tmp_path / "prompts")
    stage(prompts, tmp_path / "out", citing_folder)
    with pytest.raises(ArtifactError, match="sampling"):
        generate(
            [prompts], tmp_path / "out", generator=HF(num_samples=1, max_new_tokens=40, prompts_per_part=2),
            model=model(citing_folder), folder=citing_folder, hardware=CPU, seed=3, round_=0,
        )  # fmt: skip


def test_a_server_is_asked_to_go_on_with_the_text(citing_folder, tmp_path):
    text = "<statement>He has apples.<cite>[0-0]</cite></statement>"

    def reply(request: dict[str, Any], attempt: int) -> Script:
        if not request.get("continue_final_message"):
            return Script(text)
        assert request["add_generation_prompt"] is False
        assert request["messages"][-1] == {"role": "assistant", "content": "<statement>He has apples.<cite"}
        assert (request["temperature"], request["top_p"], request["max_tokens"]) == (1.2, 0.9, 24)
        return Script([">[1-2]</cite></sta", ">[1-2] </cite>", "no", ">[3-", ">?</cite>"][request["seed"] % 5])

    with FaultServer(reply) as server:
        api = ApiConfig(base_url=server.url, model="m", cache=str(tmp_path / "cache"), max_attempts=1)
        rows = stage(write(tmp_path / "prompts"), tmp_path / "out", citing_folder, OpenAI(api=api, num_samples=1))
    assert [row.meta["is_original"] for row in rows].count(True) == len(QUESTIONS)
    branches = [row for row in rows if not row.meta["is_original"]]
    assert {row.text for row in branches} == {text, text.replace("[0-0]", "[1-2]")}
    kept = artifacts.manifest(tmp_path / "out")["counts"]["kept"]
    assert set(kept) == {"citation_unopened", "citation_unclosed", "citation_unreadable"}


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match=r"generator=replay cannot; use generator=hf"):
        CitationBranches().check(Replay())
    with pytest.raises(ConfigError, match=r"generator\.calculator=true is not for sampling=citation_branches"):
        CitationBranches().check(HF(calculator=True))
    with pytest.raises(ConfigError, match=r"sampling\.temperature=0 with sampling\.num_branches=10"):
        CitationBranches(temperature=0.0)
    for wrong in ({"num_branches": 0}, {"max_citation_tokens": 0}, {"top_p": 0.0}, {"temperature": -1.0}):
        ((key, value),) = wrong.items()
        with pytest.raises(ConfigError, match=rf"sampling\.{key}={value}"):
            CitationBranches(**wrong)
