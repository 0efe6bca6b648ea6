"""Composes every point of a command and finds what is wrong with it before anything runs, as one line for the user."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from prefpipe import suggest
from prefpipe.config import register_schemas, to_run_config, unknown_keys
from prefpipe.errors import ConfigError
from prefpipe.settings import Stage

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises about a config; ValueError for a number as a group's option."""

STAGES = ", ".join(stage.value for stage in Stage)

STOCK_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
"""What Hydra may instantiate: its own launchers and sweepers, and those installed beside it."""


class Checker:
    """Checks one command. conf and folders: the primary config folder, and all that offer options."""

    def __init__(self, conf: Path, folders: Sequence[Path], config_name: str, *, multirun: bool) -> None:
        self.conf = conf
        self.groups = suggest.groups_and_options(folders)
        self.config_name = config_name
        self.multirun = multirun
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hydra at the primary config, for `parse` and `point`."""
        register_schemas()
        with hydra.initialize_config_dir(str(self.conf), version_base="1.3", job_name="prefpipe"):
            yield

    def compose(self, overrides: Sequence[str]) -> list[DictConfig]:
        """Every point's composed config, with its hydra node; keys are checked, values only as far as their type.

        For a search only the first point; the search checks the others as it tries them (prefpipe/search.py).
        """
        configs: list[DictConfig] = []
        with self.opened():
            for index, point in enumerate(self._points(overrides)):
                configs.append(self._compose(index, point))
                if is_search(configs[0]):
                    return configs
            self._refuse_intervals(overrides, configs)
        return configs

    def point(self, overrides: Sequence[str]) -> DictConfig:
        """One point's composed config, its keys and values checked. Raises ConfigError."""
        cfg = self._compose(0, list(overrides))
        self._check_values(cfg)
        return cfg

    def check(self, overrides: Sequence[str]) -> list[DictConfig]:
        """compose, and everything else that can be known without running. Raises ConfigError."""
        configs = self.compose(overrides)
        for cfg in configs:
            self._check_values(cfg)
        if self.multirun:
            _check_points_differ(configs)
        return configs

    def _points(self, overrides: Sequence[str]) -> Iterator[list[str]]:
        """The overrides of each point, spelt and ordered as by Hydra's own sweeper; without -m there is one."""
        values: list[list[str]] = []
        for override in self.parse(overrides):
            line, key, value = str(override.input_line), override.get_key_element(), override.value()
            if re.search(r"(?<![A-Za-z0-9])_target_(?![A-Za-z0-9])", line):
                raise ConfigError(_refused(line))
            if not override.is_sweep_override():
                values.append([fixed_line(override)])
            elif not self.multirun:
                raise ConfigError(
                    f"{line} gives several values: add -m to sweep over them; a list is written {key}=[a,b]"
                )
            elif isinstance(value, IntervalSweep):
                values.append([f"{key}={value.start}"])  # for other sweepers than Hydra's own
            else:
                values.append([f"{key}={choice}" for choice in override.sweep_string_iterator()])
        return (list(point) for point in itertools.product(*values))

    def _refuse_intervals(self, overrides: Sequence[str], configs: Sequence[DictConfig]) -> None:
        for override in self.parse(overrides):
            own_sweeper = configs and configs[0].hydra.runtime.choices["hydra/sweeper"] != "basic"
            if isinstance(override.value(), IntervalSweep) and not own_sweeper:
                raise ConfigError(
                    f"{override.input_line}: an interval is for sweep=optuna; sweep=grid needs a number of them"
                )

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """The overrides, parsed. Raises ConfigError for what Hydra cannot read."""
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = []
        for line in overrides:
            try:
                parsed += parser.parse_overrides([line])
            except HydraException as error:
                key = line.lstrip("+~").partition("=")[0]
                base = self._base([other for other in overrides if other != line])
                if key not in dict(_nodes(base)) and key not in self.groups:
                    raise ConfigError(self._unknown_key(key, base)) from error
                reason = suggest.one_line(str(error).partition("\nSee https://")[0])
                raise ConfigError(
                    f"""cannot read {line}: {reason}; quote a value with = or , in it: 'key="a=b"'"""
                ) from error
        return parsed

    def _compose(self, index: int, overrides: list[str]) -> DictConfig:
        try:
            cfg = self._merged(overrides)
        except COMPOSITION_ERRORS as error:
            raise ConfigError(self._explain(error, overrides)) from error
        with read_write(cfg), open_dict(cfg.hydra.job):
            cfg.hydra.job.num, cfg.hydra.job.id = index, str(index)
        _refuse_targets(cfg)
        unknown = [key for key in unknown_keys(cfg) if key != "hydra"]
        if unknown or any(override.is_delete() for override in self.parse(overrides)):
            base = self._base(overrides)
            problem = self._culprit(overrides, base) or (self._unknown_key(unknown[0], base) if unknown else None)
            if problem:
                raise ConfigError(problem)
        return cfg

    def _merged(self, overrides: Sequence[str]) -> DictConfig:
        """What hydra.compose returns. Points that differ only in values share the merged files, most of the work.

        The values are merged by Hydra's own function, the last thing that its compose does.
        """
        parsed = self.parse(overrides)
        values = [override for override in parsed if self._is_value(override)]
        others = [override for override in parsed if not self._is_value(override)]
        if any(override.is_delete() or isinstance(override.value(), dict) for override in others):
            return hydra.compose(self.config_name, list(overrides), return_hydra_config=True)  # the order matters
        lines = tuple(str(override.input_line) for override in others)
        if lines not in self._bases:
            self._bases[lines] = hydra.compose(self.config_name, list(lines), return_hydra_config=True)
        cfg = copy.deepcopy(self._bases[lines])
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        task = [override for override in parsed if not override.is_hydra_override()]
        cfg.hydra.overrides.task = [override.input_line for override in task]
        names = cfg.hydra.job.config.override_dirname
        cfg.hydra.job.override_dirname = get_overrides_dirname(
            task, kv_sep=names.kv_sep, item_sep=names.item_sep, exclude_keys=names.exclude_keys
        )
        return cfg

    def _is_value(self, override: Override) -> bool:
        """Whether it sets a key of a run, and chooses no option."""
        key = override.key_or_group
        choice = override.package is not None or key in self.groups or "/" in key
        return not choice and not override.is_delete() and not override.is_hydra_override()

    def _check_values(self, cfg: DictConfig) -> None:
        launcher = cfg.hydra.runtime.choices["hydra/launcher"]
        if launcher != "basic" and not self.multirun:
            raise ConfigError(f"hydra/launcher={launcher} would be ignored, as it acts on sweeps only: add -m")
        if is_search(cfg) and not self.multirun:
            raise ConfigError(f"sweep={cfg.sweep.name} would be ignored, as it acts on sweeps only: add -m")
        _check_launcher(cfg, launcher)
        HydraConfig.instance().set_config(cfg)
        task = without_hydra(cfg)
        default_stage(task, cfg.hydra.runtime.choices)
        if OmegaConf.is_missing(task, "stage"):
            raise ConfigError(f"say what to do: stage=STAGE, one of {STAGES}; or experiment=NAME; see prefpipe --help")
        try:
            to_run_config(task)
        except OmegaConfBaseException as error:
            raise ConfigError(self._reason(error, None)) from error

    def _explain(self, error: Exception, overrides: list[str]) -> str:
        """Why a point does not compose: the override at fault if there is one, else what Hydra found."""
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            group, _, option = str(error.missing_cfg_file).rpartition("/")
            if option.startswith("submitit_"):
                return f"{group}={option} needs Hydra's launcher for it: pip install hydra-submitit-launcher"
            return suggest.unknown_option(group, option, error.options or [], self.groups)
        base = self._base(overrides)
        return self._culprit(overrides, base) or self._reason(error, base)

    def _reason(self, error: BaseException, base: DictConfig | None) -> str:
        """What OmegaConf found, with key, value and, for a config file, its name."""
        where = re.match(r"In '[^']+': ", str(error))
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OmegaConfBaseException):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            return suggest.one_line(error)
        prefix, key = where.group() if where else "", cause.full_key or ""
        reason = suggest.one_line(str(cause.msg or cause).partition("\n")[0])
        if isinstance(cause, MissingMandatoryValue):
            options = self.groups.get(key)
            return f"{key} must be given: {key}=" + (f"OPTION, one of {', '.join(options)}" if options else "VALUE")
        if base is not None and isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return prefix + self._unknown_key(key, base)
        return f"{prefix}{key}{'' if cause.value is None else f'={cause.value}'}: {reason}"

    def _culprit(self, overrides: list[str], base: DictConfig) -> str | None:
        """Why the first override that cannot work cannot: the chosen options have no such key, or it deletes one."""
        keys = {key for key, _ in _nodes(base)}
        for override in self.parse(overrides):
            key, line = override.key_or_group, str(override.input_line)
            choices = base.hydra.runtime.choices
            if override.package is not None and f"{key}@{override.package}" not in choices:
                if key in self.groups and override.is_add() and isinstance(override.value(), str):
                    continue  # +source@data_mixer.sources.NAME=NAME
                return self._unknown_key(override.get_key_element().lstrip("+~"), base)
            if key in self.groups and isinstance(override.value(), bool | int | float):
                return suggest.unknown_option(key, line.partition("=")[2], self.groups[key], self.groups)
            if key in self.groups or key in choices:
                continue
            if key not in keys:
                problem = self._unknown_override(override, base)
                if problem:
                    return problem
            elif override.is_delete() and key in suggest.declared_keys():
                return f"{line}: a key cannot be deleted; give it another value"
            elif override.is_add() and OmegaConf.select(base, key, throw_on_missing=False) is not None:
                return f"{line}: {key} is already there; write {line[1:]}"
        return None

    def _unknown_override(self, override: Override, base: DictConfig) -> str | None:
        key, parent_key = override.key_or_group, override.key_or_group.rpartition(".")[0]
        parent = OmegaConf.select(base, parent_key, throw_on_missing=False) if parent_key else None
        if parent is None and parent_key in _open_mappings(base):
            name, value = key.rpartition(".")[2], str(override.input_line).partition("=")[2]
            return f"no such config key: {key}; give the whole mapping: {parent_key}='{{{name}: {value}}}'"
        if not isinstance(parent, DictConfig) or any(map(dataclasses.is_dataclass, _types(parent))):
            return self._unknown_key(override.get_key_element().lstrip("+~"), base)
        if override.is_add() or override.is_force_add():
            return None
        return f"no such config key: {key}; names under {parent_key} are your own: write +{override.input_line}"

    def _unknown_key(self, key: str, base: DictConfig) -> str:
        chosen = {**base.hydra.runtime.choices, "task": list(base.task)}
        return suggest.unknown_key(key, leaf_keys(base, of_hydra=key.startswith("hydra.")), chosen, self.groups)

    def _base(self, overrides: Sequence[str]) -> DictConfig:
        """The config of the chosen options alone; without the experiment when that is what does not compose."""
        groups = {*self.groups, "hydra.searchpath"}
        chosen = [o for o in self.parse(overrides) if o.key_or_group in groups and isinstance(o.value(), str | list)]
        for skipped in ((), ("experiment", "debug"), tuple(self.groups)):
            lines = tuple(str(o.input_line) for o in chosen if o.key_or_group not in skipped)
            with suppress(*COMPOSITION_ERRORS):
                if lines not in self._bases:
                    self._bases[lines] = hydra.compose(self.config_name, list(lines), return_hydra_config=True)
                return self._bases[lines]
        raise ConfigError(f"{self.conf / self.config_name}.yaml does not compose by itself")


