"""Reference log-probabilities as a CSV: what is written comes back, and what does not fit the run is refused."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefpipe import artifacts
from prefpipe.artifacts import Plan
from prefpipe.check import Checker, without_hydra
from prefpipe.components import COMPONENTS
from prefpipe.config import CONF_DIR
from prefpipe.errors import ConfigError, DataError
from prefpipe.files import sha256_of
from prefpipe.losses import DPO, IPO, Loss, SimPO
from prefpipe.records import Pair, Split, prompt_id
from prefpipe.run import run
from prefpipe.settings import HardwareConfig, ModelConfig, SelectionConfig, TrainingConfig
from prefpipe.stages import train as stage
from prefpipe.training.loop import Job, train
from prefpipe.training.reference_csv import PairNames, PairSums, match_sums, read_csv, write_csv
from prefpipe.training.selection import pair_id

ROWS = [
    PairSums("uf-1", "train", -12.25, -0.1, 7, 1),
    PairSums('a "quoted", id', "test", 0.0, -1e300, 1, 999),
    PairSums("line\nbreak ü", "train", -1 / 3, -2.5e-310, 12, 5),
]


def test_csv_keeps_every_bit(tmp_path):
    write_csv(tmp_path / "sums.csv", ROWS)
    assert read_csv(tmp_path / "sums.csv") == {2: ROWS[0], 3: ROWS[1], 5: ROWS[2]}
    assert (tmp_path / "sums.csv").read_text().splitlines()[0].replace('"', "") == (
        "full_id,split,reference_chosen_logps,reference_rejected_logps,chosen_tokens,rejected_tokens"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["sums.csv"]


sums = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False)
counts = st.integers(1, 999_999)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.builds(PairSums, texts, texts, sums, sums, counts, counts), unique_by=lambda row: row[:2]))
def test_csv_keeps_any_rows(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("csv") / "sums.csv"
    write_csv(file, rows)
    assert [tuple(map(repr, row)) for row in read_csv(file).values()] == [tuple(map(repr, row)) for row in rows]


def test_csv_of_a_spreadsheet_is_read(tmp_path):
    """A byte order mark, CRLF, other order of columns."""
    lines = [
        "split,full_id,chosen_tokens,rejected_tokens,reference_chosen_logps,reference_rejected_logps",
        "train,7,3,4,-1.5,-2",
    ]
    (tmp_path / "sums.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    assert read_csv(tmp_path / "sums.csv") == {2: PairSums("7", "train", -1.5, -2.0, 3, 4)}


HEADER = ",".join(PairSums._fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r":1: the columns are , expected are exactly full_id,"),
        ("full_id,split\n", r":1: the columns are full_id,split, expected are exactly"),
        (f",{HEADER}\n", r":1: the columns are ,full_id.*index=False"),
        (f"{HEADER}\na,train,-1,-1,1\n", r":2: 5 cells, but the header has 6"),
        (f"{HEADER}\na,train,-1,-1,1,1\n\n", r":3: 0 cells"),
        (f"{HEADER}\na,train,nan,-1,1,1\n", r":2: reference_chosen_logps='nan' is not a finite number of at most 0"),
        (f"{HEADER}\na,train,-1,-inf,1,1\n", r":2: reference_rejected_logps='-inf' is not"),
        (f"{HEADER}\na,train,0.5,-1,1,1\n", r":2: reference_chosen_logps='0.5' is not"),
        (f"{HEADER}\na,train,-1_0,-1,1,1\n", r":2: reference_chosen_logps='-1_0' is not"),
        (f"{HEADER}\na,train,,-1,1,1\n", r":2: reference_chosen_logps='' is not"),
        (f"{HEADER}\na,train,-1,-1,0,1\n", r":2: chosen_tokens='0' is not a whole number of at least 1"),
        (f"{HEADER}\na,train,-1,-1,1,1.0\n", r":2: rejected_tokens='1.0' is not"),
        (f"{HEADER}\na,train,-1,-1,1,-3\n", r":2: rejected_tokens='-3' is not"),
        (f"{HEADER}\n,train,-1,-1,1,1\n", r":2: full_id is empty"),
        (
            f"{HEADER}\na,train,-1,-1,1,1\na,test,-1,-1,1,1\na,train,-2,-1,1,1\n",
            r":4: full_id=a, split=train is in line 2",
        ),
        (f'{HEADER}\n"a,train,-1,-1,1,1\n', r": not CSV in UTF-8"),
        (f"{HEADER}\n\udcff,train,-1,-1,1,1\n", r": not CSV in UTF-8"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "sums.csv"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        read_csv(file)
    assert str(caught.value).startswith(str(file))
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[0]], "full_id=uf-1, split=train names two pairs"),
        ([ROWS[0]._replace(reference_chosen_logps=1.0)], r"row 1: reference_chosen_logps='1\.0'"),
        ([ROWS[0]._replace(chosen_tokens=0)], "row 1: chosen_tokens='0'"),
    ],
)
def test_bad_rows_are_not_written(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        write_csv(tmp_path / "sums.csv", rows)
    assert list(tmp_path.iterdir()) == []


def test_a_certain_completion_of_many_tokens_may_round_above_0(tmp_path):
    """1,000 tokens of 1e-5 above 0 each are rounding, one token of 0.01 is not."""
    write_csv(tmp_path / "sums.csv", [ROWS[0]._replace(reference_chosen_logps=0.01, chosen_tokens=1000)])
    with pytest.raises(DataError, match="at most 0"):
        write_csv(tmp_path / "sums.csv", [ROWS[0]._replace(reference_chosen_logps=0.01, chosen_tokens=1)])


def test_sums_are_matched_by_name_in_the_order_of_the_run():
    rows = dict(enumerate(ROWS, start=2))
    pairs = [(ROWS[2].full_id, 12, 5), (ROWS[0].full_id, 7, 1)]
    assert match_sums(Path("f"), rows, pairs, {"uf-1", ROWS[2].full_id}).tolist() == [
        [-1 / 3, -12.25],
        [-2.5e-310, -0.1],
    ]
    assert match_sums(Path("f"), rows, [], {"uf-1", ROWS[2].full_id}).shape == (2, 0)


@pytest.mark.parametrize(
    ("pairs", "known", "message"),
    [
        (
            [("uf-1", 7, 2)],
            {"uf-1", "b"},
            r"^f\.csv:2: full_id=uf-1 was summed over 7 chosen and 1 rejected .*; use the",
        ),
        ([("c", 1, 1)], {"uf-1", "b", "c"}, r"^f\.csv:9: the file ends without a row of full_id=c, split=train; add"),
        ([("uf-1", 7, 1)], {"uf-1"}, r"^f\.csv:9: full_id=b is of no pair of inputs\.pairs; drop"),
    ],
)
def test_other_tokens_missing_pairs_and_rows_too_many_are_refused(pairs, known, message):
    rows = {2: ROWS[0], 4: ROWS[1], 9: ROWS[2]._replace(full_id="b")}
    with pytest.raises(DataError, match=message):
        match_sums(Path("f.csv"), rows, pairs, known)


# ------------------------------------------------------------------------------------------------ runs

TRAINING = TrainingConfig(
    learning_rate=1e-3, global_batch_size=4, micro_batch_size=2, max_steps=5, max_tokens=128, max_prompt_tokens=96
)
TINY = ModelConfig(name="tiny", path="builtin:tiny")


def pairs(count: int = 7, **meta: Callable[[int], object]) -> list[Pair]:
    made = []
    for i in range(count):
        messages = [{"role": "user", "content": f"Tom has {i} apples and buys {i + 2} more. " * (1 + i % 3)}]
        texts = {"chosen": f"{i} + {i + 2} = {2 * i + 2}\n#### {2 * i + 2}", "rejected": f"#### {i}"}
        named = {name: value(i) for name, value in meta.items()}
        made.append(Pair(prompt_id=prompt_id(messages), messages=messages, source="t", meta=named, **texts))
    return made


def job(work: Path, folder: Path, loss: Loss, rows: list[Pair], csv: Path | None = None, **others: object) -> Job:
    work.mkdir(parents=True)
    given = {"pairs": rows, "policy": folder, "reference": folder, "loss": loss, "training": TRAINING} | others
    hardware = HardwareConfig(name="cpu", device="cpu", precision="fp32")
    cache = work.parent / f"cache of {work.name}"
    return Job(model=TINY, hardware=hardware, seed=0, work=work, cache=cache, reference_logps=csv, **given)


def losses(work: Path) -> list[float]:
    return [orjson.loads(line)["train/loss"] for line in (work / "metrics.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("loss", [DPO(beta=0.3), IPO()], ids=["sums", "means"])
def test_training_from_the_exported_file_is_the_same_training(tmp_path, tiny_folder, loss):
    """Every digit: the file holds float64. Rows of a held-out pair, and of other splits, are no rows too many."""
    rows = [*pairs(), replace(pairs(8)[7], split=Split.heldout), pairs()[2]]
    train(job(tmp_path / "a", tiny_folder, loss, rows))
    file = tmp_path / "a" / "reference_logps.csv"
    written = read_csv(file)
    assert [row.full_id for row in written.values()] == [pair_id(pair) for pair in pairs()]
    shuffled = [*reversed(written.values()), PairSums("x", "test", -1.0, -1.0, 1, 1)]
    shuffled += [PairSums(pair_id(rows[7]), "train", -1.0, -1.0, 1, 1)]
    write_csv(tmp_path / "other.csv", shuffled)
    train(job(tmp_path / "b", tiny_folder, loss, rows, tmp_path / "other.csv"))
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert not (tmp_path / "cache of b").exists(), "nothing was computed"
    assert (tmp_path / "b" / "reference_logps.csv").read_bytes() == file.read_bytes()


def test_the_numbers_of_the_file_are_the_ones_that_are_used(tmp_path, tiny_folder):
    """-100 more nats of every chosen completion: DPO's first margin is 100 beta, its loss ln(1 + e^(-100 beta))."""
    train(job(tmp_path / "a", tiny_folder, DPO(), pairs()))
    found = read_csv(tmp_path / "a" / "reference_logps.csv").values()
    moved = [row._replace(reference_chosen_logps=row.reference_chosen_logps - 100.0) for row in found]
    write_csv(tmp_path / "moved.csv", moved)
    train(job(tmp_path / "b", tiny_folder, DPO(beta=0.02), pairs(), tmp_path / "moved.csv"))
    assert losses(tmp_path / "b")[0] == pytest.approx(math.log1p(math.exp(-2.0)), abs=1e-5)


