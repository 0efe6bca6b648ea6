"""generator=openai against a real server: samples and their seeds, what is lacking, what is never asked twice."""

from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer, Script

from prefpipe import artifacts
from prefpipe.api import ApiConfig
from prefpipe.artifacts import Plan
from prefpipe.errors import ApiError, ArtifactError, ConfigError
from prefpipe.generators import request_seed
from prefpipe.generators.openai import OpenAI
from prefpipe.generators.replay import Replay
from prefpipe.records import Completion, Prompt, completion_id, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig, TrainingConfig
from prefpipe.stages.evaluate import PolicyUnderTest
from prefpipe.stages.generate import generate

NONE, CPU = ModelConfig(name="none", path="none"), HardwareConfig(name="cpu")


def prompts(folder: Path, *questions: str) -> Path:
    messages = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in questions]
    rows = [
        Prompt(prompt_id=prompt_id(m), messages=m, source="test", answer="#### 1", meta={"level": 2}) for m in messages
    ]
    with artifacts.draft(folder, Plan("prepare", Prompt.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    return folder


def run(given: Path, out: Path, generator: OpenAI, **other: Any) -> list[Completion]:
    settings = {"model": NONE, "folder": None, "hardware": CPU, "seed": 0, "round_": 2, **other}
    generate([given], out, generator=generator, **settings)
    return list(artifacts.read(out, Completion, key="k"))


def openai(server: FaultServer, folder: Path, **other: Any) -> OpenAI:
    api = {"max_attempts": 2, "backoff_seconds": 0.01, **other.pop("api", {})}
    return OpenAI(
        api=ApiConfig(base_url=server.url, model="m", cache=str(folder / "cache"), **api),
        **{"num_samples": 3, "max_new_tokens": 20, **other},
    )


def echo(request: dict[str, Any], attempt: int) -> Script:
    text = f"{request['messages'][-1]['content']} {request['seed']}"
    return Script(text, finish_reason="length" if "long" in text else "stop", extra={"token_ids": [5, 6, 2]})


def test_each_sample_has_its_own_seed_and_everything_that_is_known_of_it(tmp_path):
    given = prompts(tmp_path / "prompts", "short", "long")
    with FaultServer(echo) as server:
        written = run(given, tmp_path / "out", openai(server, tmp_path, temperature=0.7, top_p=0.9))
    (first, *_), seeds = written, [c.seed for c in written]
    assert seeds == [request_seed(0, 2, c.prompt_id, i % 3) for i, c in enumerate(written)]
    assert [c.text for c in written] == [f"{c.messages[-1]['content']} {c.seed}" for c in written]
    assert [c.finish_reason for c in written] == ["stop"] * 3 + ["length"] * 3
    assert first == Completion(
        prompt_id=prompt_id(first.messages),
        completion_id=completion_id(first.prompt_id, first.text, 0, 2),
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "short"}],
        source="test",
        answer="#### 1",
        meta={"level": 2},
        text=f"short {seeds[0]}",
        token_ids=[5, 6, 2],
        finish_reason="stop",
        seed=seeds[0],
        round=2,
        model="m-2026",
    )
    assert len({c.completion_id for c in written}) == 6


def test_samples_may_share_a_request_and_the_price_of_its_prompt(tmp_path):
    given = prompts(tmp_path / "prompts", "a", "b")
    with FaultServer(echo) as server:
        written = run(given, tmp_path / "out", openai(server, tmp_path, num_samples=5, samples_per_request=2))
    assert sorted(server.answered.values()) == [1] * 6  # 2 + 2 + 1 samples, twice
    assert len(written) == len({c.completion_id for c in written}) == 10
    assert [c.seed for c in written[:5]] == [
        request_seed(0, 2, written[0].prompt_id, start) for start in (0, 0, 2, 2, 4)
    ]


