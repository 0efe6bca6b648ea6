"""Replayed completions: found by id, by messages or by text; what is missing is counted, what is broken is named."""

import orjson
import pytest

from prefpipe.errors import ConfigError, DataError
from prefpipe.generators import Skipped
from prefpipe.generators.replay import Replay
from prefpipe.records import Completion, Prompt, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig


def replay(path, texts):
    messages = [[{"role": "user", "content": text}] for text in texts]
    rows = [Prompt(prompt_id=prompt_id(m), messages=m, source="test", answer="1") for m in messages]
    generator = Replay(path=str(path), num_samples=3)
    model, hardware = ModelConfig(name="none", path="none"), HardwareConfig(name="cpu")
    return list(generator.generate(rows, model=model, folder=path, hardware=hardware, seed=0, round_=0))


def test_rows_are_found_by_id_by_messages_and_by_prompt(tmp_path):
    a, b = ([{"role": "user", "content": text}] for text in "ab")
    rows = [
        {"prompt_id": prompt_id(a), "text": "a1"},
        {"messages": b, "texts": ["b1", "b2"]},
        {"prompt": "a", "text": "a2"},
        {"prompt": "b", "texts": ["b3", "b4"]},
    ]
    path = tmp_path / "dump.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    answers = replay(path, ["b", "a", "c"])
    assert [a.text for a in answers if isinstance(a, Completion)] == ["b1", "b2", "b3", "a1", "a2"]
    assert answers[-1] == Skipped(prompt_id([{"role": "user", "content": "c"}]), "no_completion")
    assert all(a.answer == "1" and a.finish_reason == "given" for a in answers if isinstance(a, Completion))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "is not JSON"),
        (b'{"prompt": "a"}', "needs `text`"),
        (b'{"text": "a"}', "names no prompt"),
        (b"3", "needs"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, line, says):
    path = tmp_path / "dump.jsonl"
    path.write_bytes(b'{"prompt": "a", "text": "x"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"dump\.jsonl:2 .*{says}"):
        replay(path, ["a"])


def test_the_file_must_be_named_and_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"generator\.path=.*no such file"):
        replay(tmp_path / "absent.jsonl", ["a"])
    with pytest.raises(ConfigError, match=r"needs generator\.path"):
        list(Replay().generate([], model=None, folder=tmp_path, hardware=None, seed=0, round_=0))  # type: ignore[arg-type]
