"""Pages to look through an artifact, read back as JSON and in a real browser."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, chromium

from prefpipe.artifacts import Plan, draft
from prefpipe.cli import main
from prefpipe.errors import ArtifactError, ConfigError
from prefpipe.records import Demonstration, EvalResult, Pair, Prompt, ScoredCompletion, prompt_id
from prefpipe.settings import BrowseConfig
from prefpipe.stages.browse import browse

HOSTILE = [
    "</script><img src=x onerror=\"document.title='owned'\">",
    "<!-- <script>document.title='owned'</script>",
    "<svg onload=document.title='owned'> &lt;b&gt; &amp;",
    "line\u2028separator\u2029 \u202eright to left\u202c null \0 bell \a escape \x1b]8;;http://x\x1b\\ lone \ud800 end",
    "]]> ${document.title='owned'} `'\" \\u003cscript>",
]


def pair(number: int, chosen: str, rejected: str, source: str = "some", **fields: object) -> Pair:
    messages = [{"role": "user", "content": f"question {number}"}]
    return Pair(
        prompt_id=prompt_id(messages), messages=messages, source=source, chosen=chosen, rejected=rejected, **fields
    )


def publish(folder: Path, schema: str, rows: list) -> Path:
    with draft(folder, Plan("test", schema, uses={"rows": len(rows)}, parents={})) as made:
        made.commit_stream(rows)
    return folder


def page(folder: Path, out: Path, seed: int = 0, **settings: int) -> Path:
    (made,) = browse({"rows": folder}, out, settings=BrowseConfig(**settings), seed=seed)
    return made


class Scripts(HTMLParser):
    """Every script of a page, with its attributes, as an HTML parser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.found.append((dict(attrs), ""))

    def handle_data(self, data):
        if self.tags[-1:] == ["script"]:
            attributes, text = self.found[-1]
            self.found[-1] = (attributes, text + data)

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")


def content(file: Path) -> tuple[dict, list[dict]]:
    """The index and the items of a page."""
    scripts = Scripts(file.read_text(encoding="utf-8")).found
    (index,) = (json.loads(text) for attributes, text in scripts if attributes.get("id") == "index")
    rows = [row for attributes, text in scripts if attributes.get("class") == "rows" for row in json.loads(text)]
    return index, rows


# ---------------------------------------------------------------------------------- the file


def test_every_row_is_there_with_its_numbers(tmp_path):
    rows = [pair(i, "a" * i, "b", chosen_score=float(i), rejected_score=0.5) for i in range(450)]
    rows.append(pair(450, "x", "y"))
    index, found = content(page(publish(tmp_path / "pairs", "pair/1", rows), tmp_path))
    assert [row["id"] for row in found] == [row.prompt_id for row in rows]
    assert [[side["text"][0] for side in row["completions"]] for row in found] == [[r.chosen, r.rejected] for r in rows]
    numbers = [dict(zip(index["columns"], item[2], strict=True)) for item in index["items"]]
    assert [n["margin"] for n in numbers] == [i - 0.5 for i in range(450)] + [None]
    assert [n["chosen minus rejected, characters"] for n in numbers] == [i - 1 for i in range(450)] + [0]
    assert index["notes"] == []


def test_texts_are_cut_with_a_note_and_counted(tmp_path):
    file = page(publish(tmp_path / "pairs", "pair/1", [pair(0, "a" * 300, "b")]), tmp_path, max_characters=100)
    index, (row,) = content(file)
    assert row["completions"][0]["text"] == ["a" * 100, 200]
    assert index["notes"][0].startswith("1 texts are cut to browse.max_characters=100")


def test_hostile_texts_make_no_tag(tmp_path):
    rows = [pair(i, text, text[::-1], source=f"{text[:9]}{i}".replace("\ud800", "")) for i, text in enumerate(HOSTILE)]
    rows = [row for row in rows if "\ud800" not in row.chosen]  # JSON lines cannot hold a lone surrogate
    file = page(publish(tmp_path / "pairs", "pair/1", rows), tmp_path)
    html = file.read_text(encoding="utf-8")
    scripts = Scripts(html)
    assert [attributes.get("type", "ours") for attributes, _ in scripts.found] == ["application/json"] * 2 + ["ours"]
    assert not {"img", "svg"} & set(scripts.tags)
    assert "<!--" not in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u2028\u2029\u202e]", html)
    assert "src=" not in re.sub(r'"[^"]*"', "", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))