def _check_launcher(cfg: DictConfig, name: str) -> None:
    """Refuse what the launcher would ignore, or could not start."""
    if not str(cfg.hydra.launcher._target_).endswith(".SlurmLauncher"):
        for key, default in (("detach", False), ("max_array_size", None), ("save_seconds", None)):
            if cfg.launch[key] != default:
                raise ConfigError(
                    f"launch.{key}={str(cfg.launch[key]).lower()} would be ignored by hydra/launcher={name}, which "
                    f"gives Slurm nothing; use hydra/launcher=slurm_cpu or another of slurm_*, with -m"
                )
    elif (cfg.launch.save_seconds or 0) >= cfg.hydra.launcher.signal_delay_s:
        raise ConfigError(
            f"launch.save_seconds={cfg.launch.save_seconds} must be less than "
            f"hydra.launcher.signal_delay_s={cfg.hydra.launcher.signal_delay_s}, the time from Slurm's notice to the "
            f"end of the job"
        )
    elif cfg.hydra.launcher.nodes != cfg.hardware.num_nodes:
        raise ConfigError(
            f"hydra/launcher={name} asks Slurm for hydra.launcher.nodes={cfg.hydra.launcher.nodes}, and the run is for "
            f"hardware.num_nodes={cfg.hardware.num_nodes}; they must be equal"
        )


