"""The command line against a server: generate and score, stopped by a budget, and the key nowhere to be found."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fault_server import FaultServer, Script

from prefpipe import artifacts
from prefpipe.records import Completion, ScoredCompletion

KEY = "sk-canary-4/f7A+b2c9"


def both(request: dict[str, Any], attempt: int) -> Script:
    """A model that answers and judges; at first it is overloaded, and it repeats the key in everything that it says."""
    if attempt == 0 and len(request["messages"][-1]["content"]) % 3 == 0:
        return Script(
            status=429, headers={"Retry-After": "0"}, body=b'{"error": {"message": "slow down, %s"}}' % KEY.encode()
        )
    if request["model"] == "judge":
        assert request["user"] == {"tier": 1}
    if request["model"] == "writer":
        return Script(f"{KEY} says #### {request['seed'] % 9}")
    return Script(f"Dear {KEY}: [[{len(request['messages'][-1]['content']) % 10 + 1}]]")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return [
        "exp_name=api",
        "data_mixer.sources.arithmetic.num=12",
        f"paths.cache={tmp_path / 'cache'}",
        "model.path=no/such-model",  # whose weights nobody needs
    ]


def api(kind: str, server: FaultServer, model: str) -> list[str]:
    values = {
        "base_url": server.url,
        "model": model,
        "api_key_env": "SOME_PROVIDERS_KEY",
        "backoff_seconds": 0.01,
        "prompt_price": 1e4,
        "completion_price": 1e5,
    }
    return [f"{kind}.api.{name}={value}" for name, value in values.items()]


def test_generate_and_score_stopped_by_a_budget_and_finished(cli, settings, tmp_path, monkeypatch):
    """Each answer costs 2 in all. The server counts; what it answered before the stop is not asked for again."""
    monkeypatch.setenv("SOME_PROVIDERS_KEY", KEY)
    run, said = tmp_path / "runs" / "api", ""
    with FaultServer(both) as server:
        said += _said(cli("stage=prepare", *settings))
        generate = ["stage=generate", "generator=openai", "generator.num_samples=2", "generator.max_new_tokens=10"]
        said += _said(cli(*generate, *settings, *api("generator", server, "writer")))
        completions = list(artifacts.read(run / "round_0" / "completions", Completion, key="k"))
        prompts = len({row.prompt_id for row in completions})
        assert len(completions) == 2 * prompts == sum(server.answered.values()) > 12
        assert all(row.text.startswith("[key] says ####") and row.model == "writer-2026" for row in completions)

        judged = ["stage=score", "scorer=judge", "scorer.max_new_tokens=10", *settings, *api("scorer", server, "judge")]
        judged.append("scorer.api.extra_body={user: {tier: 1}}")
        spent = 2 * sum(server.answered.values())
        stopped = cli(*judged, f"scorer.api.max_cost={spent + 20}", check=False)
        assert stopped.returncode == 1
        assert "prefpipe: error: scorer.api.max_cost=" in stopped.stderr
        assert stopped.stderr.count("error") == 1
        assert spent < 2 * sum(server.answered.values()) <= spent + 20
        said += _said(stopped) + _said(cli(*judged, "scorer.api.max_cost=1000"))
        scored = list(artifacts.read(run / "round_0" / "scored", ScoredCompletion, key="k"))
        assert len(scored) == len(completions)
        assert all(1 <= row.scores["judge"] <= 10 for row in scored)
        assert set(server.answered.values()) == {1}
        assert all(KEY.encode() in head for head in server.received)
    manifest = artifacts.manifest(run / "round_0" / "scored")
    assert manifest["uses"]["scorer"]["api"] == {
        "endpoint": server.url,
        "model": "judge",
        "extra_body": {"user": {"tier": 1}},
    }
    files = [file for folder in (tmp_path / "runs", tmp_path / "cache") for file in folder.rglob("*") if file.is_file()]
    assert {"answers.sqlite", "spend.sqlite", "manifest.json"} <= {file.name for file in files}
    assert any(file.suffix == ".log" for file in files)
    everything = said.encode() + b"".join(file.read_bytes() for file in files)
    for spelling in (KEY, quote(KEY, safe=""), base64.b64encode(KEY.encode()).decode()):
        assert spelling.encode() not in everything
    assert b"SOME_PROVIDERS_KEY" not in b"".join(f.read_bytes() for f in files if f.name == "manifest.json")


def _said(done: Any) -> str:
    return str(done.stdout) + str(done.stderr)
