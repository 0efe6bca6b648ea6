"""Reference log-probabilities survive between runs bit for bit, and what does not fit or is damaged is never used."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from prefpipe.errors import ArtifactError, ConfigError, DataError
from prefpipe.training.reference_cache import ReferenceCache
from prefpipe.training.reference_keys import completion_key


def key(number: int) -> bytes:
    return completion_key(np.array([1, 2, 3]), np.array([number]))


def logps(seed: int, length: int) -> np.ndarray:
    return -np.random.default_rng(seed).exponential(size=length).astype(np.float32)


def open_cache(folder: Path, weights: str = "0123abcd", precision: str = "fp32") -> ReferenceCache:
    return ReferenceCache(folder, weights=weights, precision=precision)


def filled(folder: Path, count: int = 5) -> ReferenceCache:
    cache = open_cache(folder)
    cache.add([key(i) for i in range(count)], [logps(i, i + 1) for i in range(count)])
    return cache


def parts(cache: ReferenceCache) -> list[Path]:
    return sorted(cache.folder.glob("part-*.safetensors"))


def run(script: str, *args: object) -> "subprocess.Popen[str]":
    """A real process that runs a script with this module's helpers."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom {Path(__file__).stem} import *\n{script}"
    )
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)


# ------------------------------------------------------------------------------------------------ keys


def test_a_key_changes_with_every_token_and_with_the_border():
    sequences = [
        ([1, 2], [3]),
        ([1], [2, 3]),
        ([1, 2], [4]),
        ([0, 2], [3]),
        ([1, 2], []),
        ([1, 2], [3, 0]),
        ([2, 1], [3]),
    ]
    keys = {completion_key(np.array(p, dtype=int), np.array(c, dtype=int)) for p, c in sequences}
    assert len(keys) == len(sequences)
    assert {len(k) for k in keys} == {32}


def test_a_key_is_the_same_for_every_integer_type_and_stays_what_it_was():
    expected = completion_key(np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32))
    for kind in (np.int64, np.uint16, np.dtype(">i4")):
        assert completion_key(np.array([1, 2], dtype=kind), np.array([3], dtype=kind)) == expected
    strided = np.array([1, 9, 2, 9])[::2]
    assert completion_key(strided, np.array([3])) == expected
    assert expected.hex() == "4fc021cf0ccf0caa69995e584afb3301fa5459182db0e1c28ba22ee11dd085ec"


def test_a_key_of_no_integers_is_refused():
    with pytest.raises(TypeError):
        completion_key(np.array([1.0]), np.array([3]))


# ------------------------------------------------------------------------------------------------ values


def test_what_is_added_comes_back_bit_for_bit(tmp_path):
    special = np.array([0.0, -0.0, -1e-45, -1.1754942e-38, -3.4028235e38, 1e-4, -0.1], dtype=np.float32)
    open_cache(tmp_path).add([key(0), key(1), key(2)], [special, logps(1, 3), logps(2, 0)])
    found = open_cache(tmp_path).get([key(2), key(0), key(1), key(0)], [0, 7, 3, 7])
    assert [values.tobytes() for values in found] == [b"", special.tobytes(), logps(1, 3).tobytes(), special.tobytes()]
    assert all(values.dtype == np.float32 and values.flags.writeable for values in found)


def test_an_unknown_key_is_none_and_no_key_is_no_value(tmp_path):
    assert open_cache(tmp_path).get([key(0)], [1]) == [None]
    cache = filled(tmp_path)
    assert cache.get([key(99), key(1)], [1, 2])[0] is None
    assert cache.get([], []) == []
    cache.add([], [])
    assert len(parts(cache)) == 1


def test_a_longer_array_is_cut_and_a_shorter_one_is_a_miss(tmp_path):
    cache = open_cache(tmp_path)
    cache.add([key(0)], [logps(0, 5)])
    assert cache.get([key(0)], [3])[0].tobytes() == logps(0, 5)[:3].tobytes()
    assert cache.get([key(0)], [6]) == [None]
    cache.add([key(0)], [logps(0, 9)])
    assert cache.get([key(0)], [6])[0].tobytes() == logps(0, 9)[:6].tobytes()


