"""Promises of the command line: typos cannot pass, order does not matter, errors are one line, help is fast."""

import contextlib
import itertools
import os
import pickle
import random
import re
import resource
import signal
import string
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from command_line import HEAVY, Prefpipe, Result, refused
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf, open_dict, read_write

from prefpipe import artifacts, cli, suggest
from prefpipe.check import Checker, leaf_keys, point_name
from prefpipe.cli import parse
from prefpipe.components import COMPONENTS
from prefpipe.config import CONF_DIR
from prefpipe.errors import ConfigError

LOSSES = sorted(COMPONENTS["loss"])


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            "loss.gamma=1",
            "no such config key: loss.gamma; gamma belongs to loss=simpo; you chose loss=dpo",
        ),
        (
            "loss.gama=1",
            "no such config key: loss.gama; nearest: loss.gamma, loss.name; "
            "gamma belongs to loss=simpo; you chose loss=dpo",
        ),
        (
            "+loss.gama=1",
            "no such config key: loss.gama; nearest: loss.gamma, loss.name; "
            "gamma belongs to loss=simpo; you chose loss=dpo",
        ),
        ("++los.beta=1", "no such config key: los.beta; nearest: loss.beta"),
        ("loss=simp", "no such option: loss=simp; nearest: loss=simpo; loss has " + ", ".join(LOSSES)),
        ("loss=1", "no such option: loss=1; loss has " + ", ".join(LOSSES)),
        ("loss@beta=1", "no such config key: loss@beta; nearest: loss.beta"),
        ("los=simpo", "no such config key: los; nearest: loss (a group: " + " ".join(LOSSES) + ")"),
        ("gamma=1 loss=simpo", "no such config key: gamma; nearest: loss.gamma"),
        ("loss.max_steps=1", "no such config key: loss.max_steps; nearest: training.max_steps"),
        (
            "task.pass_at_k.max_prompts=1",
            "no such config key: task.pass_at_k.max_prompts; "
            "max_prompts belongs to task=pass_at_k; you chose task=[accuracy]",
        ),
        ("+loss.beta=1", "+loss.beta=1: loss.beta is already there; write loss.beta=1"),
        ("~seed", "~seed: a key cannot be deleted; give it another value"),
        (
            "training.max_steps=abc",
            "training.max_steps=abc: Value 'abc' of type 'str' could not be converted to Integer",
        ),
        ("overwrite=yess", "overwrite=yess: Value 'yess' is not a valid bool (type str)"),
        ("seed=null", "seed: field 'seed' is not Optional"),
        ("loss.beta=-1", "loss.beta=-1.0 must be above 0"),
        ("model.path=???", "model.path must be given: model.path=VALUE"),
        ("~loss", "loss must be given: loss=OPTION, one of " + ", ".join(LOSSES)),
        (
            "loss=dpo,simpo",
            "loss=dpo,simpo gives several values: add -m to sweep over them; a list is written loss=[a,b]",
        ),
        ("hydra/launcher=slurm_1x8", "hydra/launcher=slurm_1x8 would be ignored, as it acts on sweeps only: add -m"),
        ("seed=${sed}", "seed: Interpolation key 'sed' not found"),
        ("inputs.pairs=a=b", "quote a value with = or , in it: 'key=\"a=b\"'"),
        (
            "data_mixer.columns.prompt=q",
            "no such config key: data_mixer.columns.prompt; give the whole mapping: data_mixer.columns='{prompt: q}'",
        ),
        ("evaluate", "'evaluate' is neither a flag nor an override; did you mean stage=evaluate?"),
        ("--mutlirun", "no such flag: --mutlirun; nearest: --multirun"),
        ("--cfg jobs", "--cfg needs a value: job, hydra, all"),
        ("--multirun=false", "--multirun=false: --multirun takes no value; write --multirun"),
        ("-cd nowhere", "no such folder"),
        ("-m loss=dpo,simp", "no such option: loss=simp; nearest: loss=simpo"),
        ("-m seed=1,1", "two points of the sweep would write to the same folder: [stage=train seed=1] and"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(prefpipe: Prefpipe, args: str, line: str) -> None:
    assert line in refused(prefpipe("stage=train", *args.split(" ")))


def test_a_command_without_a_stage_is_told_the_stages(prefpipe: Prefpipe) -> None:
    line = refused(prefpipe("loss=simpo"))
    assert "prepare, generate, score, pair, train, evaluate, analyze, report, preview, browse, " in line
    assert "sync, merge, loop" in line
    assert "expected one of [prepare, generate" in refused(prefpipe("stage=trian"))


def test_keys_of_the_chosen_option_work_as_typed(prefpipe: Prefpipe) -> None:
    assert prefpipe("loss=simpo", "loss.gamma=1.0", "--cfg", "job", "-p", "loss.gamma").out == "1.0\n"
    assert prefpipe("exp_name=my_target_x", "--cfg", "job", "-p", "exp_name").out == "my_target_x\n"
    columns = prefpipe("+data_mixer.columns.prompt=question", "--cfg", "job", "-p", "data_mixer.columns")
    assert columns.out == "prompt: question\n"


SAME = [
    ["stage=train"],
    ["loss.gamma=0.5", "stage=train", "loss=simpo", "seed=3"],
    ["stage=train", "++seed=4", "task=[accuracy,pass_at_k]", "task.pass_at_k.max_prompts=3"],
    ["hydra.job.name=x", "seed=2", "hydra/launcher=submitit_local", "paths.runs=x"],
    ["stage=prepare", "data_mixer.sources.g.split=test", "+source@data_mixer.sources.g=gsm8k"],
    ["loss.beta=0.9", "loss={beta:0.7}", "stage=train"],
    ["stage=train", "inputs.pairs=[a,b]", "+inputs.prompts=null"],
]


@pytest.mark.parametrize("overrides", SAME, ids=" ".join)
def test_a_point_is_composed_as_hydra_composes_it(overrides: list[str]) -> None:
    """Also when other points shared its files, and after one that was refused."""
    checker = Checker(CONF_DIR, [CONF_DIR], "config", multirun=False)
    with pytest.raises(ConfigError):
        checker.compose([*overrides, "seed=none"])
    first, again = (checker.compose(overrides)[0] for _ in range(2))
    with checker.opened():
        expected = hydra.compose("config", overrides, return_hydra_config=True)
    with read_write(expected), open_dict(expected.hydra.job):
        expected.hydra.job.num, expected.hydra.job.id = 0, "0"
    assert OmegaConf.to_yaml(first) == OmegaConf.to_yaml(again) == OmegaConf.to_yaml(expected)
    assert [OmegaConf.get_type(cfg.loss) for cfg in (first, again)] == [OmegaConf.get_type(expected.loss)] * 2


def slips(key: str, rng: random.Random) -> str:
    """The key with one character inserted, deleted, substituted, or swapped with its neighbour."""
    at = rng.randrange(len(key))
    letter = rng.choice(string.ascii_lowercase + string.digits + "_.-@")
    return rng.choice(
        [
            key[:at] + letter + key[at:],
            key[:at] + key[at + 1 :],
            key[:at] + letter + key[at + 1 :],
            key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
        ]
    )


def test_of_300_random_typos_none_composes_and_the_right_key_is_suggested() -> None:
    number = 300
    checker = Checker(CONF_DIR, [CONF_DIR], "config", multirun=False)
    keys = leaf_keys(checker.compose(["stage=train"])[0])
    rng, found, tried = random.Random(20261121), 0, 0
    while tried < number:
        key = rng.choice(keys)
        typo = slips(key, rng)
        if typo in keys or typo == "" or typo[0] in "-@":
            continue  # another key, or another kind of argument
        tried += 1
        override = f"{rng.choice(['', '+', '++'])}{typo}=1"
        with pytest.raises(ConfigError, match="no such config key") as error:
            checker.check(["stage=train", override])
        message = str(error.value)
        suggested = message.partition("nearest: ")[2].partition(";")[0].split(", ")
        assert len(suggested) <= 3
        assert "\n" not in message
        found += key in suggested
    assert found >= 0.95 * number


def test_keys_of_every_option_are_suggested() -> None:
    declared = suggest.declared_keys()
    assert {"seed", "loss.gamma", "training.max_steps", "inputs.pairs", "task.pass_at_k.max_prompts"} <= set(declared)
    assert declared["loss.gamma"] == ["loss=simpo"]
    assert declared["training.max_steps"] == []


def test_a_key_in_a_file_of_the_user_is_refused_with_the_files_name(prefpipe: Prefpipe, tmp_path: Path) -> None:
    experiment = tmp_path / "mine" / "experiment" / "wide_margin.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\ndefaults:\n  - override /loss: simpo\nloss:\n  gamma: 2.0\n")
    args = ["-cd", "mine", "experiment=wide_margin"]
    assert prefpipe(*args, "--cfg", "job", "-p", "loss.gamma").out == "2.0\n"
    assert refused(prefpipe(*args, "loss=dpo")) == (
        "In 'experiment/wide_margin': no such config key: loss.gamma; gamma belongs to loss=simpo; you chose loss=dpo"
    )
    line = refused(prefpipe(*args, "loss.label_smothing=0"))
    assert line.endswith(
        "nearest: loss.label_smoothing; label_smoothing belongs to "
        "loss=aot, loss=aot_unpaired, loss=dpo, loss=robust or loss=exo; you chose loss=simpo"
    )
    assert "nearest: experiment=wide_margin;" in refused(prefpipe("-cd", "mine", "experiment=wide_margins"))