def test_completions_of_a_prompt_stand_together_wherever_they_are(tmp_path):
    def scored(number: int, sample: int) -> ScoredCompletion:
        messages = [{"role": "user", "content": f"question {number}"}]
        return ScoredCompletion(
            prompt_id=prompt_id(messages), completion_id=f"{number}-{sample}", messages=messages, source="some",
            text=f"answer {sample}", scores={"length": float(sample), "odd": float(sample % 2)},
        )  # fmt: skip

    rows = [scored(number, sample) for sample in range(3) for number in range(4)]
    index, found = content(page(publish(tmp_path / "scored", "scored/1", rows), tmp_path))
    assert len(found) == 4
    assert all([side["text"][0] for side in row["completions"]] == [f"answer {i}" for i in range(3)] for row in found)
    assert dict(zip(index["columns"], index["items"][0][2], strict=True)) == {
        "length, highest": 2, "length, lowest": 0, "length, spread": 2, "odd, highest": 1, "odd, lowest": 0,
        "odd, spread": 1, "completions": 3, "longest, characters": 8,
    }  # fmt: skip


def test_more_rows_than_allowed_become_a_seeded_sample_of_whole_prompts(tmp_path):
    rows = [pair(i % 100, f"a{i}", "b") for i in range(300)]
    folder = publish(tmp_path / "pairs", "pair/1", rows)
    index, found = content(page(folder, tmp_path / "0", max_rows=50))
    again = content(page(folder, tmp_path / "1", max_rows=50))[1]
    other = content(page(folder, tmp_path / "2", max_rows=50, seed=1))[1]
    assert found == again != other
    kept = {row["id"] for row in found}
    assert len(found) == 48 == 3 * len(kept)  # 17 prompts would be 51 rows
    assert [row["row"] for row in found] == [i for i, row in enumerate(rows) if row.prompt_id in kept]
    assert index["notes"][0].startswith("A sample: 48 of 300 rows, all those of 16 prompts drawn with seed 0")
    with pytest.raises(ConfigError, match=r"browse\.max_rows=2 is less than one prompt"):
        page(folder, tmp_path / "3", max_rows=2)


