"""The wheel in an environment of its own: it runs from any folder, with a user's own YAML files."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import find_links

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.integration


def call(*command: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 900) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy that has a machine's own settings, as a real checkout may."""
    source = tmp_path_factory.mktemp("source")
    for name in ("prefpipe", "conf"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("README.md", "LICENSE", "pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, source / name)
    (source / "conf" / "local" / "default.yaml").write_text("# @package _global_\nseed: 12345\n")
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", out, source, cwd=out)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with the wheel and the versions of constraints.txt."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    call(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python, uv = folder / "bin" / "python", Path(sys.executable).with_name("uv")
    wanted = ("-c", ROOT / "constraints.txt", wheel)
    if uv.exists():
        environment = {**os.environ, "UV_CACHE_DIR": str(ROOT / ".cache" / "uv")}
        call(uv, "pip", "install", "--python", python, *find_links(), *wanted, cwd=folder.parent, env=environment)
    else:
        call(python, "-m", "pip", "install", *wanted, cwd=folder.parent)
    return folder / "bin"


def names_in(folder: Path) -> Iterator[str]:
    return (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_the_wheel_holds_everything_that_is_read_at_run_time(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"prefpipe/conf/{name}" for name in names_in(ROOT / "conf") if not is_own(name)} <= names
    assert {f"prefpipe/assets/{name}" for name in names_in(ROOT / "prefpipe" / "assets")} <= names
    assert {f"prefpipe/report/{file.name}" for file in (ROOT / "prefpipe" / "report").glob("*.j2")} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"prefpipe"}


def is_own(name: str) -> bool:
    return name.startswith("local/") and name.endswith(".yaml")


def test_a_machines_own_settings_stay_out_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "prefpipe/conf/local/README.md" in names
    assert not [name for name in names if is_own(name.removeprefix("prefpipe/conf/"))]


def user_environment() -> dict[str, str]:
    ours = {"PREFPIPE_RUNS", "PYTHONPATH", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def test_the_demo_runs_from_another_folder(installed, tmp_path):
    """What the README promises: at least 500 held-out problems, and 0.08 more of them right than before."""
    call(installed / "prefpipe", "experiment=demo", cwd=tmp_path, env=user_environment())
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_bytes())
    assert summary["status"] == "complete"
    assert summary["num_eval"] >= 500
    assert summary["accuracy_after"] - summary["accuracy_before"] >= 0.08
    assert "<img" in (tmp_path / "runs" / "demo" / "report.html").read_text()
    config = (tmp_path / "runs" / "demo" / "round_0" / "train.yaml").read_text()
    assert "seed: 0" in config.splitlines()


def test_a_users_own_yaml_joins_by_config_dir(installed, tmp_path):
    """An experiment that builds on the demo, and a loss with another beta that only this folder knows."""
    own = tmp_path / "userconf"
    (own / "experiment").mkdir(parents=True)
    (own / "loss").mkdir()
    (own / "loss" / "my_dpo.yaml").write_text("defaults:\n  - dpo\n  - _self_\nbeta: 0.3\n")
    (own / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - demo\n"
        "  - override /loss: my_dpo\n"
        "  - _self_\n"
        "exp_name: mine\n"
        "data_mixer: {sources: {arithmetic: {num: 80}}}\n"
        "recipe: {before: [prepare]}\n"
    )
    tool = (installed / "prefpipe", "--config-dir", "userconf")
    assert "my_dpo" in call(*tool, "--help", cwd=tmp_path, env=user_environment())
    call(*tool, "experiment=mine", "generator.num_samples=4", cwd=tmp_path, env=user_environment())
    run = tmp_path / "runs" / "mine"
    summary = json.loads((run / "summary.json").read_bytes())
    assert (summary["status"], summary["loss"]) == ("complete", "dpo")
    assert 10 <= summary["num_eval"] < 70
    manifest = json.loads((run / "round_0" / "checkpoint" / "manifest.json").read_bytes())
    assert manifest["uses"]["loss"]["beta"] == 0.3
    assert manifest["git"] is None
    assert (run / "report.html").stat().st_size > 10_000
