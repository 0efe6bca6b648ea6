"""Every file in conf/ works, and conf/ and the registered components say the same."""

import re
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from prefpipe.check import Checker, default_stage, leaf_keys, without_hydra
from prefpipe.components import COMPONENTS
from prefpipe.config import (
    CONF_DIR,
    DATA_GROUPS,
    RunConfig,
    freeze,
    load_frozen,
    load_run_config,
    register_schemas,
    to_run_config,
)
from prefpipe.suggest import groups_and_options

ROOT = Path(__file__).parents[1]
LAUNCHERS = "hydra/launcher"
OPTIONS = [(group, option) for group, options in groups_and_options([CONF_DIR]).items() for option in options]

register_schemas()


@cache
def composed(group: str, option: str) -> DictConfig:
    """The default config with one option chosen, checked like a command."""
    checker = Checker(CONF_DIR, [CONF_DIR], "config", multirun=group in (LAUNCHERS, "sweep"))
    choice = f"+source@data_mixer.sources.{option}={option}" if group == "source" else f"{group}={option}"
    stage = [] if group == "experiment" else ["stage=train"]
    stage += ["hardware.num_nodes=2"] if option == "slurm_2x8" else []
    if (group, option) == ("source", "arithmetic"):
        choice = "data_mixer=arithmetic"
    (cfg,) = checker.check([*stage, choice])
    return cfg


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_file_composes_to_a_run(group: str, option: str, tmp_path: Path) -> None:
    cfg = composed(group, option)
    task = without_hydra(cfg)
    default_stage(task, cfg.hydra.runtime.choices)
    run = to_run_config(task)
    assert isinstance(run, RunConfig)
    if group == "task":
        assert run.task[option].name == option
    elif "name" in OmegaConf.to_container(task).get(group, {}):
        assert getattr(run, group).name == option, "the field `name` is the file's name"
    freeze(task, tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == run


@pytest.mark.parametrize("kind", COMPONENTS)
def test_components_and_files_are_in_bijection(kind: str) -> None:
    assert sorted(COMPONENTS[kind]) == sorted(path.stem for path in (CONF_DIR / kind).glob("*.yaml"))


def test_every_group_has_a_schema_or_is_known_to_have_none() -> None:
    assert {group for group, _ in OPTIONS} <= {*COMPONENTS, *DATA_GROUPS, "experiment", "debug", "local", LAUNCHERS}


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == LAUNCHERS])
def test_launchers_are_submitits_own_with_one_task_a_node(option: str) -> None:
    launcher = composed(LAUNCHERS, option).hydra.launcher
    assert launcher._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert launcher.tasks_per_node == 1
    assert (launcher.nodes, launcher.gpus_per_node) == {
        "slurm_cpu": (1, None),
        "slurm_1x8": (1, 8),
        "slurm_2x8": (2, 8),
    }.get(option, (launcher.nodes, launcher.gpus_per_node))


def test_no_file_says_target() -> None:
    assert [str(path) for path in CONF_DIR.rglob("*.yaml") if "_target_" in path.read_text()] == []


def test_every_file_of_a_component_points_at_its_code() -> None:
    for group, option in OPTIONS:
        text = (CONF_DIR / group / f"{option}.yaml").read_text()
        if group in {*COMPONENTS, *DATA_GROUPS}:
            code = re.search(r"^# code: (\S+\.py)(?:, class (\w+))?$", text, re.MULTILINE)
            assert code, f"{group}/{option}: the first line says where the code is"
            source = (ROOT / code[1]).read_text()
            assert code[2] is None or f"class {code[2]}(" in source
            if group in COMPONENTS:
                assert code[2] == COMPONENTS[group][option].__name__


def test_every_default_has_a_comment_that_help_shows() -> None:
    defaults = (CONF_DIR / "config.yaml").read_text().partition("\n\n")[0]
    groups = re.findall(r"^  - (?:optional )?(\w+): .+$", defaults, re.MULTILINE)
    assert groups == re.findall(r"^  - (?:optional )?(\w+): \S.* # .+$", defaults, re.MULTILINE)


def test_every_key_survives_freezing(tmp_path: Path) -> None:
    cfg = without_hydra(composed("loss", "simpo"))
    freeze(cfg, tmp_path / "config.yaml")
    frozen = load_frozen(tmp_path / "config.yaml")
    keys = leaf_keys(cfg)
    assert leaf_keys(frozen) == keys
    for key in keys:
        before, after = OmegaConf.select(cfg, key), OmegaConf.select(frozen, key)
        assert after == before, key
        assert type(after) is type(before), key