def test_the_first_answer_stays_when_the_same_key_is_added_again(tmp_path):
    cache = open_cache(tmp_path)
    for seed in range(5):
        before = set(parts(cache))
        cache.add([key(0)], [logps(seed, 4)])
        os.utime((set(parts(cache)) - before).pop(), (seed, seed))  # file systems count in milliseconds
    assert cache.get([key(0)], [4])[0].tobytes() == logps(0, 4).tobytes()
    assert open_cache(tmp_path).get([key(0)], [4])[0].tobytes() == logps(0, 4).tobytes()


def test_of_one_key_twice_in_one_call_the_longer_is_kept(tmp_path):
    cache = open_cache(tmp_path)
    cache.add([key(0), key(0), key(0)], [logps(0, 2), logps(0, 6), logps(0, 3)])
    assert cache.get([key(0)], [6])[0].tobytes() == logps(0, 6).tobytes()


def test_another_prompt_other_weights_and_another_precision_are_misses(tmp_path):
    prompt, completion = np.array([1, 2]), np.array([3, 4, 5])
    cache = open_cache(tmp_path)
    cache.add([completion_key(prompt, completion)], [logps(0, 3)])
    assert cache.get([completion_key(np.array([1, 7]), completion)], [3]) == [None]
    for other in (open_cache(tmp_path, weights="fedc"), open_cache(tmp_path, precision="bf16")):
        assert other.get([completion_key(prompt, completion)], [3]) == [None]


def test_equal_keys_in_their_first_bytes_are_told_apart(tmp_path):
    keys = [b"\0" * 8 + bytes([i]) + b"\0" * 23 for i in range(4)]
    cache = open_cache(tmp_path)
    for i in (2, 0, 3):
        cache.add([keys[i]], [logps(i, i + 1)])
    found = cache.get(keys, [1, 1, 1, 1])
    assert found[1] is None
    assert [found[i].tobytes() for i in (0, 2, 3)] == [logps(i, i + 1)[:1].tobytes() for i in (0, 2, 3)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.5])
def test_a_value_that_is_no_log_probability_is_refused(tmp_path, bad):
    cache = open_cache(tmp_path)
    with pytest.raises(DataError, match=f"completion 1 of 2: {bad}.* is not a finite number of at most 0; use"):
        cache.add([key(0), key(1)], [logps(0, 3), np.array([-1.0, bad], dtype=np.float32)])
    assert parts(cache) == []


def test_a_float64_model_keeps_its_float64(tmp_path):
    wide = -np.random.default_rng(0).exponential(size=5)
    cache = open_cache(tmp_path, precision="fp64")
    cache.add([key(0), key(1)], [wide, wide[:0]])
    found = open_cache(tmp_path, precision="fp64").get([key(0), key(1)], [5, 0])
    assert [values.tobytes() for values in found] == [wide.tobytes(), b""]
    assert {values.dtype for values in found} == {np.dtype(np.float64)}
    with pytest.raises(AssertionError, match="float32"):
        cache.add([key(2)], [logps(2, 3)])
    float32 = open_cache(tmp_path)
    float32.add([key(0)], [wide.astype(np.float32)])
    parts(float32)[0].rename(cache.folder / "part-moved.safetensors")
    assert len(open_cache(tmp_path, precision="fp64").get([key(0)], [5])[0]) == 5
    assert (cache.folder / "part-moved.safetensors.damaged").exists()


adds = st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=6), max_size=6)