def test_an_experiment_given_alone_runs_its_loop(prefpipe: Prefpipe, tmp_path: Path) -> None:
    experiment = tmp_path / "mine" / "experiment" / "short.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\nexp_name: short\nrecipe:\n  rounds: 1\n")
    alone, said = (prefpipe("-cd", "mine", "experiment=short", "plan=true", *more) for more in ([], ["stage=loop"]))
    assert alone.code == 0
    assert alone.out == said.out != ""


# Flags and their order


def test_flags_may_stand_anywhere() -> None:
    words = [["-m"], ["-cn", "config"], ["loss=dpo,simpo,ipo"], ["stage=train"], ["seed=1"]]
    for order in itertools.permutations(words):
        command = parse([word for group in order for word in group])
        assert command.flags == {"--multirun": "", "--config-name": "config"}
        assert sorted(command.overrides) == ["loss=dpo,simpo,ipo", "seed=1", "stage=train"]


@pytest.mark.parametrize(
    "args",
    [
        "-m loss=dpo,simpo,ipo stage=train",
        "loss=dpo,simpo,ipo -m stage=train",
        "stage=train loss=dpo,simpo,ipo --multirun",
    ],
)
def test_a_sweep_runs_one_point_for_each_value(prefpipe: Prefpipe, args: str) -> None:
    result = prefpipe(*args.split(), "plan=true")
    assert result.code == 0, result
    assert re.findall(r"points/(loss=\w+)$", result.out, re.M) == ["loss=dpo", "loss=simpo", "loss=ipo"]


