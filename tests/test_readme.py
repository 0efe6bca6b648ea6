"""The README's commands, as they stand there: in order, in one folder, sized down by debug=tiny."""

import re
import shlex
from pathlib import Path

import orjson

from prefpipe.artifacts import is_complete

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """Every command line of the README's bash blocks, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_readme_runs(cli, tmp_path):
    rows = [{"prompt": f"What is {i} + 1?", "chosen": f"#### {i + 1}", "rejected": f"#### {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    found = commands()
    assert len(found) == 6
    for program, *arguments in found:
        assert program == "prefpipe"
        extra = ["data_mixer.sources.arithmetic.num=30"] if "stage=loop" in arguments else []
        cli(*arguments, "debug=tiny", "training.save_every_steps=null", "training.max_steps=1", *extra)
    runs = tmp_path / "runs"
    assert is_complete(runs / "default" / "round_0" / "checkpoint")
    assert is_complete(runs / "mine" / "round_1" / "evals")
    assert len(list((runs / "default" / "points").iterdir())) == 3
    assert (runs / "mine" / "report.html").is_file()


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_file_of_the_readme_exists():
    linked = re.findall(r"\]\(([\w./-]+)\)", README)
    assert linked
    for path in linked:
        assert (ROOT / path).exists(), path


def test_no_number_is_left_to_fill_in():
    assert re.findall(r"[A-Z]+_(?:SECONDS|MINUTES|TABLE)", README) == []