@settings(max_examples=60, deadline=None)
@example(adds=[[(0, 8), (1, 0)], [(2, 0)]], asked=[(0, 8), (1, 0), (2, 0)], reopen=True)
@given(adds=adds, asked=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=12), reopen=st.booleans())
def test_any_adds_in_any_order_give_what_was_added(tmp_path_factory, adds, asked, reopen):
    cache = open_cache(tmp_path_factory.mktemp("cache"))
    longest: dict[int, int] = {}
    for rows in adds:
        cache.add([key(i) for i, _ in rows], [logps(i, 9)[:length] for i, length in rows])
        cache = open_cache(cache.folder.parent) if reopen else cache
        for i, length in rows:
            longest[i] = max(length, longest.get(i, 0))
        found = cache.get([key(i) for i, _ in asked], [length for _, length in asked])
        for (i, length), values in zip(asked, found, strict=True):
            if length <= longest.get(i, -1):
                assert values.tobytes() == logps(i, 9)[:length].tobytes()
            else:
                assert values is None


def test_the_same_values_are_the_same_file(tmp_path):
    filled(tmp_path / "a"), filled(tmp_path / "a"), filled(tmp_path / "b")
    cache = open_cache(tmp_path / "c")
    cache.add([key(i) for i in (3, 0, 4, 1, 2)], [logps(i, i + 1) for i in (3, 0, 4, 1, 2)])
    contents = [{file.name: file.read_bytes() for file in parts(open_cache(tmp_path / name))} for name in "abc"]
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 1
    umask = os.umask(0o022)
    os.umask(umask)
    assert parts(cache)[0].stat().st_mode & 0o777 == 0o666 & ~umask


# ------------------------------------------------------------------------------------------------ damage


def test_a_folder_of_another_model_is_refused(tmp_path):
    cache = filled(tmp_path)
    cache.folder.rename(tmp_path / "ffff-fp32")
    with pytest.raises(ArtifactError, match=r"ffff-fp32/manifest\.json says weights=0123abcd, not ffff: .*; delete "):
        open_cache(tmp_path, weights="ffff")


def test_a_manifest_of_another_format_a_damaged_and_a_missing_one_are_refused(tmp_path):
    manifest = filled(tmp_path).folder / "manifest.json"
    content = orjson.loads(manifest.read_bytes())
    assert content == {"format": "reference_logps/1", "weights": "0123abcd", "precision": "fp32"}
    manifest.write_bytes(orjson.dumps(content | {"format": "reference_logps/2"}))
    with pytest.raises(ArtifactError, match="format=reference_logps/2, not reference_logps/1"):
        open_cache(tmp_path)
    for damaged in (b"", b"[1]", b'{"format": '):
        manifest.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"manifest\.json (is not JSON|says format=None)"):
            open_cache(tmp_path)
    manifest.unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing.*; delete"):
        open_cache(tmp_path)


def test_another_precision_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="precision=fp8 is none of fp32, bf16, fp16"):
        open_cache(tmp_path, precision="fp8")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    """One bit of one value, which stays a plausible one."""
    content = bytearray(file.read_bytes())
    place = content.index(logps(4, 5).tobytes()) + 3
    content[place] ^= 0x01
    file.write_bytes(content)


def rewrite(file: Path, **changed: np.ndarray) -> None:
    save_file(load_file(file) | changed, file)


def no_checksums(file: Path) -> None:
    tensors = load_file(file)
    del tensors["crc"]
    save_file(tensors, file)


def wrong_offsets(file: Path) -> None:
    rewrite(file, offsets=load_file(file)["offsets"][::-1].copy())


def wrong_sizes(file: Path) -> None:
    rewrite(file, keys=load_file(file)["keys"][:-1].copy())


def wrong_kind(file: Path) -> None:
    rewrite(file, logps=load_file(file)["logps"].astype(np.float16))


def impossible(value: float) -> "object":
    def damage(file: Path) -> None:
        """A value that no model gives, with its checksum made to fit."""
        tensors = load_file(file)
        tensors["logps"][-1] = value
        offsets = tensors["offsets"].tolist()
        rows = [tensors["logps"][a:b].tobytes() for a, b in pairwise(offsets)]
        sums = [zlib.crc32(row, zlib.crc32(k.tobytes())) for row, k in zip(rows, tensors["keys"], strict=True)]
        save_file(tensors | {"crc": np.array(sums, dtype=np.uint32)}, file)

    damage.__name__ = f"value_{value}"
    return damage


