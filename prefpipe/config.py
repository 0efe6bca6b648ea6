"""The shape of a run, and the way from a Hydra config to plain dataclasses and back.

`register_schemas` offers every dataclass to conf/, `to_run_config` turns a composed config into plain dataclasses and
refuses what no dataclass declares, `load_run_config` reads a frozen config back without Hydra.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

import prefpipe.generators
import prefpipe.losses
import prefpipe.pairers
import prefpipe.sampling
import prefpipe.scorers
import prefpipe.tasks
import prefpipe.tracking
from prefpipe import settings
from prefpipe.components import COMPONENTS
from prefpipe.errors import ConfigError

PACKAGED = Path(__file__).parent / "conf"
CONF_DIR = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[1] / "conf"

DATA_GROUPS: dict[str, type[Any]] = {
    "model": settings.ModelConfig,
    "source": settings.SourceConfig,
    "data_mixer": settings.DataMixerConfig,
    "selection": settings.SelectionConfig,
    "training": settings.TrainingConfig,
    "hardware": settings.HardwareConfig,
    "recipe": settings.RecipeConfig,
    "sweep": settings.SweepConfig,
    "paths": settings.PathsConfig,
}


@dataclass
class RunConfig:
    """Everything one command knows. See conf/config.yaml for what each key does."""

    stage: settings.Stage = MISSING
    exp_name: str = "default"
    point: str = ""
    round: int = 0
    seed: int = 0
    overwrite: bool = False
    plan: bool = False
    inputs: settings.InputsConfig = field(default_factory=settings.InputsConfig)
    preview: settings.PreviewConfig = field(default_factory=settings.PreviewConfig)
    browse: settings.BrowseConfig = field(default_factory=settings.BrowseConfig)
    launch: settings.LaunchConfig = field(default_factory=settings.LaunchConfig)
    model: settings.ModelConfig = MISSING
    data_mixer: settings.DataMixerConfig = MISSING
    generator: prefpipe.generators.Generator = MISSING
    sampling: prefpipe.sampling.Sampling = MISSING
    scorer: prefpipe.scorers.Scorer = MISSING
    pairer: prefpipe.pairers.Pairer = MISSING
    loss: prefpipe.losses.Loss = MISSING
    selection: settings.SelectionConfig = field(default_factory=settings.SelectionConfig)
    training: settings.TrainingConfig = MISSING
    task: dict[str, prefpipe.tasks.Task] = field(default_factory=dict)
    hardware: settings.HardwareConfig = MISSING
    recipe: settings.RecipeConfig = MISSING
    sweep: settings.SweepConfig = field(default_factory=settings.SweepConfig)
    tracking: prefpipe.tracking.Tracking = MISSING
    paths: settings.PathsConfig = MISSING


def register_schemas() -> None:
    """Put every dataclass where `defaults:` in conf/ can find it, under schema/ (never listed as a choice)."""
    for package in (prefpipe.generators, prefpipe.sampling, prefpipe.scorers, prefpipe.tasks, prefpipe.tracking):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    _store(None, "run_schema", RunConfig)
    for name, cls in DATA_GROUPS.items():
        _store("schema", name, cls)
    for kind, classes in COMPONENTS.items():
        for name, cls in classes.items():
            _store(f"schema/{kind}", name, cls)


_stored: set[tuple[str | None, str, type]] = set()


def _store(group: str | None, name: str, cls: type) -> None:
    """Once for each class: making a config of a dataclass takes milliseconds."""
    if (group, name, cls) not in _stored:
        ConfigStore.instance().store(group=group, name=name, node=cls)
        _stored.add((group, name, cls))


def unknown_keys(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    """Keys that no dataclass declares. Hydra lets `+key=` and `++key=` add them even to structured configs.

    `_target_` and its kind are reported wherever they stand: nothing in prefpipe instantiates what a config names.
    """
    if isinstance(node, ListConfig):
        for index in range(len(node)):
            child = node._get_node(index)
            if isinstance(child, DictConfig | ListConfig):
                yield from unknown_keys(child, f"{prefix}{index}.")
        return
    node_type = OmegaConf.get_type(node)
    is_schema = node_type is not None and dataclasses.is_dataclass(node_type)
    declared = {f.name for f in dataclasses.fields(node_type)} if is_schema else set()  # type: ignore[arg-type]
    for key in node:
        full_key = prefix + str(key)
        hostile = str(key).startswith("_") and str(key).endswith("_")
        if hostile or (is_schema and key not in declared):
            yield full_key
            continue
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig) and not child._is_none() and not child._is_missing():
            yield from unknown_keys(child, full_key + ".")


def to_run_config(cfg: DictConfig) -> RunConfig:
    """Composed config to plain dataclasses. Raises ConfigError or an OmegaConf error, naming the key."""
    unknown = list(unknown_keys(cfg))
    if unknown:
        raise ConfigError(f"no such config key: {', '.join(unknown)}")
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    for kind, classes in COMPONENTS.items():
        found = getattr(run, kind)
        for part in found.values() if isinstance(found, dict) else [found]:
            if classes.get(part.name) is not type(part):
                raise ConfigError(f"{kind}.name={part.name!r} cannot be overridden; write {kind}={part.name}")
    return run


def freeze(cfg: DictConfig, path: Path) -> None:
    """Write the resolved config for workers to read; atomically, as several processes may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    temporary.rename(path)


def load_frozen(path: Path) -> DictConfig:
    """Read back a frozen config, typed again: YAML alone forgets which class a component was."""
    saved = OmegaConf.load(path)
    schema = OmegaConf.structured(RunConfig)
    for kind, classes in COMPONENTS.items():
        for where, part in _parts(saved, kind):
            if part.name not in classes:
                raise ConfigError(
                    f"{path}: {where}.name={part.name} is no {kind}; there are {', '.join(sorted(classes))}"
                )
            OmegaConf.update(schema, where, OmegaConf.structured(classes[part.name]), merge=False, force_add=True)
    merged = OmegaConf.merge(schema, saved)
    assert isinstance(merged, DictConfig)
    return merged


def load_run_config(path: Path) -> RunConfig:
    """A frozen config as plain dataclasses, without Hydra."""
    return to_run_config(load_frozen(path))


def _parts(saved: Any, kind: str) -> Iterator[tuple[str, Any]]:
    node = saved.get(kind)
    if node is None:
        return
    if kind == "task":
        yield from ((f"task.{name}", part) for name, part in node.items())
    else:
        yield kind, node