@pytest.mark.parametrize(
    "args", ["--cfg job loss=ipo", "loss=ipo --cfg job", "loss=ipo -c job seed=1", "--cfg=job loss=ipo"]
)
def test_cfg_may_stand_anywhere(prefpipe: Prefpipe, args: str) -> None:
    assert prefpipe(*args.split(), "-p", "loss.name").out == "ipo\n"


def test_cfg_of_a_sweep_prints_every_point(prefpipe: Prefpipe) -> None:
    assert prefpipe("loss=dpo,ipo", "-c", "job", "-m", "-p", "loss.name").out == "# loss=dpo\ndpo\n# loss=ipo\nipo\n"


def test_cfg_fills_in_interpolations_when_asked(prefpipe: Prefpipe, tmp_path: Path) -> None:
    assert "oc.env" in prefpipe("--cfg", "job", "-p", "paths").out
    assert f"runs: {tmp_path}/runs\n" in prefpipe("--cfg", "job", "-p", "paths", "--resolve").out
    assert "launcher:" in prefpipe("--cfg", "hydra").out


def test_every_flag_is_one_of_hydras() -> None:
    options = {option for action in get_args_parser()._actions for option in action.option_strings}
    ours = {*cli.SHORT, *cli.WITHOUT_VALUE, *cli.WITH_VALUE}
    assert options - ours == {"--experimental-rerun"}  # it unpickles a file
    assert ours <= options