DAMAGES = [cut, empty, flip, no_checksums, wrong_offsets, wrong_sizes, wrong_kind]
DAMAGES += [impossible(value) for value in (np.nan, -np.inf, 0.5)]


INDEX_ONLY = [no_checksums, wrong_offsets, wrong_sizes]  # nobody reads these again while the cache is open
CASES = [(damage, False) for damage in DAMAGES] + [(damage, True) for damage in DAMAGES if damage not in INDEX_ONLY]


@pytest.mark.parametrize(("damage", "while_open"), CASES, ids=[f"{d.__name__}-{'open' if o else ''}" for d, o in CASES])
def test_a_damaged_part_is_set_aside_and_its_values_are_computed_again(tmp_path, caplog, damage, while_open):
    cache = filled(tmp_path)
    damaged = parts(cache)[0]
    cache.add([key(7)], [logps(7, 3)])
    keys, lengths = [key(i) for i in (0, 1, 2, 3, 4, 7)], [1, 2, 3, 4, 5, 3]
    if while_open:
        assert all(values is not None for values in cache.get(keys, lengths))
    damage(damaged)
    if not while_open:
        cache = open_cache(tmp_path)
    found = cache.get(keys, lengths)
    assert [values is None for values in found] == [True] * 5 + [False]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{damaged}: " in caplog.text
    assert not damaged.exists()
    assert damaged.with_name(f"{damaged.name}.damaged").exists()

    cache.add(keys[:5], [logps(i, i + 1) for i in range(5)])
    for reader in (cache, open_cache(tmp_path)):
        assert [v.tobytes() for v in reader.get(keys, lengths)[:5]] == [logps(i, i + 1).tobytes() for i in range(5)]
    assert len(caplog.records) == 1


def test_values_that_another_part_has_too_survive_the_damage_of_one(tmp_path):
    cache = open_cache(tmp_path)
    cache.add([key(0), key(1)], [logps(0, 5), logps(1, 5)])
    first = parts(cache)[0]
    cache.add([key(0)], [logps(0, 5)])
    cut(first)
    found = cache.get([key(0), key(1)], [5, 5])
    assert found[0].tobytes() == logps(0, 5).tobytes()
    assert found[1] is None


def test_a_part_that_another_process_has_moved_is_a_miss(tmp_path, caplog):
    cache = filled(tmp_path)
    assert cache.get([key(0)], [1]) != [None]
    parts(cache)[0].unlink()
    assert cache.get([key(0)], [1]) == [None]
    assert "another process has moved it" in caplog.text


def test_a_damaged_part_that_cannot_be_moved_is_ignored(tmp_path, caplog):
    cache = filled(tmp_path)
    damaged = parts(cache)[0]
    cut(damaged)
    damaged.with_name(f"{damaged.name}.damaged").mkdir()  # a file cannot be renamed to a folder, not even by root
    cache = open_cache(tmp_path)
    for _ in range(2):
        assert cache.get([key(0)], [1]) == [None]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "it is ignored, as it cannot be renamed (Is a directory)" in caplog.text
    cache.add([key(0)], [logps(0, 1)])
    assert cache.get([key(0)], [1])[0].tobytes() == logps(0, 1).tobytes()


# ------------------------------------------------------------------------------------------------ processes

WRITER = """
cache = open_cache(Path(sys.argv[1]))
for batch in range(10_000):
    cache.add([key(batch * 20 + i) for i in range(20)], [logps(batch * 20 + i, 500) for i in range(20)])
    print(batch, flush=True)
"""


