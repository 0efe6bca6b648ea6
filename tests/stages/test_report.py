"""Reports of real small runs, read back with a parser: inert, complete, true to the artifacts, repeatable."""

import base64
import re
import shutil
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest
from report_runs import HOSTILE, build_run, publish, write_loop

from prefpipe.artifacts import digest, manifest
from prefpipe.errors import ArtifactError
from prefpipe.files import write_json
from prefpipe.records import EvalResult, Pair
from prefpipe.report import streams
from prefpipe.report.text import number, outline, pieces, redact, visible
from prefpipe.stages.report import report

SECTIONS = ["summary", "warnings", "results", "training", "completions", "pairs", "rows", "cost", "provenance"]
VOID = {"meta", "img", "br", "source"}


class Page(HTMLParser):
    """Elements with their attributes, text by section, and table rows by section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.text[self.section] = self.text.get(self.section, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[self.section][-1][-1] += data

    def warnings(self) -> str:
        return self.text["warnings"]


def page_of(run: Path) -> Page:
    out = run.parent / f"{run.name}.html"
    report(run, out=out)
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    run = build_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=True, longer=4)
    write_loop(run, [1.5, 2.5, 60.0])
    return run


@pytest.fixture(scope="module")
def page(hostile):
    return page_of(hostile)


def test_every_section_is_there(page):
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    links = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert links <= set(SECTIONS)


def test_the_policy_forbids_everything_but_styles_and_embedded_images(page):
    metas = [attrs for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs]
    assert metas == [
        {
            "http-equiv": "Content-Security-Policy",
            "content": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        }
    ]


def test_nothing_runs_and_nothing_is_loaded(page):
    allowed = (
        "html head meta title style body header main footer nav section article h1 h2 h3 p div span b br a ul li "
        "table thead tbody tr th td figure figcaption picture source img details summary dl dt dd pre"
    )
    attributes = "charset http-equiv content name lang class id href src srcset media alt style"
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    assert [tag for tag, _ in page.tags].count("style") == 1
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), attrs
        assert set(attrs) <= set(attributes.split())
        for name in ("src", "srcset"):
            assert attrs.get(name, "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
        assert attrs.get("href", "#").startswith("#"), (tag, attrs)
        if "style" in attrs:
            assert re.fullmatch(r"width: [\d.]+%", attrs["style"])


def test_figures_are_inert_too(page):
    images = [attrs[name] for _, attrs in page.tags for name in ("src", "srcset") if name in attrs]
    assert len(images) >= 2 * 11  # 7 training curves, 2 metrics, lengths and margins; for light and for dark pages
    for image in images:
        svg = base64.b64decode(image.partition(",")[2]).decode()
        assert "<script" not in svg.lower()
        assert not re.search(r"\son\w+=", svg)
        assert not re.search(r"href=\"(?!#)", svg)


def test_hostile_text_is_shown_as_text(page):
    for text in HOSTILE[:3]:
        assert text in page.text["pairs"] + page.text["completions"], text
    assert "<script>alert(1)</script>" not in page.html
    assert "49" not in [cell for row in page.rows["rows"] for cell in row]
    assert "<script>alert(1)</script> 2" in page.rows["rows"][5][5]


def test_no_character_hides_or_reorders_text(page):
    for character in set(page.html) - {"\n"}:
        assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), repr(character)
    assert "⟦U+202E⟧txt.exe⟦U+2066⟧" in page.text["pairs"]
    assert "⟦U+001B⟧[31mred" in page.text["pairs"]


def test_results_are_the_numbers_of_the_artifacts(page, hostile):
    header, accuracy, maj = page.rows["results"]
    assert header == ["task", "metric", "before", "round 0", "round 1", "change", "n"]
    lines = (hostile / "round_1/evals/part-00000.jsonl").read_bytes().splitlines()
    found = EvalResult(**orjson.loads(lines[0]))
    assert accuracy[4] == f"{found.value:.3f} {found.low:.3f} – {found.high:.3f}"
    assert (accuracy[2], accuracy[6]) == ("0.300 0.181 – 0.454", "40")
    assert accuracy[5].startswith("+0.450paired +0.")
    assert maj[:2] == ["maj_at_k", "maj@4"]
    assert "0.300 → 0.750" in page.text["summary"]


def test_the_paired_change_has_its_own_interval(page):
    """18 of 40 prompts improve, none worsens: 0.45; the interval excludes 0, so there is no warning about noise."""
    assert "18 improved, 0 worsened, 12 right both times, 10 wrong both times" in page.text["completions"]
    low, high = re.search(r"paired 95 % \+(0\.\d+) – \+(0\.\d+)", page.text["summary"]).groups()
    assert 0.2 < float(low) < 0.45 < float(high) < 0.7
    assert "within noise" not in page.warnings()


def test_rows_are_accounted_for(page, hostile):
    rows = {row[0]: row for row in page.rows["rows"]}
    assert rows["prompts"] == ["prompts", "75", "70", "93.3 %", "70", "duplicate 3", "not_json 2"]
    counts = manifest(hostile / "round_1/pairs")["counts"]
    assert rows["round_1/pairs"][1:3] == [str(counts["rows_in"]), str(counts["rows_out"])] == ["30", "19"]


def test_pairs_and_cost(page):
    header, first, second = page.rows["pairs"]
    assert header[:2] == ["round", "pairs"]
    assert (first[1], second[1]) == ("20", "19")
    assert ["generate", "0", "1.5 s"] in page.rows["cost"]
    assert ["together", "", "1 min 04 s"] in page.rows["cost"]


def test_provenance_names_digests_settings_and_commands(page, hostile):
    text = page.text["provenance"]
    assert digest(hostile / "round_1/checkpoint") in text
    assert "loss:\n  beta: 0.1\n  name: dpo" in text or "loss:\n  name: dpo\n  beta: 0.1" in text
    assert Path(sys.argv[0]).name in text  # the command that made the artifacts


def test_warnings_say_what_may_mislead(page):
    """Chosen log-probabilities fall by 1 nat a step while the loss falls; chosen texts are four times as long."""
    assert "Round 0: the log-probability of chosen completions fell from -102.5 to -118.5" in page.warnings()
    assert "Round 1: chosen completions are longer" in page.warnings()
    assert "Only 40 held-out prompts" in page.warnings()


def test_a_change_within_noise_is_called_so_and_healthy_curves_are_not_blamed(tmp_path):
    """One prompt more of 40: the paired interval of the difference contains 0."""
    page = page_of(build_run(tmp_path / "r", rounds=1, right=(20, 21), chosen_slope=1.0))
    assert "The change in accuracy, +0.025, is within noise: the paired 95 % interval" in page.warnings()
    assert "log-probability" not in page.warnings()
    assert "longer" not in page.warnings()


def test_samples_include_each_kind(tmp_path):
    """right[] is shuffled alike, so with 20 → 25 none worsens; swapping the rounds makes 5 worsen."""
    page = page_of(build_run(tmp_path / "r", rounds=1, right=(25, 20)))
    samples = page.text["completions"]
    kinds = re.findall(r"(improved|worsened|both wrong|both right)\s*\n", samples)
    assert {kind: kinds.count(kind) for kind in kinds} == {"worsened": 3, "both wrong": 2, "both right": 1}
    assert "Accuracy fell by 0.125" in page.warnings()


def test_the_same_artifacts_give_the_same_bytes(hostile, tmp_path):
    report(hostile, out=tmp_path / "one.html")
    report(hostile, out=tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "two.html"]


@pytest.mark.parametrize("keep", ["", "prompts", "base", "training"])
def test_what_is_not_there_yet_is_said_to_be_missing(tmp_path, keep):
    run = tmp_path / "r"
    run.mkdir()
    if keep:
        build_run(run, rounds=1 if keep == "training" else 0)
    if keep == "prompts":
        shutil.rmtree(run / "base")
    if keep == "training":
        shutil.rmtree(run / "round_0/evals")
        shutil.rmtree(run / "round_0/eval_samples")
        (run / "round_0/checkpoint").rename(run / "round_0/checkpoint.partial")
        (run / "round_0/checkpoint.partial/manifest.json").unlink()
    page = page_of(run)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    expected = {
        "": "nothing was written here",
        "prompts": "nothing was trained yet",
        "base": "nothing was trained yet",
        "training": "round_0/checkpoint: begun but never finished",
    }
    assert expected[keep] in page.warnings()
    assert ("20 steps" in page.text["training"]) == (keep == "training")
    assert ("Nothing was evaluated yet" in page.text["results"]) == (keep in ("", "prompts"))


def test_damaged_data_is_a_warning_and_the_rest_is_still_reported(tmp_path):
    run = build_run(tmp_path / "r", rounds=1)
    with (run / "round_0/pairs/part-00000.jsonl").open("a") as file:
        file.write('{"torn')
    page = page_of(run)
    assert "pairs of round 0: cannot be read" in page.warnings()
    assert "0.300 → 0.550" in page.text["summary"]


def test_values_that_are_no_numbers_are_dashes(tmp_path):
    """orjson writes NaN as null; metrics that were NaN are counted."""
    run = build_run(tmp_path / "r", rounds=1)
    uses = manifest(run / "round_0/evals")["uses"]
    shutil.rmtree(run / "round_0/evals")
    bad = EvalResult(task="accuracy", metric="accuracy", value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    publish(run / "round_0/evals", "eval/1", [bad], stage="evaluate", uses=uses)
    with (run / "round_0/checkpoint/metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "train/loss": null}\n{"step": 22, "tra')
    page = page_of(run)
    assert "0.300 → –" in page.text["summary"]
    assert "train/loss was not a finite number in 1 of 21 steps" in page.warnings()


def test_evaluations_of_other_prompts_do_not_compare(tmp_path):
    run = build_run(tmp_path / "r", rounds=1)
    found = manifest(run / "base/evals")
    found["parents"]["prompts"][0]["digest"] = "0" * 64
    write_json(run / "base/evals/manifest.json", found)
    assert "read different prompts" in page_of(run).warnings()


def test_a_sweep_shows_failures_first_then_the_best(tmp_path):
    run = build_run(tmp_path / "sweep", rounds=0)
    for seed, right in enumerate((20, 30, 25)):
        point = run / "points" / f"seed={seed}"
        build_run(point, rounds=1, right=(12, right), seed=seed)
    shutil.rmtree(run / "points/seed=2/round_0/evals")
    (run / "points/seed=<b>&").mkdir()
    page = page_of(run)
    points = [row for row in page.rows["points"] if row[0] in ("failed", "incomplete", "complete")]
    assert [(row[0], row[1].split("round_0")[0][:8]) for row in points] == [
        ("failed", "seed=<b>"),
        ("incomplete", "seed=2"),
        ("complete", "seed=1"),
        ("complete", "seed=0"),
    ]
    assert points[2][6].startswith("0.750 ")
    groups = [row for row in page.rows["points"] if row[1:2] == ["accuracy/accuracy"]]
    assert groups[0][2:] == ["3", "1", "0.300 ± 0.000", "0.625 ± 0.177"]
    assert "2 of 4 points are not complete" in page.warnings()


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="no run here"):
        report(tmp_path / "nowhere", out=tmp_path / "x.html")


# ------------------------------------------------------------------------------------------------ text


def test_every_control_and_format_character_becomes_visible():
    """All of Unicode, but tab, newline, and format characters that have a glyph of their own (number signs)."""
    with_glyph = {0x6DD, 0x8E2, 0x890, 0x891, 0x110BD, 0x110CD, *range(0x600, 0x606)}
    for code in {*range(0x110000)} - with_glyph - {0x9, 0xA}:
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert visible(f"a{chr(code)}b") == f"a⟦U+{code:04X}⟧b"


def test_ordinary_text_stays_as_it_is():
    text = "é ü 中文 עברית हिन्दी ❤️ 1 < 2 & 3\n\ttab"
    assert visible(text) == text
    assert list(pieces(text)) == [(False, text)]
    assert list(pieces("a\u200bb")) == [(False, "a"), (True, "⟦U+200B⟧"), (False, "b")]


def test_commands_lose_their_secrets_and_keep_their_settings():
    command = "prefpipe judge.api_key=sk-1 judge.api_key_env=KEY training.max_tokens=64 uri=postgresql://me:pw@host/db"
    assert redact(command) == (
        "prefpipe judge.api_key=[hidden] judge.api_key_env=KEY training.max_tokens=64 uri=postgresql://[hidden]@host/db"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (1234567, "1,234,567"),
        (12345.678, "12,345.7"),
        (2.0, "2"),
        (None, "–"),
        (float("inf"), "–"),
    ],
)
def test_numbers_have_one_shape(value, shown):
    assert number(value) == shown


def test_outline_is_readable():
    data = {"loss": {"name": "dpo", "beta": 0.1}, "task": ["a", {"k": 4}], "empty": {}, "on": True, "none": None}
    assert outline(data) == (
        "loss:\n  name: dpo\n  beta: 0.1\ntask:\n  - a\n  -\n    k: 4\nempty: {}\non: true\nnone: null\n"
    )


# ------------------------------------------------------------------------------------------------ streams


def test_histogram_is_exact_until_it_must_not_grow():
    exact, coarse = streams.Histogram(), streams.Histogram(limit=64)
    for value in range(10_000):
        exact.add(value % 100)
        coarse.add(value)
    assert exact.counts == dict.fromkeys(range(100), 100)
    assert (exact.mean, exact.quantile(0.5)) == (49.5, 49)
    assert len(coarse.counts) <= 64
    assert sum(coarse.counts.values()) == coarse.num == 10_000
    assert coarse.mean == 4999.5
    assert coarse.quantile(0.5) == pytest.approx(5000, rel=0.1)


def test_curve_averages_only_when_it_must():
    short, long = streams.Curve(limit=100), streams.Curve(limit=100)
    for step in range(1, 101):
        short.add(step, step)
    for step in range(10_000):
        long.add(step, step)
    assert short.points() == [(step, step) for step in range(1, 101)]
    assert len(long.points()) <= 100
    assert long.points()[0] == (63.5, 63.5)  # steps 0 to 127


def test_reservoir_is_uniform_and_bounded():
    """Each of 20 values is kept in 1 of 4 of 2000 samples of 5: 500 +- 19."""
    counts = [0] * 20
    for seed in range(2000):
        reservoir = streams.Reservoir[int](5, seed)
        for value in range(20):
            reservoir.add(value)
        assert len(reservoir.kept) == 5
        for value in reservoir.kept:
            counts[value] += 1
    assert max(abs(count - 500) for count in counts) < 100


def test_pairs_are_counted_in_one_pass(tmp_path):
    messages = [{"role": "user", "content": "q"}]
    rows = [
        Pair(
            prompt_id=str(i), messages=messages, source="s", chosen="x" * length, rejected="y" * 10, chosen_score=score
        )
        for i, (length, score) in enumerate([(10, None), (20, 1.0), (30, 2.0)])
    ]
    rows.append(
        Pair(
            prompt_id="t", messages=messages, source="s", chosen="z", rejected="z", chosen_score=1.0, rejected_score=1.0
        )
    )
    found = streams.read_pairs(
        [publish(tmp_path / "pairs", "pair/1", rows, stage="pair", uses={})], num_samples=2, seed=0
    )
    assert (found.num, found.ties, found.identical, found.chosen_longer) == (4, 1, 1, 2)
    assert found.chosen_lengths.mean == (10 + 20 + 30 + 1) / 4
    assert found.margins.num == 1
    assert len(found.samples) == 2
