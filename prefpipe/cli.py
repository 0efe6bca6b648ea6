"""The command `prefpipe`: flags in any order, a check of every point before the first one runs, errors that a user can
act on as one line. What a run does is in run.py.
"""

import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import prefpipe
from prefpipe import suggest
from prefpipe.check import STAGES, Checker, default_stage, is_search, point_name, without_hydra
from prefpipe.config import CONF_DIR, register_schemas
from prefpipe.errors import ConfigError, PrefpipeError
from prefpipe.logs import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, say, set_up_logging
from prefpipe.recorder import prepare_sweep
from prefpipe.settings import Stage

HELP = f"""\
Preference optimization, from prompts to an evaluated checkpoint.

usage: prefpipe stage=STAGE [group=option ...] [key=value ...] [flags]
       prefpipe experiment=NAME                        an experiment given alone runs its loop
       prefpipe -m stage=train loss=dpo,simpo,ipo      a sweep: one run for each
       prefpipe status DIR ...                         what has become of a run and of its sweep's points
       prefpipe retry DIR [--only=KIND,...]            start its failed points again; of these classes of failure

stages: {STAGES}

flags, anywhere on the line:
  -m, --multirun          sweep over values given as key=a,b; with sweep=optuna, search among them
  -c, --cfg job           print the composed config and stop (all: with Hydra's own)
  -p, --package KEY       print only this part of it
  --resolve               print it with interpolations filled in
  -cd, --config-dir DIR   a folder like conf/, with groups and experiments of your own
  -sc install=bash        tab completion, for bash, zsh or fish: eval "$(prefpipe -sc install=bash)"
  --version, --help       and Hydra's --hydra-help, --info, --run, -cn, -cp

groups and their options, * is chosen when you choose none:
{{groups}}

keys: `prefpipe --cfg job` prints them all; plan=true says what would run, and why.
The same command again resumes what was interrupted and skips what is done."""

OTHER_GROUPS = {
    "source": "one data set: +source@data_mixer.sources.NAME=NAME adds it to the mixer",
    "hydra/launcher": "where the runs of a sweep go, with -m; stock: basic*, submitit_local, submitit_slurm",
}

SHORT = {"-m": "--multirun", "-r": "--run", "-h": "--help", "-c": "--cfg", "-p": "--package", "-i": "--info"}
SHORT |= {"-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir", "-sc": "--shell-completion"}
FOLDERS = {"--config-path", "--config-dir"}
WITHOUT_VALUE = {"--multirun", "--run", "--help", "--hydra-help", "--resolve", "--version", "--shell-completion"}
WITH_VALUE = {"--cfg", "--package", "--config-path", "--config-name", "--config-dir", "--info"}
CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}

_failures: list[PrefpipeError] = []
_driver_pid: int | None = None