def test_a_killed_writer_leaves_whole_parts_only(tmp_path, caplog):
    rng = random.Random(0)
    for _ in range(6):
        writer = run(WRITER, tmp_path)
        assert writer.stdout.readline() == "0\n"
        time.sleep(rng.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        last = max(map(int, writer.communicate()[0].split()), default=0)
        cache = open_cache(tmp_path)
        numbers = range((last + 1) * 20)
        found = cache.get([key(i) for i in numbers], [500] * len(numbers))
        assert all(v is not None and v.tobytes() == logps(i, 500).tobytes() for i, v in enumerate(found))
    assert caplog.records == []


def test_half_written_files_are_no_parts_and_go_after_a_day(tmp_path):
    cache = filled(tmp_path)
    whole = parts(cache)[0]
    young, old = (whole.with_name(f"{whole.name}.{name}.tmp") for name in ("young", "old"))
    for leftover in (young, old):
        leftover.write_bytes(whole.read_bytes()[:100])
    os.utime(old, (0, 0))
    whole.unlink()
    cache = open_cache(tmp_path)
    assert cache.get([key(0)], [1]) == [None]
    with cache.lock():
        pass
    assert (young.exists(), old.exists()) == (True, False)


WORKER = """
logging.basicConfig(level=logging.INFO, filename=sys.argv[2] + f".{os.getpid()}.log")
cache = open_cache(Path(sys.argv[1]))
keys = [key(i) for i in range(40)]
known = cache.get(keys, [50] * 40)
if any(values is None for values in known):
    with cache.lock():
        known = cache.get(keys, [50] * 40)
        for i, values in enumerate(known):
            if values is None:
                time.sleep(0.01)
                with open(sys.argv[2], "a") as file:
                    file.write(f"{i}\\n")
                cache.add([keys[i]], [logps(i, 50)])
known = cache.get(keys, [50] * 40)
assert [values.tobytes() for values in known] == [logps(i, 50).tobytes() for i in range(40)]
"""


def test_of_four_processes_at_once_each_key_is_computed_by_one(tmp_path):
    workers = [run(WORKER, tmp_path / "cache", tmp_path / "computed") for _ in range(4)]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    assert sorted(map(int, (tmp_path / "computed").read_text().split())) == list(range(40))


def test_who_waits_says_for_whom_and_goes_on_when_the_holder_is_killed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    holder = run(
        "with open_cache(Path(sys.argv[1])).lock():\n    print('held', flush=True)\n    time.sleep(600)", tmp_path
    )
    assert holder.stdout.readline() == "held\n"
    waiter = run(
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "with open_cache(Path(sys.argv[1])).lock():\n    print('mine', flush=True)",
        tmp_path,
    )
    line = waiter.stdout.readline()
    assert f"waiting 0 s for process {holder.pid} on " in line
    assert str(tmp_path) in line
    holder.kill()
    rest = waiter.communicate(timeout=60)[0]
    assert "free after" in rest
    assert rest.endswith("mine\n")
    holder.communicate()
    with open_cache(tmp_path).lock():
        pass
    assert caplog.records == []


def test_the_lock_is_free_after_an_error_inside(tmp_path):
    cache = open_cache(tmp_path)
    with pytest.raises(RuntimeError, match="crash"), cache.lock():
        raise RuntimeError("crash")
    with cache.lock():
        pass


def test_a_reader_sees_what_others_add_later(tmp_path):
    reader, writer = open_cache(tmp_path), open_cache(tmp_path)
    assert reader.get([key(0)], [3]) == [None]
    writer.add([key(0)], [logps(0, 3)])
    assert reader.get([key(0)], [3])[0].tobytes() == logps(0, 3).tobytes()


def test_opening_many_completions_costs_the_index_only(tmp_path):
    count, length, batch = 200_000, 50, 20_000
    cache = open_cache(tmp_path)
    values = logps(0, length)
    for start in range(0, count, batch):
        cache.add([i.to_bytes(32, "little") for i in range(start, start + batch)], [values] * batch)
    del cache
    tracemalloc.start()
    try:
        cache = open_cache(tmp_path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 80 * count  # the values alone are 200 bytes each
    assert peak < 200 * count
    assert cache.get([(5).to_bytes(32, "little"), (count).to_bytes(32, "little")], [length, 1])[1] is None
