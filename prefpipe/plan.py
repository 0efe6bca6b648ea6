"""plan=true: what a command would do, printed before it does anything, in a second and without torch.

Each stage runs up to the artifact that it would write (artifacts.planning), so the settings and parents compared with
what is there are exactly those that it would record.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from prefpipe import artifacts, models, rounds
from prefpipe.artifacts import NotKnownError, PlanFound
from prefpipe.check import default_stage, point_name, without_hydra
from prefpipe.config import to_run_config
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.logs import say
from prefpipe.memory import Disk, Memory, Setting, disk, estimate, longest_allowed, read_shape, resolved, size
from prefpipe.rounds import BASE
from prefpipe.run import READERS, Command
from prefpipe.settings import Stage
from prefpipe.stages.loop import steps
from prefpipe.torchrun import visible_gpus

HIT, MISS, REFUSED, UNKNOWN, READS = "hit", "miss", "refused", "unknown", "reads"


@dataclass(frozen=True)
class Step:
    """One stage of a command. state: HIT, MISS, REFUSED, UNKNOWN or READS. out: the artifact, or None."""

    stage: str
    state: str
    out: Path | None
    why: str


@dataclass(frozen=True)
class Demand:
    """What training would take. num_pairs: None where there are none yet. reason: why there is no estimate."""

    setting: Setting | None = None
    memory: Memory | None = None
    disk: Disk | None = None
    num_pairs: int | None = None
    reason: str = ""


def show(configs: Sequence[DictConfig], *, multirun: bool) -> None:
    """Print the plan of a command, or of a sweep.

    Args:
        configs: of each point, as check.Checker composed them.
    Raises:
        ConfigError: a stage would refuse its settings; nothing is printed then.
    """
    commands = []
    for composed in configs:
        HydraConfig.instance().set_config(composed)
        cfg = without_hydra(composed)
        default_stage(cfg, composed.hydra.runtime.choices)
        if multirun:
            cfg.point = point_name(composed.hydra.overrides.task)
        commands.append(Command(to_run_config(cfg), cfg))
    launcher = configs[0].hydra.launcher
    on_slurm = launcher._target_.endswith(".SlurmLauncher")
    say(plan_of(commands, slurm=launcher if on_slurm else None))
    if on_slurm:
        from prefpipe.launch import slurm_queue
        from prefpipe.launch.slurm import describe
        from prefpipe.launch.sweep import is_done

        jobs = slurm_queue.jobs()
        num_jobs = sum(not is_done(command, jobs, launcher) for command in commands)
        say(describe(launcher, num_jobs, commands[0].run.launch))


def plan_of(commands: Sequence[Command], *, slurm: Mapping[str, Any] | None = None) -> str:
    """The plan of one or several commands, as lines.

    slurm: settings of the launcher, where Slurm will run them; else this machine does.
    Raises ConfigError, in place of a plan, where a stage would refuse its settings.
    """
    planned = [_on_slurm(command, slurm) for command in commands]
    lines: list[str] = []
    states = Counter[str]()
    demands = []
    for command in planned:
        found = list(steps_of(command))
        states.update(step.state for step in found)
        lines.append(f"run folder: {command.layout.root}")
        lines += [f"  {step.stage:<9} {step.state:<7} {_told(step)}" for step in found]
        if any(step.stage == "train" for step in found):
            demands.append(demand_of(command, slurm))
    if len(commands) > 1:
        counted = ", ".join(f"{count} {state}" for state, count in states.most_common())
        lines.append(f"{len(commands)} points: {counted}")
    return "\n".join([*lines, *_demand_lines(demands)])


def finds_all(command: Command, *, slurm: Mapping[str, Any] | None = None) -> bool:
    """Whether each stage of a command would find its artifact there, and so do nothing. slurm: as in plan_of."""
    try:
        return not command.run.overwrite and all(step.state == HIT for step in steps_of(_on_slurm(command, slurm)))
    except ConfigError:  # the stage itself says it best
        return False


def _on_slurm(command: Command, slurm: Mapping[str, Any] | None) -> Command:
    """The command as a node of the cluster will see it, where this machine is not one."""
    if slurm is None:
        return command
    hardware = command.run.hardware
    found = replace(
        hardware,
        gpus_per_node=hardware.gpus_per_node or slurm.get("gpus_per_node"),
        node_rank=hardware.node_rank or 0,
    )
    return Command(replace(command.run, hardware=found), command.cfg)


# ------------------------------------------------------------------------------------------------ stages


def steps_of(command: Command) -> Iterator[Step]:
    """Each stage of a command, in order. Raises ConfigError where one would."""
    run = command.run
    parts = [(run.stage.value, run.round, [])] if run.stage is not Stage.loop else list(steps(run.recipe))
    made_before: list[str] = []
    for stage, round_, overrides in parts:
        inputs = replace(run.inputs, checkpoint=BASE) if overrides else run.inputs
        part = Command(replace(run, stage=Stage(stage), round=round_, inputs=inputs), command.cfg)
        step = step_of(part, made_before)
        yield step
        if step.state != HIT and stage not in ("evaluate", *READERS):
            made_before.append(stage)


def step_of(command: Command, made_before: Sequence[str] = ()) -> Step:
    """What one stage would do. made_before: earlier stages of the command that will make their artifacts anew."""
    stage = command.run.stage.value
    if stage in READERS:
        return Step(stage, READS, None, "what is there")
    try:
        with artifacts.planning():
            command.dispatch()
    except PlanFound as found:
        try:
            return _compared(stage, found, made_before)
        except ArtifactError as error:
            return _without_input(stage, found.out, made_before, error)
    except ArtifactError as error:
        return _without_input(stage, None, made_before, error)
    except NotKnownError as error:
        return Step(stage, UNKNOWN, None, str(error))
    raise AssertionError(f"stage={stage} wrote no artifact")


def _without_input(stage: str, out: Path | None, made_before: Sequence[str], error: ArtifactError) -> Step:
    if made_before:
        return Step(stage, MISS, out, f"after stage={made_before[-1]}")
    return Step(stage, REFUSED, out, str(error))


def _compared(stage: str, found: PlanFound, made_before: Sequence[str]) -> Step:
    outlook = artifacts.outlook(found.out, found.plan)
    changes = "; ".join(outlook.changes)
    if outlook.state == "there" and made_before:
        return Step(stage, UNKNOWN, found.out, f"a hit if stage={made_before[-1]} leaves what was there before")
    if outlook.state == "there":
        return Step(stage, HIT, found.out, "up to date")
    if outlook.state == "other" and not found.overwrite:
        why = f"made with other settings: {changes}; set overwrite=true to replace it, or another exp_name"
        return Step(stage, REFUSED, found.out, why)
    whys = {
        "other": f"overwrite=true; it was made with other settings: {changes}",
        "unfinished": _goes_on(found.out, outlook.parts),
        "leftovers": f"leftovers of other settings go: {changes}" if changes else "leftovers go",
        "none": "nothing there yet",
    }
    return Step(stage, MISS, found.out, whys[outlook.state])


def _goes_on(out: Path, parts: int) -> str:
    states = sorted((artifacts.partial_path(out) / "state").glob("step-??????"))
    if states:
        return f"goes on after step {int(states[-1].name.removeprefix('step-'))}"
    return f"goes on after {parts} finished part{'s' if parts != 1 else ''}"


def _told(step: Step) -> str:
    return f"{step.out} ({step.why})" if step.out else step.why


# ------------------------------------------------------------------------------------------------ memory and disk


def demand_of(command: Command, slurm: Mapping[str, Any] | None = None) -> Demand:
    """What training of this command takes, for pairs as long as they may be."""
    run = command.run
    gpus = (slurm.get("gpus_per_node") or 0) if slurm is not None else visible_gpus()
    try:
        folder = _policy(command)
        if folder is None:
            reason = f"config.json of model.path={run.model.path} is not on this machine yet"
            return Demand(reason=reason)
        setting = Setting(
            read_shape(folder),
            resolved(run.hardware, num_gpus=gpus),
            run.training,
            run.loss,
            run.model,
            longest_allowed(run.training, pairwise=run.loss.pairwise),
            reference_is_policy=run.inputs.reference is None,
            reference_given=run.inputs.reference_logps is not None,
        )
    except ConfigError as error:
        return Demand(reason=str(error))
    num_pairs = _num_pairs(command)
    return Demand(setting, estimate(setting), disk(setting, num_pairs=num_pairs or 0), num_pairs)


def _policy(command: Command) -> Path | None:
    """Whose config.json gives the shape: a checkpoint's is that of the model it started from."""
    run = command.run
    return rounds.explicit_checkpoint(run.inputs) or models.folder_here(run.model, cache=Path(run.paths.cache))