def test_info_takes_its_value_or_none() -> None:
    assert parse(["--info", "stage=train"]).flags == {"--info": "all"}
    assert parse(["stage=train", "-i", "defaults", "seed=1"]).flags == {"--info": "defaults"}


# Sweeps


def test_a_points_name_says_what_distinguishes_it() -> None:
    assert point_name(["stage=train", "seed=1", "loss=dpo", "exp_name=a", "round=0", "plan=true"]) == "loss=dpo,seed=1"
    assert point_name(["experiment=demo", "paths.runs=/data", "inputs.pairs=[a,b]", "overwrite=true", "paths=x"]) == ""
    assert point_name(["++loss.gamma=1e-1", "stage_fright=1"]) == "loss.gamma=1e-1,stage_fright=1"


def test_a_points_name_is_a_folder_name_and_unique() -> None:
    hostile = [
        ["model.path=../../x"],
        ["model.path=/x"],
        ["recipe.stages=[train,evaluate]"],
        ["model.path='a b'"],
        ["seed=ß"],
    ]
    long = [[f"model.path={'x' * 150}{n}"] for n in range(2)]
    names = [point_name(overrides) for overrides in hostile + long]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.,=+-]{1,110}-[0-9a-f]{8}", name, re.ASCII) for name in names)


def test_every_point_is_checked_before_the_first_one_runs(prefpipe: Prefpipe, tmp_path: Path) -> None:
    line = refused(prefpipe("-m", "stage=prepare", "loss=simpo,dpo", "++loss.gamma=1"))
    assert line.endswith("gamma belongs to loss=simpo; you chose loss=dpo")
    assert refused(prefpipe("-m", "stage=prepare", "loss.beta=1,-1")) == "loss.beta=-1.0 must be above 0"
    assert list(tmp_path.iterdir()) == []


def test_each_failing_point_of_a_sweep_is_one_line(prefpipe: Prefpipe) -> None:
    result = prefpipe("-m", "stage=pair", "seed=1,2")
    assert result.code == 1
    errors = [line for line in result.err.splitlines() if line.startswith("prefpipe: error: ")]
    assert len(errors) == 2
    assert errors[0].startswith("prefpipe: error: [seed=1] ")
    assert errors[1].startswith("prefpipe: error: [seed=2] ")
    assert "Error executing job" not in result.err
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_run_that_cannot_find_its_input_exits_with_1(prefpipe: Prefpipe) -> None:
    result = prefpipe("stage=pair")
    assert result.code == 1
    assert result.err.count("prefpipe: error: ") == 1
    assert result.err.splitlines()[-1].startswith("prefpipe: error: ")


def test_the_entry_survives_a_launcher_in_another_process(prefpipe: Prefpipe, tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(cli.entry)) is cli.entry
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(9)))
    data = ("data_mixer=files", "data_mixer.spec=rows.jsonl:1.0")
    result = prefpipe("-m", "seed=1,2", "stage=prepare", *data, "hydra/launcher=submitit_local")
    assert result.code == 0, result
    for seed in (1, 2):
        (point,) = (tmp_path / "runs" / "default" / "points").glob(f"*seed={seed}-*")
        assert artifacts.manifest(point / "prompts")["uses"]["seed"] == seed


# Hostile configs

CANARY = "import pathlib\npathlib.Path(__file__).with_suffix('.sang').touch()\ndef sing(*args, **kwargs): pass\n"