def test_a_file_of_all_pairs_serves_a_subset_of_them(tmp_path, tiny_folder):
    subset = SelectionConfig(name="random", budget=3)
    train(job(tmp_path / "all", tiny_folder, DPO(), pairs()))
    train(job(tmp_path / "a", tiny_folder, DPO(), pairs(), selection=subset))
    file = tmp_path / "all" / "reference_logps.csv"
    train(job(tmp_path / "b", tiny_folder, DPO(), pairs(), file, selection=subset))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=1e-5)
    assert len(read_csv(tmp_path / "b" / "reference_logps.csv")) == 3


def test_a_pair_goes_by_the_full_id_of_its_data(tmp_path, tiny_folder):
    rows = pairs(full_id=lambda i: i + 100)
    train(job(tmp_path / "a", tiny_folder, DPO(), rows))
    file = tmp_path / "a" / "reference_logps.csv"
    assert [row.full_id for row in read_csv(file).values()] == ["100", "101", "102", "103", "104", "105", "106"]
    train(job(tmp_path / "b", tiny_folder, DPO(), rows[::-1], file))
    with pytest.raises(DataError, match=r"reference_logps\.csv:2: full_id=100 is of no pair of inputs\.pairs"):
        train(job(tmp_path / "c", tiny_folder, DPO(), pairs(), file))