@dataclass
class CommandLine:
    """What was typed: flags by their long name ("" where they take no value), and the overrides in their order."""

    flags: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    @property
    def conf(self) -> Path:
        """The folder of the primary config."""
        return Path(self.flags.get("--config-path", CONF_DIR)).absolute()

    def checker(self) -> Checker:
        """Knows the groups and options of this command."""
        return Checker(
            self.conf,
            [self.conf, *(Path(self.flags[flag]) for flag in ("--config-dir",) if flag in self.flags)],
            self.flags.get("--config-name", "config"),
            multirun="--multirun" in self.flags or "hydra.mode=MULTIRUN" in self.overrides,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Exit codes: 2 for a config that cannot work, 1 for another error of ours, 130 for Ctrl-C."""
    _failures.clear()
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words[:1] in (["status"], ["retry"]):
            _look_after(words)
        else:
            _command(parse(words))
    except BaseException as error:
        if _was_interrupted(error):
            print("prefpipe: interrupted; the same command again resumes", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        if not isinstance(error, PrefpipeError | HydraException | OmegaConfBaseException):
            raise
        _print(error)
        sys.exit(_exit_code(error))
    if _failures:
        sys.exit(_exit_code(_failures[0]))


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what it began with: in Hydra 1.3.8 an error of a `finally` can take its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def entry(cfg: DictConfig) -> None:
    """One run, or one point of a sweep. Hydra calls it; a launcher may do so in another process, by this name."""
    info = HydraConfig.get()
    point = point_name(info.overrides.task) if info.mode == RunMode.MULTIRUN else ""
    default_stage(cfg, info.runtime.choices)
    set_up_logging()
    try:
        with _environment("HYDRA_FULL_ERROR", None):
            from prefpipe.run import run

            run(cfg, point=point)
    except PrefpipeError as error:
        if os.getpid() != _driver_pid:
            raise
        # Not raised: Hydra would add lines of its own, and of a sweep tell the first failure only.
        _failures.append(error)
        _print(error, point)


def parse(argv: Sequence[str]) -> CommandLine:
    """Take flags and overrides apart, in whatever order they come."""
    command, words = CommandLine(), list(argv)
    while words:
        word = words.pop(0)
        typed, has_value, value = word.partition("=")
        flag = SHORT.get(typed, typed)
        if not word.startswith("-"):
            if not has_value and not word.startswith("~"):
                hint = f"did you mean stage={word}?" if word in Stage.__members__ else "write it as key=value"
                raise ConfigError(f"{word!r} is neither a flag nor an override; {hint}")
            command.overrides.append(word)
            continue
        if flag not in WITHOUT_VALUE | WITH_VALUE:
            guesses = suggest.nearest(typed, {*SHORT, *WITHOUT_VALUE, *WITH_VALUE})
            raise ConfigError(f"no such flag: {typed}" + (f"; nearest: {', '.join(guesses)}" if guesses else ""))
        if flag in WITHOUT_VALUE and has_value:
            raise ConfigError(f"{word}: {typed} takes no value; write {typed}")
        if flag in WITH_VALUE and not has_value:
            optional = flag == "--info" and (not words or words[0] not in CHOICES[flag])
            value = "all" if optional else words.pop(0) if words else ""
        if flag in WITH_VALUE and (not value or value not in CHOICES.get(flag, [value])):
            raise ConfigError(f"{flag} needs a value" + (f": {', '.join(CHOICES[flag])}" if flag in CHOICES else ""))
        command.flags[flag] = value
    _translate_config_dir(command)
    return command


def help_text(command: CommandLine) -> str:
    """HELP with the groups; what a group is for stands beside its default in conf/config.yaml."""
    text = (CONF_DIR / "config.yaml").read_text()
    defaults = {
        name: (option, why) for name, option, why in re.findall(r"^  - (\w+): \[?([\w]+)\]? # (.+)$", text, re.M)
    }
    lines = []
    for group, options in command.checker().groups.items():
        default, why = defaults.get(group, ("", OTHER_GROUPS.get(group, "")))
        marked = " ".join(option + "*" * (option == default) for option in options)
        indent = " " * 18
        lines += [
            f"  {group:<15} {why}".rstrip(),
            textwrap.fill(marked, 100, initial_indent=indent, subsequent_indent=indent),
        ]
    return HELP.format(groups="\n".join(lines))


def _look_after(words: Sequence[str]) -> None:
    from prefpipe.launch import sweep

    {"status": sweep.status_command, "retry": sweep.retry_command}[words[0]](words[1:])


def _command(command: CommandLine) -> None:
    if "--version" in command.flags:
        print(f"prefpipe {prefpipe.__version__}")
    elif "--help" in command.flags:
        say(help_text(command))
    elif "--cfg" in command.flags:
        checker = command.checker()
        for cfg in checker.compose(command.overrides):
            if checker.multirun:
                say(f"# {' '.join(cfg.hydra.overrides.task)}")
            _show(cfg, command.flags)
    else:
        checker, configs = command.checker(), []
        if not command.flags.keys() & {"--hydra-help", "--info", "--shell-completion"}:
            configs = checker.check(command.overrides)
        if configs and is_search(configs[0]):
            if not configs[0].plan:
                prepare_sweep(configs)
            _search(checker, command.overrides)
        elif configs and configs[0].plan:
            from prefpipe import plan

            plan.show(configs, multirun=checker.multirun)
        else:
            if checker.multirun and configs:
                from prefpipe.launch import sweep

                sweep.prepare(configs)
                prepare_sweep(configs)
            _run(command)


def _show(cfg: DictConfig, flags: dict[str, str]) -> None:
    HydraConfig.instance().set_config(cfg)
    if flags["--cfg"] == "job":
        cfg = without_hydra(cfg)
    elif flags["--cfg"] == "hydra":
        cfg = OmegaConf.masked_copy(cfg, "hydra")
    part = OmegaConf.select(cfg, flags["--package"]) if "--package" in flags else cfg
    if "--package" in flags and part is None:
        raise ConfigError(f"--package {flags['--package']}: there is no such part, or it is null")
    say(OmegaConf.to_yaml(part, resolve="--resolve" in flags).rstrip() if OmegaConf.is_config(part) else str(part))


def _run(command: CommandLine) -> None:
    """Hand over to Hydra. It reads sys.argv, and exits instead of raising unless HYDRA_FULL_ERROR is set."""
    global _driver_pid
    _driver_pid = os.getpid()
    register_schemas()
    # Flags first: Hydra 1.3 stumbles over one between overrides (hydra#3133).
    flags = [f"{name}={value}" if value else name for name, value in command.flags.items() if name not in FOLDERS]
    typed, sys.argv = sys.argv, [sys.argv[0], *flags, *command.overrides]
    try:
        with _environment("HYDRA_FULL_ERROR", "1"):
            hydra.main(version_base="1.3", config_path=str(command.conf), config_name="config")(entry)()
    finally:
        sys.argv = typed


def _search(checker: Checker, overrides: Sequence[str]) -> None:
    """Its failed trials are results, told as they came; only a search that gives up has failed."""
    global _driver_pid
    from prefpipe.search import search

    _driver_pid = os.getpid()
    set_up_logging()
    search(checker, overrides, entry)
    _failures.clear()


def _translate_config_dir(command: CommandLine) -> None:
    """--config-dir as the override that it stands for, so that the check and Hydra compose alike."""
    if "--config-dir" not in command.flags:
        return
    folder = Path(command.flags["--config-dir"]).absolute()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {folder}: no such folder")
    if any(override.lstrip("+").startswith("hydra.searchpath") for override in command.overrides):
        raise ConfigError("give --config-dir or hydra.searchpath, not both")
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    command.overrides.append(f'hydra.searchpath=["file://{quoted}"]')


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _print(error: Exception, point: str = "") -> None:
    text = suggest.one_line(str(error) or error.__cause__)
    print(f"prefpipe: error: {f'[{point}] ' if point else ''}{text}", file=sys.stderr)


def _exit_code(error: Exception) -> int:
    ours = isinstance(error, PrefpipeError) and not isinstance(error, ConfigError)
    return EXIT_FAILED if ours else EXIT_CONFIG
