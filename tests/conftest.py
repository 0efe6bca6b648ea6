"""What many tests share: where things are, a tiny model, and the command line as a user has it."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import Prefpipe, Result

if TYPE_CHECKING:
    from prefpipe.scorers import ScoringContext

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PREFPIPE_SHARED", ROOT.parent / "shared"))

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PREFPIPE_CACHE"] = str(ROOT / ".cache" / "prefpipe")

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]

SLOWEST = (
    "tests/test_kill.py",
    "tests/smoke/",
    "tests/test_readme.py",
    "tests/test_extend.py",
    "tests/test_cli.py",
    "tests/test_tracking.py",
    "tests/stages/test_shards.py",
    "tests/training/test_sft.py",
)
"""They start many processes, and come first: xdist gives a file to one worker, and the last one would work alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, the others as they come."""

    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(SLOWEST) if item.nodeid.startswith(name)), len(SLOWEST))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _no_log_file_outlives_its_test() -> Iterator[None]:
    """A stage that runs in this process opens one; the next thousand tests would write into it, too."""
    logger = logging.getLogger("prefpipe")
    before = list(logger.handlers)
    yield
    for handler in logger.handlers[:]:
        if handler not in before:
            logger.removeHandler(handler)
            handler.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recorded real data."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set PREFPIPE_SHARED to the folder that holds data/")
    return folder


@pytest.fixture
def any_precision() -> Iterator[None]:
    """accelerate keeps the precision of the first Accelerator of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The model that comes with prefpipe."""
    return ROOT / "prefpipe" / "assets" / "tiny"


@pytest.fixture
def context(tmp_path: Path, tiny_folder: Path) -> "ScoringContext":
    """For scorers: the built-in model on one CPU."""
    from prefpipe.scorers import ScoringContext
    from prefpipe.settings import HardwareConfig, ModelConfig

    for name in ("cache", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    return ScoringContext(
        ModelConfig(name="tiny", path="builtin:tiny"),
        lambda: tiny_folder,
        HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=1),
        cache=tmp_path / "cache",
        work=tmp_path / "work",
    )


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder-decoder model as Flan-T5 is: gated, its head not tied, more embeddings than tokens.

    Its files are those of the hub: config.json says tie_word_embeddings=false; the tokenizer has no chat template,
    puts `</s>` behind a text, and knows no line break, brace or `<`.
    """
    import orjson
    import torch
    from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration, T5Tokenizer

    folder = tmp_path_factory.mktemp("t5")
    letters = "abcdefghijklmnopqrstuvwxyzABHQT0123456789+=#?:.,"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *((letter, -3.0) for letter in letters)]
    T5Tokenizer(vocab=[*pieces, ("\u2581apples", -1.0)], extra_ids=2).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head = torch.nn.Linear(32, 64, bias=False)
    model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    settings = orjson.loads((folder / "config.json").read_bytes())
    settings["tie_word_embeddings"] = False
    del settings["scale_decoder_outputs"]
    (folder / "config.json").write_bytes(orjson.dumps(settings))
    return folder


@pytest.fixture
def cli(tmp_path: Path) -> RunCli:
    """Run `prefpipe ...` in an empty folder, as a user would; output goes to tmp_path/runs."""

    def run(
        *args: str, check: bool = True, timeout: float = 600, cwd: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PREFPIPE_RUNS": str(tmp_path / "runs")}
        done = subprocess.run(
            [sys.executable, "-m", "prefpipe", *args],
            cwd=cwd or tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, f"prefpipe {' '.join(args)}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def prefpipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Prefpipe:
    """Run a command in this process, in an empty folder; `cli` is slower, and has a process of its own."""
    from prefpipe.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFPIPE_RUNS", str(tmp_path / "runs"))

    def run(*args: str) -> Result:
        capfd.readouterr()
        code = 0
        try:
            main(args)
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def folder_of_parts() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a tree but provenance and locks: what must not depend on when, where and how often it was made."""

    def contents(root: Path) -> dict[str, bytes]:
        return {
            str(file.relative_to(root)): file.read_bytes()
            for file in sorted(root.rglob("*"))
            if file.is_file() and file.name not in ("provenance.json", "timing.jsonl") and not file.name.startswith(".")
        }

    return contents
