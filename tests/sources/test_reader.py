"""Bytes to rows: each kind of file, and what can be wrong with its bytes."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefpipe.errors import ConfigError, DataError
from prefpipe.settings import SourceConfig
from prefpipe.sources.codes import BadRow
from prefpipe.sources.reader import MAX_ROW_BYTES, read_rows

ROWS = [{"prompt": f"Frage {i}: ä?", "chosen": "ja", "rejected": "nein"} for i in range(3)]


def found(path: Path | str, **settings) -> list[tuple[int, object]]:
    """(line, row) or (line, code)."""
    rows = read_rows(SourceConfig(path=str(path), **settings))
    return [(row.line, row.data.code if isinstance(row.data, BadRow) else row.data) for row in rows]


def jsonl(rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(ROWS)),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("lines.json", jsonl(ROWS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n")),
        ("bom.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode() + b"\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # bytes in an id would differ between workers
)
def test_json_in_every_shape(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert found(tmp_path / name) == list(enumerate(ROWS, 1))


def test_csv(tmp_path):
    lines = 'prompt,chosen,rejected\n"two\nlines","said ""yes""",no\nshort,row\n\nx,y,z\n'
    (tmp_path / "a.csv").write_text(lines, encoding="utf-8")
    assert found(tmp_path / "a.csv") == [
        (2, {"prompt": "two\nlines", "chosen": 'said "yes"', "rejected": "no"}),
        (4, "JSN"),
        (6, {"prompt": "x", "chosen": "y", "rejected": "z"}),
    ]
    (tmp_path / "b.csv").write_bytes(b"prompt,chosen\ncaf\xe9,x\ncaf\xc3\xa9,y\n")
    assert found(tmp_path / "b.csv") == [(2, "ENC"), (3, {"prompt": "café", "chosen": "y"})]


def test_parquet_with_lists_and_bad_text(tmp_path):
    chosen = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3
    table = pa.table({"prompt": ["a", "b", "c"], "chosen": chosen, "score": [1.0, float("nan"), None]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    rows = found(tmp_path / "a.parquet")
    assert [line for line, _ in rows] == [1, 2, 3]
    assert rows[2][1] == {"prompt": "c", "chosen": chosen[0], "score": None}
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "b.parquet")
    assert found(tmp_path / "b.parquet") == [(1, {"prompt": "a"}), (2, "ENC")]
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:200])
    with pytest.raises(DataError, match=r"c\.parquet"):
        found(tmp_path / "c.parquet")


def test_each_bad_line_has_its_number_and_code(tmp_path):
    lines = [
        b'{"prompt": "fine"}',
        b'{"prompt": "caf\xe9"}',
        b"",
        b'{"prompt": "cut',
        b'["not", "an object"]',
        b'{"prompt": "x", "score": NaN}',
        b'{"prompt": "x", "score": 1e999}',
        b'{"prompt": "\\ud800"}',
        b"[" * 2000 + b"]" * 2000,
        b'"' + b"x" * MAX_ROW_BYTES + b'"',
        b'{"prompt": "fine"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    fine = {"prompt": "fine"}
    expected = [
        (1, fine), (2, "ENC"), (4, "JSN"), (5, "TYP"), (6, "NAN"), (7, "NAN"), (8, "CTL"), (9, "JSN"), (10, "BIG"),
        (11, fine),
    ]  # fmt: skip
    assert found(tmp_path / "a.jsonl") == expected


def test_a_bad_element_of_an_array_costs_only_itself(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a": NaN},\n{"a": "caf\xe9"}, 5, {"a": "]"}]')
    assert found(tmp_path / "a.json") == [(1, {"a": 1}), (2, "NAN"), (3, "ENC"), (4, "TYP"), (5, {"a": "]"})]
    (tmp_path / "empty.json").write_bytes(b"[ ]")
    assert found(tmp_path / "empty.json") == []


@pytest.mark.parametrize(
    "content", [b'[{"a": 1}, {"a": 2', b'[{"a": 1} {"a": 2}]', b'[{"a": 1}', b"[[[", b'[{"a": 1}] x']
)
def test_a_broken_array_is_refused_as_a_whole(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json:[12]: the JSON array breaks off"):
        found(tmp_path / "a.json")


def test_a_cut_gzip_file_is_refused(tmp_path):
    content = gzip.compress(jsonl(ROWS * 100), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cut or damaged"):
        found(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(jsonl(ROWS))
    with pytest.raises(DataError, match="cut or damaged"):
        found(tmp_path / "b.jsonl.gz")


def test_a_glob_is_read_in_the_order_of_names(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([{"name": name}]))
    assert [row["name"] for _, row in found(tmp_path / "*.jsonl")] == ["a", "b", "c"]
    assert len(found(tmp_path / "*.jsonl", num=2)) == 2


def test_the_built_in_problems(tmp_path):
    first, second = found("builtin:arithmetic", num=5), found("builtin:arithmetic", num=7)
    assert first == second[:5]
    assert set(first[0][1]) == {"question", "answer"}
    with pytest.raises(ConfigError, match="num"):
        found("builtin:arithmetic")
    with pytest.raises(ConfigError, match="builtin:arithmetic"):
        found("builtin:algebra", num=1)


def test_paths_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file; a data set of the hub is written hub:org/name"):
        found("org/name")
    with pytest.raises(ConfigError, match="is a folder"):
        found(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match=r"must end in \.jsonl, \.json, \.csv, \.parquet"):
        found(tmp_path / "a.txt")


def test_a_hub_data_set_is_streamed(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(jsonl(ROWS))
    assert found(f"hub:{tmp_path}/set") == list(enumerate(ROWS, 1))


def test_a_hub_data_set_without_network_says_what_to_do():
    with pytest.raises(DataError, match=r"hub:org/none .* cannot be read from the hub: .* Without a network, copy"):
        found("hub:org/none")