def test_what_is_lacking_is_counted_by_reason(tmp_path):
    """A prompt keeps the samples that it has; one without any is left out. Seeds tell the samples of a prompt apart."""
    given = prompts(tmp_path / "prompts", "good", "refused", "broken", "mixed", "silent", "cut")
    mixed = request_seed(
        0, 2, prompt_id([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "mixed"}]), 1
    )

    def handler(request: dict[str, Any], attempt: int) -> Script:
        kind = request["messages"][-1]["content"]
        if kind == "mixed":
            return Script(status=500) if request["seed"] == mixed else Script("fine")
        return {
            "good": Script("fine"),
            "refused": Script("", message={"refusal": "I cannot"}),
            "broken": Script(status=502),
            "silent": Script("  "),
            "cut": Script("half", finish_reason="abort"),
        }[kind]

    with FaultServer(handler) as server:
        written = run(given, tmp_path / "out", openai(server, tmp_path, api={"max_failed_fraction": 1.0}))
    assert [c.messages[-1]["content"] for c in written] == ["good"] * 3 + ["mixed"] * 2
    assert artifacts.manifest(tmp_path / "out")["counts"] == {
        "rows_in": 6,
        "rows_out": 2,
        "filtered": {"empty_text": 1, "refused": 1, "server_error": 1, "unknown_finish_reason": 1},
        "quarantined": {},
        "kept": {"server_error": 1},
    }


def test_a_server_that_ignores_n_is_noticed(tmp_path):
    one = Script(body=b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}')
    with FaultServer(lambda request, attempt: one) as server:
        generator = openai(server, tmp_path, samples_per_request=3)
        written = run(prompts(tmp_path / "prompts", "a"), tmp_path / "out", generator)
    assert len(written) == 1
    assert artifacts.manifest(tmp_path / "out")["counts"]["kept"] == {"too_few_choices": 1}


def test_a_stopped_run_goes_on_with_other_prices_and_patience_but_not_with_other_samples(tmp_path):
    given = prompts(tmp_path / "prompts", *"abcdefgh")
    costly = {"prompt_price": 1e4, "completion_price": 1e5, "max_concurrency": 1}
    with FaultServer(echo) as server:
        with pytest.raises(ApiError, match=r"generator\.api\.max_cost=20"):
            run(given, tmp_path / "out", openai(server, tmp_path, prompts_per_part=2, api={**costly, "max_cost": 20.0}))
        patient = openai(
            server, tmp_path, prompts_per_part=2, api={**costly, "max_cost": 900.0, "timeout_seconds": 77.0}
        )
        written = run(given, tmp_path / "out", patient)
        assert len(written) == 24
        assert set(server.answered.values()) == {1}
        run(given, tmp_path / "out", openai(server, tmp_path, prompts_per_part=2))
        assert sum(server.attempts.values()) == 24
        with pytest.raises(ArtifactError, match=r"generator\.temperature 1\.0 -> 0\.5"):
            run(given, tmp_path / "out", openai(server, tmp_path, prompts_per_part=2, temperature=0.5))
    uses = artifacts.manifest(tmp_path / "out")["uses"]
    assert uses["generator"]["api"] == {"endpoint": server.url, "model": "m", "extra_body": None}
    assert "model" not in uses  # no policy was sampled


@pytest.mark.parametrize("generator", [OpenAI(num_samples=1), Replay(num_samples=1)])
def test_no_checkpoint_is_evaluated_with_what_another_model_wrote(tmp_path, generator):
    policy = PolicyUnderTest(NONE, tmp_path, generator, TrainingConfig(), CPU, 0)
    with pytest.raises(ConfigError, match=rf"generator={generator.name} does not sample the checkpoint.*generator=hf"):
        policy.sample([], num_samples=1, temperature=0.0)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"samples_per_request=5 must be between 1 and generator\.num_samples=4"):
        OpenAI(samples_per_request=5)
    with pytest.raises(ConfigError, match=r"generator\.calculator=true, but generator=openai has none"):
        OpenAI(calculator=True)