def test_a_page_that_would_be_too_large_is_refused_and_not_left(tmp_path):
    rows = [pair(i, "a" * 2000, "b" * 2000) for i in range(600)]
    folder = publish(tmp_path / "pairs", "pair/1", rows)
    with pytest.raises(ConfigError, match=r"browse\.max_megabytes=1: .* first 400 pairs fill it"):
        page(folder, tmp_path / "out", max_megabytes=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_has_no_rows_of_text_is_refused(tmp_path):
    folder = publish(tmp_path / "evals", "eval/1", [EvalResult(task="t", metric="m", value=1, low=0, high=1, n=3)])
    with pytest.raises(ArtifactError, match=r"holds eval/1, and stage=browse shows rows of prompts"):
        page(folder, tmp_path)


def test_every_artifact_of_a_run_gets_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFPIPE_RUNS", str(tmp_path / "runs"))
    root, messages = tmp_path / "runs" / "mine", [{"role": "user", "content": "hello"}]
    known = {"prompt_id": prompt_id(messages), "messages": messages, "source": "some"}
    publish(root / "prompts", "prompt/1", [Prompt(**known)])
    publish(root / "round_0" / "pairs", "pair/1", [pair(0, "a", "b")])
    elsewhere = publish(tmp_path / "other", "demonstration/1", [Demonstration(**known, text="hi")])
    main(["stage=browse", "exp_name=mine"])
    assert {file.name for file in (root / "browse").iterdir()} == {"prompts.html", "round_0-pairs.html"}
    main(["stage=browse", "exp_name=mine", f"inputs.demonstrations={elsewhere}"])
    assert re.search(r"browse/other-[0-9a-f]{8}\.html\n$", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["stage=browse", "exp_name=nothing"])
    assert "no rows to look at" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_hostile_texts_stay_texts(browser, tmp_path):
    rows = [pair(i, text, f"{text} other") for i, text in enumerate(HOSTILE) if "\ud800" not in text]
    file = page(publish(tmp_path / "pairs", "pair/1", rows), tmp_path)
    browser.logged.clear()
    browser.requests.clear()
    browser.open(file)
    assert browser.run("document.title") == "rows · prefpipe"
    assert browser.texts(".side.chosen .text") == [row.chosen for row in rows]
    assert browser.run("document.querySelectorAll('img, svg, iframe, a').length") == 0
    assert [url for url in browser.requests if url != "about:blank"] == [file.as_uri()]
    assert browser.logged == []
    # Even a slip of ours could not make markup of a text: the page's policy refuses it.
    refused = "(() => { try { document.body.innerHTML = '<b>'; return false } catch (e) { return true } })()"
    assert browser.run(refused) is True


def test_hidden_characters_are_shown_as_marks(browser, tmp_path):
    file = page(publish(tmp_path / "pairs", "pair/1", [pair(0, "a\0b\u202ec\u2028d\x1be", "f")]), tmp_path)
    browser.open(file)
    assert browser.texts(".side.chosen .hidden") == ["⟦U+0000⟧", "⟦U+202E⟧", "⟦U+2028⟧", "⟦U+001B⟧"]


def test_filter_sort_and_page(browser, tmp_path):
    rows = [
        pair(i, f"answer {i}", "no", source="ab"[i % 2], chosen_score=float(i * 7 % 90), rejected_score=1.0)
        for i in range(90)
    ]
    file = page(publish(tmp_path / "pairs", "pair/1", rows), tmp_path)
    browser.open(file)

    def shown() -> list[str]:
        return browser.texts(".side.chosen .text")

    assert shown() == [row.chosen for row in rows[:20]]
    browser.run("document.getElementById('forward').click()")
    assert shown() == [row.chosen for row in rows[20:40]]
    browser.set(search="ANSWER 7")
    assert shown() == [row.chosen for row in rows if row.chosen.startswith("answer 7")]
    browser.set(search="", sort="0", direction="down")  # by margin
    best = sorted(rows, key=lambda row: -row.chosen_score)
    assert shown() == [row.chosen for row in best[:20]]
    browser.set(source="1", low="10", high="50")
    kept = [row for row in best if row.source == "b" and 11 <= row.chosen_score <= 51]
    assert shown() == [row.chosen for row in kept[:20]]
    assert browser.texts("#status") == [f"1–20 of {len(kept)}, of 90 pairs"]
    address = browser.run("location.hash")
    browser.open(file, address)
    assert shown() == [row.chosen for row in kept[:20]]
    browser.set(search="nowhere")
    assert browser.texts("#status") == ["none of 90 pairs"]


def test_words_that_differ_are_set_off(browser, tmp_path):
    rows = [pair(0, "the red cat sat down", "the blue cat sat quite down"), pair(1, "我喜欢猫", "我喜欢狗")]
    browser.open(page(publish(tmp_path / "pairs", "pair/1", rows), tmp_path))
    assert browser.texts(".side.chosen ins") == ["red", "猫"]
    assert [text.strip() for text in browser.texts(".side.rejected ins")] == ["blue", "quite", "狗"]
    assert browser.texts(".side.rejected .text") == [row.rejected for row in rows]
    browser.run("document.getElementById('differences').click()")
    assert browser.texts("ins") == []


def test_fifty_thousand_rows_respond_and_the_page_stays_small(browser, tmp_path):
    rows = (
        pair(i, f"answer {i} " * 10, f"other {i} " * 10, chosen_score=float(i), rejected_score=0.0)
        for i in range(50_000)
    )
    file = page(publish(tmp_path / "pairs", "pair/1", list(rows)), tmp_path)
    assert file.stat().st_size < 50e6
    browser.open(file)
    size = "document.querySelectorAll('body *').length"
    assert browser.run(size) < 2000  # 250 blocks of rows among them
    assert browser.texts("#status") == ["1–20 of 50,000 pairs"]
    browser.set(search="answer 49999 ")
    assert browser.texts("#status") == ["1–1 of 1, of 50,000 pairs"]
    browser.set(search="", sort="0", direction="down")
    assert browser.texts(".side.chosen .text")[0] == "answer 49999 " * 10
    browser.run("(() => { const page = document.getElementById('page'); page.value = 2500; "
                "page.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert browser.texts(".side.chosen .text")[-1] == "answer 0 " * 10
    assert browser.run(size) < 2000


def test_many_completions_of_a_prompt_come_in_portions(browser, tmp_path):
    messages = [{"role": "user", "content": "go"}]
    rows = [
        ScoredCompletion(
            prompt_id=prompt_id(messages), completion_id=str(i), messages=messages, source="some", text=f"text {i}",
            scores={"length": float(i)},
        )
        for i in range(30)
    ]  # fmt: skip
    browser.open(page(publish(tmp_path / "scored", "scored/1", rows), tmp_path))
    assert browser.texts(".side .text") == [f"text {i}" for i in range(12)]
    for _ in range(2):
        browser.run("document.querySelector('.sides > .more').click()")
    assert browser.texts(".side .text") == [f"text {i}" for i in range(30)]