@pytest.mark.parametrize(
    "override",
    [
        "loss._target_=canary.sing",
        "++loss._target_=canary.sing",
        "+inputs.prompts={_target_:canary.sing}",
        "+inputs.prompts=[{_target_:canary.sing}]",
        "hydra.launcher._target_=canary.sing",
        "hydra.sweeper._target_=canary.sing",
        "+hydra.callbacks.x._target_=canary.sing",
        "hydra/callbacks=evil",
        "loss=evil",
        "experiment=evil",
        "+inputs.prompts=${oc.decode:'{_target_: canary.sing}'}",
    ],
)
def test_a_target_is_refused_before_it_is_imported(
    prefpipe: Prefpipe, tmp_path: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "canary.py").write_text(CANARY)
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {
        "hydra/callbacks/evil": "x:\n  _target_: canary.sing\n",
        "loss/evil": "_target_: canary.sing\nname: dpo\n",
        "experiment/evil": "# @package _global_\ninputs:\n  prompts:\n    _target_: canary.sing\n",
    }.items():
        file = tmp_path / "mine" / f"{name}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    line = refused(prefpipe("stage=prepare", "--config-dir", "mine", override))
    assert "_target_" in line
    assert not (tmp_path / "canary.sang").exists()
    assert "canary" not in sys.modules
    assert not (tmp_path / "runs").exists()


# Speed


@pytest.mark.parametrize("args", [["--help"], ["--cfg", "job"], ["--version"]])
def test_it_answers_in_under_a_second(args: list[str], tmp_path: Path) -> None:
    """Processor time, of which a busy machine does not take more; the wall clock shows the same on an idle one."""
    spent = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "prefpipe", *args], cwd=tmp_path, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 1.0


@pytest.mark.parametrize("args", [["--help"], ["--cfg", "job"], ["loss.gama=1"], ["stage=train", "loss=simp"]])
def test_no_heavy_package_is_imported_to_answer(args: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('heavy:', sorted({HEAVY!r} & set(sys.modules))))\n"
        f"from prefpipe.cli import main; main({args!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("heavy: []\n")


def test_help_lists_the_groups_and_their_options(prefpipe: Prefpipe) -> None:
    text = prefpipe("--help").out
    assert " dpo* dpo_norm " in " ".join(text.split())
    assert "what is minimized over the pairs" in text
    assert "schema" not in text
    assert "job_logging" not in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_help_lists_options_of_the_user(prefpipe: Prefpipe, tmp_path: Path) -> None:
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "my_dpo.yaml").write_text(
        "defaults:\n  - /schema/loss@_here_: dpo\n  - _self_\nbeta: 0.7\n"
    )
    assert " my_dpo " in prefpipe("--help", "--config-dir", "mine").out
    assert prefpipe("-cd", "mine", "loss=my_dpo", "-c", "job", "-p", "loss.beta").out == "0.7\n"
    assert "nearest: loss=my_dpo" in refused(prefpipe("-cd", "mine", "loss=mydpo"))


def test_version_is_prefpipes_own(prefpipe: Prefpipe) -> None:
    assert re.fullmatch(r"prefpipe \d+\.\d+\.\d+\S*\n", prefpipe("--version").out)


# Interruption


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    """The signal comes while the 1000 points of a sweep are checked, or run, which takes a minute or more."""
    # A shell has what it starts in the background ignore the signal, this test perhaps among it.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "prefpipe"]
    command += ["-m", "stage=train", "seed=range(1000)"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(6):  # Python drops an interrupt that falls into a destructor or a callback
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(5)
            break
        run.send_signal(signal.SIGINT)
    try:
        _, said = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 130
    assert said.endswith("prefpipe: interrupted; the same command again resumes\n")


def test_ctrl_c_that_another_error_covers_is_still_ctrl_c(prefpipe: Prefpipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hydra does when the signal comes while it opens a file, whose handle it then closes without having one."""

    def check(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise UnboundLocalError("f")

    monkeypatch.setattr(Checker, "check", check)
    assert prefpipe("stage=train") == Result(130, "", "prefpipe: interrupted; the same command again resumes\n")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m prefpipe --cfg job | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stage: ???\n", "")
