"""Sources as a whole: recognition, columns, and what becomes of bad rows."""

import base64
import json
import logging

import pytest

from prefpipe.errors import ConfigError, DataError
from prefpipe.settings import SourceConfig
from prefpipe.sources import Good, Quarantined, open_source

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def write(path, rows) -> str:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return str(path)


def opened(path, **settings):
    format_, rows = open_source("mine", SourceConfig(path=path, **settings), seed=0)
    return format_, list(rows)


def test_the_format_of_most_rows_wins_and_is_logged(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [b"\xff\n", {"foo": 1}, {"question": "q", "answer": "a"}, PAIR, PAIR])
    with caplog.at_level(logging.INFO):
        format_, rows = opened(path)
    assert format_ == "pair_text"
    assert "source mine: recognised as pair_text by 2 of its first 5 rows" in caplog.text
    assert [row.code if isinstance(row, Quarantined) else "good" for row in rows] == [
        "ENC",
        "KEY",
        "KEY",
        "good",
        "good",
    ]
    assert isinstance(rows[3], Good)
    assert rows[3].records[0].source == "mine"


def test_columns_translate_names_and_fill_meta(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer_zh": "好", "answer_en": "ok", "level": 3}])
    columns = {"prompt": "question", "chosen": "answer_zh", "rejected": "answer_en", "meta.level": "level"}
    format_, (row,) = opened(path, columns=columns)
    assert format_ == "pair_text"
    pair = row.records[0]
    assert (pair.messages[0]["content"], pair.chosen, pair.rejected, pair.meta) == ("q", "好", "ok", {"level": 3})


def test_a_misspelt_key_is_named_with_what_was_meant(tmp_path):
    path = write(tmp_path / "a.jsonl", [PAIR, {"prompt": "a", "choosen": "b", "rejected": "c"}])
    bad = opened(path)[1][1]
    assert bad == Quarantined(
        "mine",
        path,
        2,
        "KEY",
        f"{path}:2: no key 'chosen'; did you mean 'choosen'? Then set columns={{chosen: choosen}}",
        '{"prompt": "a", "choosen": "b", "rejected": "c"}',
    )


def test_rows_of_no_known_format_are_refused_with_the_nearest_key(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "choosen": "b", "rejected": "c"}] * 3)
    with pytest.raises(DataError, match=r"a\.jsonl:1: KEY: .*did you mean 'choosen'\?"):
        opened(path)
    path = write(tmp_path / "b.jsonl", [{"foo": 1, "bar": 2}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: KEY: rows with the keys 'foo', 'bar' .* Map columns=.*pair_text"):
        opened(path)


def test_a_misspelt_column_is_refused_with_the_nearest_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer_zh": "a", "answer_en": "b"}])
    columns = {"prompt": "question", "chosen": "answer_hz", "rejected": "answer_en"}
    with pytest.raises(DataError, match=r"no key 'answer_hz'; did you mean 'answer_zh'"):
        opened(path, columns=columns)


def test_a_declared_format_needs_no_recognition(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "rejected": "c"}])
    assert [row.code for row in opened(path, format="pair_text")[1]] == ["KEY"]
    with pytest.raises(ConfigError, match="format=pear_text must be auto or one of pair_text"):
        opened(path, format="pear_text")


def test_bad_rows_keep_their_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [b'{"prompt": "caf\xe9"}\n', b"{cut\n", {**PAIR, "chosen": ""}, PAIR])
    raws = [row.raw for row in opened(path)[1] if isinstance(row, Quarantined)]
    assert base64.b64decode(raws[0]) == b'{"prompt": "caf\xe9"}'
    assert raws[1] == "{cut"
    assert json.loads(raws[2]) == {**PAIR, "chosen": ""}


def test_a_file_of_which_nothing_can_be_parsed(tmp_path):
    format_, rows = opened(write(tmp_path / "a.jsonl", [b"{cut\n"] * 3))
    assert (format_, [row.code for row in rows]) == ("unknown", ["JSN"] * 3)
    with pytest.raises(DataError, match="none of its first 1000 rows can be read"):
        opened(write(tmp_path / "b.jsonl", [b"{cut\n"] * 1001 + [PAIR]))