def _num_pairs(command: Command) -> int | None:
    """Records of the pairs that are there already."""
    name = "pairs" if command.run.loss.pairwise else "demonstrations"
    try:
        found = command.layout.input(name, getattr(command.run.inputs, name))
        return sum(int(artifacts.manifest(path).get("num_records", 0)) for path in found)
    except (ArtifactError, ConfigError):
        return None


def _demand_lines(demands: Sequence[Demand]) -> list[str]:
    """The demand of the point that takes most; where points differ, also that of the one that takes least."""
    known = [(found.memory, found) for found in demands if found.memory is not None]
    unknown = [f"memory of training: not known, as {found.reason}" for found in demands if found.memory is None]
    lines = list(dict.fromkeys(unknown))
    if not known:
        return lines
    memory, found = max(known, key=lambda pair: pair[0].total)
    least = min(pair[0].total for pair in known)
    setting = found.setting
    assert setting is not None
    assert found.disk is not None
    where = "GPU" if setting.hardware.device == "cuda" else "process"
    span = f", from {size(least)} in the lightest point" if least < memory.total else ""
    pair = setting.lengths[0]
    lines.append(
        f"memory of each {where} in training ({setting.world_size} in all, {setting.hardware.precision}), with "
        f"{len(setting.lengths)} pairs at a time, as long as allowed, {pair.prompt} + {pair.chosen} tokens{span}:"
    )
    notes = {"reference": _reference_note(setting)}
    lines += [f"  {name:<11} {size(value):>9} {notes.get(name, '')}".rstrip() for name, value in memory.parts().items()]
    lines.append(f"  {'at once':<11} {size(memory.total):>9}  at most; less than the sum where parts take turns")
    if memory.host:
        lines.append(f"  {'offloaded':<11} {size(memory.host):>9}  in the memory of each node")
    counted = f"{found.num_pairs} pairs" if found.num_pairs is not None else "pairs that are not there yet"
    lines.append(
        f"disk: states {size(found.disk.states)}, checkpoint {size(found.disk.checkpoint)}, reference cache "
        f"{'at most ' + size(found.disk.reference_cache) if found.num_pairs is not None else 'not known'} ({counted})"
    )
    return lines


def _reference_note(setting: Setting) -> str:
    if not setting.loss.needs_reference:
        return f" loss={setting.loss.name} reads none"
    if setting.reference_given:
        return " read from a file"
    if not setting.reference_online:
        return " cached"
    return " the policy with its adapter off" if setting.adapted and setting.reference_is_policy else " a second model"