def default_stage(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """An experiment given alone runs its loop."""
    if OmegaConf.is_missing(cfg, "stage") and choices.get("experiment"):
        cfg.stage = Stage.loop


def is_search(cfg: DictConfig) -> bool:
    """Whether a command's points are not all known beforehand."""
    return bool(cfg.sweep.name != "grid")


def fixed_line(override: Override) -> str:
    """An override with one value, written as Hydra's own sweeper writes it."""
    if override.is_delete():
        return str(override.input_line)
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def names_point(key: str) -> bool:
    """Whether the key's value is part of a point's name; points that differ in another one share a folder."""
    return not _NOT_IN_POINT_NAME.match(f"{key.lstrip('+')}=") and key.lstrip("+") != "generator.shard"


def without_hydra(cfg: DictConfig) -> DictConfig:
    """What run() gets: a copy without the hydra node."""
    task = copy.deepcopy(cfg)
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task


def point_name(overrides: Sequence[str]) -> str:
    """A sweep point's folder: its overrides, sorted; with a hash where they are too long or had to be made safe.

    "" for a shard: all shards belong to one run, whose folder is that of the command which merges them.
    """
    if any(line.lstrip("+").startswith("generator.shard=") for line in overrides):
        return ""
    exact = ",".join(sorted(line for line in (o.lstrip("+") for o in overrides) if not _NOT_IN_POINT_NAME.match(line)))
    safe = re.sub(r"[^\w.,=+-]+", "", exact, flags=re.ASCII)
    if safe == exact and len(exact) <= 100:
        return exact
    return f"{safe[:100]}-{suggest.short_hash(exact)}"


# They say what is done with a point, or are part of its path already.
_NOT_IN_POINT_NAME = re.compile(
    r"(stage|exp_name|point|round|overwrite|plan|experiment|generator\.num_shards"
    r"|((paths|inputs|preview|browse|hydra|hardware|tracking|task|sweep|launch)([./][^=]*)?))="
)


def _open_mappings(cfg: DictConfig) -> set[str]:
    """Keys that are null and take a mapping of the user's own names."""
    return {key for key, node in _nodes(cfg) if isinstance(node, AnyNode) and not key.startswith(("inputs.", "hydra."))}


def _types(node: DictConfig) -> tuple[Any, Any]:
    """Of the node itself, and of what its keys are declared to hold."""
    return OmegaConf.get_type(node), node._metadata.element_type


def _refuse_targets(cfg: DictConfig) -> None:
    """Hydra builds what stands in its own node before any code of ours runs, so look first."""
    for key, node in _nodes(cfg):
        if key.rpartition(".")[2] == "_target_":
            stock = isinstance(node._value(), str) and node._value().startswith(STOCK_PLUGINS)
            if not stock or key not in ("hydra.launcher._target_", "hydra.sweeper._target_"):
                raise ConfigError(_refused(f"{key}={node._value()}"))


def _refused(what: object) -> str:
    return f"{what}: refused; a component is chosen by its name, e.g. loss=dpo, never by _target_"


def _check_points_differ(configs: Sequence[DictConfig]) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for cfg in configs:
        HydraConfig.instance().set_config(cfg)
        overrides = list(cfg.hydra.overrides.task)
        stage = None if OmegaConf.is_missing(cfg, "stage") else cfg.stage
        place = (cfg.paths.runs, cfg.exp_name, point_name(overrides), cfg.round, stage, cfg.generator.shard)
        if place in seen:
            raise ConfigError(
                f"two points of the sweep would write to the same folder: [{seen[place]}] and [{' '.join(overrides)}]; "
                f"give each its own exp_name"
            )
        seen[place] = " ".join(overrides)


def _nodes(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, node) of everything below a node."""
    for index in range(len(node)) if isinstance(node, ListConfig) else list(node):
        child: Any = node._get_node(index)
        yield f"{prefix}{index}", child
        special = child._is_none() or child._is_missing() or child._is_interpolation()
        if isinstance(child, DictConfig | ListConfig) and not special:
            yield from _nodes(child, f"{prefix}{index}.")


def leaf_keys(cfg: DictConfig, *, of_hydra: bool = False) -> list[str]:
    """What can be set on the command line; a list is one key, and so is a dict that is still empty."""
    nodes = {key: node for key, node in _nodes(cfg) if not re.search(r"\.\d+(\.|$)", key)}
    inner = {key.rpartition(".")[0] for key in nodes}
    return [key for key in nodes if key not in inner and (key.startswith("hydra.") is of_hydra)]