@pytest.mark.parametrize("full_id", [lambda i: i // 2, lambda i: "" if i else "a"], ids=["of two pairs", "missing"])
def test_an_ambiguous_full_id_names_nothing(full_id, caplog):
    names = PairNames()
    rows = list(names.seen(pairs(full_id=full_id)))
    assert names.by_row == [pair_id(pair) for pair in rows]
    assert "meta.full_id is missing in some pairs, or is that of two" in caplog.text


def test_a_full_id_may_come_with_its_pair_twice(caplog):
    names = PairNames()
    list(names.seen(pairs(3, full_id=lambda i: f"uf-{i}") * 2))
    assert names.by_row == ["uf-0", "uf-1", "uf-2"] * 2
    assert caplog.text == ""


def test_other_truncation_is_refused_with_file_and_line(tmp_path, tiny_folder):
    train(job(tmp_path / "a", tiny_folder, DPO(), pairs()))
    shorter = replace(TRAINING, max_tokens=40, max_prompt_tokens=30)
    file = tmp_path / "a" / "reference_logps.csv"
    with pytest.raises(DataError, match=r"reference_logps\.csv:\d: full_id=\w+ was summed over .*training\.max_tokens"):
        train(job(tmp_path / "b", tiny_folder, DPO(), pairs(), file, training=shorter))


def published(folder: Path) -> Path:
    with artifacts.draft(folder, Plan("pair", Pair.schema, uses={})) as draft:
        draft.commit_stream(pairs())
    return folder


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"loss": SimPO()}, r"inputs\.reference_logps=\S+ would be ignored, as loss=simpo reads no reference; drop it"),
        ({"loss": COMPONENTS["loss"]["ld_dpo"]()}, "loss=ld_dpo reads the reference token by token, and .* holds sums"),
        ({"loss": COMPONENTS["loss"]["tdpo"]()}, "loss=tdpo reads the reference token by token"),
        (
            {"training": replace(TRAINING, reference="cached")},
            r"training\.reference=cached would be ignored, as inputs",
        ),
        ({"training": replace(TRAINING, reference="online")}, r"training\.reference=online would be ignored"),
        ({"training": replace(TRAINING, reference="moving")}, r"training\.reference=moving would be ignored"),
        ({"reference_logps": Path("none.csv")}, r"inputs\.reference_logps=none\.csv: no such file; give a CSV"),
        (
            {"reference_logps": None, "loss": SimPO(), "training": replace(TRAINING, reference="online")},
            r"training\.reference=online would be ignored, as loss=simpo reads no reference; drop it",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_refused(tmp_path, tiny_folder, settings_, message):
    write_csv(tmp_path / "sums.csv", ROWS)
    given = {"loss": DPO(), "training": TRAINING, "reference_logps": tmp_path / "sums.csv"} | settings_
    with pytest.raises(ConfigError, match=message):
        stage.train(
            {"pairs": [published(tmp_path / "pairs")]},
            tmp_path / "checkpoint",
            model=TINY,
            policy=tiny_folder,
            reference=tiny_folder,
            selection=SelectionConfig(),
            hardware=HardwareConfig(name="cpu", device="cpu", precision="fp32"),
            seed=0,
            freeze=lambda inputs: tmp_path / "never written",
            **given,
        )


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """What `prefpipe stage=train ...` runs, on the pairs above, without the start of a process."""

    def start(*overrides: str) -> None:
        given = ("stage=train", "debug=tiny", f"paths.runs={tmp_path / 'runs'}", f"inputs.pairs={tmp_path / 'pairs'}")
        published(tmp_path / "pairs")
        (cfg,) = Checker(CONF_DIR, [CONF_DIR], "config", multirun=False).check([*given, *overrides])
        run(without_hydra(cfg))

    handlers = list(logging.getLogger("prefpipe").handlers)
    yield start
    for handler in set(logging.getLogger("prefpipe").handlers) - set(handlers):
        logging.getLogger("prefpipe").removeHandler(handler)
        handler.close()


def test_a_file_given_to_a_command_is_used_and_part_of_what_the_checkpoint_is_made_of(tmp_path, tiny_folder, command):
    """Moved by -10 nats, as above, so that no other reference could give this loss: ln(1 + e^-2) at beta = 0.2."""
    train(job(tmp_path / "a", tiny_folder, DPO(), pairs()))
    found = read_csv(tmp_path / "a" / "reference_logps.csv").values()
    file = tmp_path / "moved.csv"
    write_csv(file, [row._replace(reference_chosen_logps=row.reference_chosen_logps - 10.0) for row in found])
    command("training.max_steps=1", "loss.beta=0.2", "hardware=cpu", f"inputs.reference_logps={file}")
    checkpoint = tmp_path / "runs" / "default" / "round_0" / "checkpoint"
    assert losses(checkpoint) == [pytest.approx(math.log1p(math.exp(-2.0)), abs=1e-5)]
    uses = artifacts.manifest(checkpoint)["uses"]
    assert (uses["reference"], uses["reference_logps"]) == (None, sha256_of(file))
    assert "reference_logps.csv" in [part["name"] for part in artifacts.manifest(checkpoint)["parts"]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("inputs.reference={tiny}", "inputs.reference_logps=f.csv"),
            "reference=.* would be ignored, as .*f.csv stands",
        ),
        (("inputs.reference=none",), "inputs.reference=none: no such folder; give a folder with a model"),
        (
            ("inputs.checkpoint={adapter}",),
            "inputs.checkpoint=.*adapter is an adapter without its model; give the chec",
        ),
        (("inputs.reference={adapter}",), "inputs.reference=.*adapter is an adapter without its model"),
    ],
)
def test_inputs_that_are_no_models_or_would_be_ignored_are_refused(tmp_path, tiny_folder, command, given, message):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    places = {"tiny": tiny_folder, "adapter": tmp_path / "adapter"}
    with pytest.raises(ConfigError, match=message):
        command(*(text.format(**places) for text in given))
