"""Token previews against what the loss reads: the batch's own tensors, and what `encode` cut."""

import io
import re
from collections import Counter
from pathlib import Path

import orjson
import pytest
from tokenizer_makes import MAKES

from prefpipe import models
from prefpipe.artifacts import Plan, draft
from prefpipe.cli import main
from prefpipe.errors import ConfigError, DataError
from prefpipe.losses import DPO, SFT, BradleyTerry
from prefpipe.records import Demonstration, Pair, Split, prompt_id
from prefpipe.report.preview import STYLES, is_coloured, token_texts
from prefpipe.settings import ModelConfig, SelectionConfig, TrainingConfig
from prefpipe.stages import preview as stage
from prefpipe.training.batches import Example, collate, encode, encode_row
from prefpipe.training.views import sides_of, stretches

TINY = ModelConfig(name="tiny", path="builtin:tiny")
LONG = {"max_tokens": 4096, "max_prompt_tokens": 2048}
SHORT = {"max_tokens": 30, "max_prompt_tokens": 14}


def pair(
    number: int, chosen: str = "yes, it is", rejected: str = "no", question: str = "how much is it", **fields
) -> Pair:
    messages = [{"role": "user", "content": f"{question} {number}"}]
    return Pair(
        prompt_id=prompt_id(messages), messages=messages, source="some", chosen=chosen, rejected=rejected, **fields
    )


def conversation(turns: int) -> Demonstration:
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": f"question {turn}"},
            {"role": "assistant", "content": f"answer {turn}"},
        ]
    messages.append({"role": "user", "content": "and now"})
    return Demonstration(prompt_id=prompt_id(messages), messages=messages, source="some", text="the end")


PAIRS = [pair(0), pair(0, "another right one", "yes, it is"), pair(1, question="the price of a very long thing " * 2)]


def seen(rows, template, batching, loss=None, **training):
    """(batch, examples before truncation, sides) of some rows in one batch."""
    loss, settings = loss or DPO(), TrainingConfig(**{**LONG, **training})
    fitted = [
        one
        for row, each in enumerate(rows)
        for one in encode_row(each, row, template, settings, pairwise=loss.pairwise, all_turns=loss.all_turns)
        if one.example
    ]
    batch = collate([one.example for one in fitted], batching, pairwise=loss.pairwise)
    sides = sides_of(
        batch, fitted, special=frozenset(), keep_first=template.bos is not None, of_rewards=loss.of_rewards
    )
    return batch, fitted, sides


def read_by_the_loss(batch, sequence: int) -> list[int]:
    """A plain loop over the targets of one completion."""
    return [int(t) for t, s in zip(batch.targets, batch.sequences, strict=True) if int(s) == sequence]


def in_order(sides) -> list:
    """As the batch has its completions: all chosen ones, then all rejected ones."""
    return [both[k] for k in range(len(sides[0])) for both in sides]


# ---------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("batching", ["padded", "packed", "shared"])
@pytest.mark.parametrize("lengths", [LONG, SHORT], ids=["whole", "cut"])
def test_trained_tokens_are_the_targets_of_the_batch(tiny_folder, batching, lengths):
    template = models.load_template(TINY, tiny_folder)
    batch, fitted, sides = seen(PAIRS, template, batching, **lengths)
    flat = batch.input_ids.flatten()
    for sequence, side in enumerate(in_order(sides)):
        assert [t.id for t in side.tokens if t.trained] == read_by_the_loss(batch, sequence)
        assert all(int(flat[t.place]) == t.id for t in side.tokens if not t.cut)
        example = fitted[sequence % len(fitted)].example
        assert [t.id for t in side.prompt if not t.cut] == example.prompt.tolist()
        assert [t.id for t in side.completion if not t.cut] == getattr(example, side.name).tolist()
    used = sum(place.end - place.start for place in stretches(batch, len(fitted)))
    rows = {t.place for side in in_order(sides) for t in side.tokens if not t.cut}
    assert used == len(rows)


@pytest.mark.parametrize("batching", ["padded", "shared"])
def test_what_is_shown_as_cut_is_what_encode_cut(tiny_folder, batching):
    template = models.load_template(TINY, tiny_folder)
    whole = encode(PAIRS, template, TrainingConfig(**LONG), pairwise=True)[0]
    kept = encode(PAIRS, template, TrainingConfig(**SHORT), pairwise=True)[0]
    sides = seen(PAIRS, template, batching, **SHORT)[2]
    lost = 0
    for before, after, both in zip(whole, kept, sides, strict=True):
        for side in both:
            full = [*before.prompt.tolist(), *getattr(before, side.name).tolist()]
            rest = Counter(full) - Counter([*after.prompt.tolist(), *getattr(after, side.name).tolist()])
            assert [t.id for t in side.tokens] == full  # nothing is lost, and all of it stands where it stood
            assert Counter(t.id for t in side.tokens if t.cut) == rest
            lost += side.num_cut
    assert lost > 0
    assert lost == sum(_length(b) - _length(a) for b, a in zip(whole, kept, strict=True))


def _length(example: Example) -> int:
    return 2 * len(example.prompt) + len(example.chosen) + len(example.rejected)


@pytest.mark.parametrize("batching", ["padded", "packed", "shared"])
def test_turns_of_the_user_between_answers_are_masked(tiny_folder, batching):
    template = models.load_template(TINY, tiny_folder)
    rows = [conversation(2), conversation(0)]
    batch, fitted, sides = seen(rows, template, batching, SFT(turns="all"))
    assert len(sides) == len(fitted)
    for sequence, ((side,), one) in enumerate(zip(sides, fitted, strict=True)):
        assert [t.id for t in side.tokens if t.trained] == read_by_the_loss(batch, sequence)
        marks = one.chosen.trained or [True] * len(one.chosen.completion)
        assert [t.trained for t in side.completion] == marks
        assert [t.role for t in side.completion] == ["chosen" if mark else "masked" for mark in marks]
    assert any(t.role == "masked" for t in sides[0][0].completion) == (fitted[0].chosen.trained is not None)


def test_an_encoder_decoder_shows_its_encoders_prompt_and_its_decoders_targets(t5_folder):
    template = models.load_template(ModelConfig(name="t5", path=str(t5_folder)), t5_folder)
    rows = [pair(0, "it is 3", "it is 4"), pair(1, "a", "bb")]
    batch, fitted, sides = seen(rows, template, "padded", max_tokens=24, max_prompt_tokens=12)
    for sequence, side in enumerate(in_order(sides)):
        assert [t.id for t in side.tokens if t.trained] == read_by_the_loss(batch, sequence)
        start, *_ = [t for t in side.completion if not t.cut]
        assert (start.id, start.role, start.trained) == (template.decoder_start, "masked", False)
        row = batch.encoder_ids[batch.encoder_rows[sequence]][batch.encoder_mask[batch.encoder_rows[sequence]].bool()]
        assert [t.id for t in side.prompt if not t.cut] == row.tolist()
        full = fitted[sequence % 2]
        assert [t.id for t in side.prompt] == full.chosen.prompt
        assert [t.id for t in side.completion][1:] == getattr(full, side.name).completion
    assert any(side.num_cut for side in in_order(sides))


def test_of_a_reward_model_the_last_token_is_read(tiny_folder):
    template = models.load_template(TINY, tiny_folder, rewards=True)
    batch, _, sides = seen(PAIRS, template, "shared", BradleyTerry())
    for sequence, side in enumerate(in_order(sides)):
        assert [t.place for t in side.tokens if t.trained] == [int(batch.ends[sequence])]


@pytest.mark.parametrize("make", MAKES)
def test_texts_of_tokens_add_up_to_the_text(make):
    tokenizer = MAKES[make]()
    ids = tokenizer("Tom has 2 + 24 = <<2+24=26>>26 pens.\n", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer.decode, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_is_whole_at_its_last(tiny_folder):
    tokenizer = MAKES["byte-level"]()
    ids = tokenizer("a 四 b", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer.decode, ids)
    assert "".join(texts) == "a 四 b"
    assert texts.count("") == 2  # of three bytes


# ---------------------------------------------------------------------------------- for people


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path):
    """Publish rows and preview them; returns what goes to the terminal, and the page."""

    def made(rows, loss=None, num=3, **training):
        folder = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}"
        schema = rows[0].schema
        with draft(folder, Plan("test", schema, uses={}, parents={})) as out:
            out.commit_stream(rows)
        page = tmp_path / "preview.html"
        text = stage.preview(
            {"pairs" if schema == "pair/1" else "demonstrations": [folder]},
            page,
            model=TINY,
            policy=tiny_folder,
            loss=loss or DPO(),
            training=TrainingConfig(**{**LONG, **training}),
            selection=SelectionConfig(),
            num_examples=num,
        )
        return text, page.read_text(encoding="utf-8")

    return made


HOSTILE = "a\x1b]8;;http://x\x07link\x1b[2J\x9b31m \u202e\u200b<script>alert(1)</script>\r end"


def test_nothing_of_a_text_is_executed(run):
    text, page = run([pair(0, HOSTILE, "no", question=HOSTILE)])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u200b]", text)
    assert "⟦U+001B⟧]8;;http://x⟦U+0007⟧" in text
    assert "<script" not in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u200b]", page)
    assert "⟦U+0007⟧" in page


def test_colours_are_ours_alone_and_mark_every_role(run, monkeypatch):
    monkeypatch.setattr("prefpipe.report.preview.is_coloured", lambda _: True)
    text, _ = run([pair(0, HOSTILE, "no")], **SHORT)
    codes = set(re.findall(r"\x1b\[([0-9;]+)m", text))
    assert {STYLES[name] for name in ("prompt", "chosen", "rejected", "cut")} <= codes <= {*STYLES.values(), "0"}
    assert "\x1b" not in re.sub(r"\x1b\[[0-9;]+m", "", text)
    for line in text.splitlines():  # none reaches over the end of its line
        assert len(re.findall(r"\x1b\[0m", line)) == len(re.findall(r"\x1b\[(?!0m)", line))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_where_they_are_wanted():
    assert is_coloured(Terminal(), {})
    assert is_coloured(Terminal(), {"NO_COLOR": ""})  # no-color.org: when not empty
    assert not is_coloured(Terminal(), {"NO_COLOR": "1"})
    assert not is_coloured(Terminal(), {"TERM": "dumb"})
    assert not is_coloured(io.StringIO(), {})


def test_counts_and_layout_are_said(run, tiny_folder):
    text, page = run(PAIRS)
    template = models.load_template(TINY, tiny_folder)
    batch, _, sides = seen(PAIRS, template, "shared")
    for side in sides[0]:
        line = f"{side.name}, {len(side.completion)} tokens, {side.num_trained} trained, 0 cut away"
        assert line in text
    assert f"shared, 1 × {batch.input_ids.shape[1]} tokens, 0 of padding" in text
    assert text.count("; sees the prompt at ") == page.count("; sees the prompt at ") == 3
    classes = re.findall(r'<b class="(\w+)( trained)?" title', page)
    shown = [t for both in sides for k, side in enumerate(both) for t in (side.tokens if k == 0 else side.completion)]
    assert len(classes) == len(shown)
    assert sum(bool(trained) for _, trained in classes) == sum(t.trained for t in shown)


def test_without_colour_what_is_cut_stands_in_marks(run):
    text, page = run([PAIRS[2]], **SHORT)
    assert re.search(r"\[-.+-\]", text)
    assert 'class="cut"' in page


def test_rows_that_training_leaves_out_are_said(run):
    rows = [pair(0, split=Split.heldout), pair(1, "<|im_end|>"), *(pair(i) for i in range(2, 9))]
    text, _ = run(rows, num=2)
    assert "2 examples from 9 rows" in text
    assert "Left out on the way: 1 other_split" in text
    with pytest.raises(DataError, match=r"no row is left to train on, of 1: \{'other_split': 1\}"):
        run(rows[:1])


def test_the_command_takes_what_training_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFPIPE_RUNS", str(tmp_path / "runs"))
    rows = [{"prompt": f"What is {i} + 1?", "chosen": f"#### {i + 1}", "rejected": f"#### {i}"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    main(["stage=prepare", "data_mixer=files", "data_mixer.spec=pairs.jsonl:1.0"])
    capsys.readouterr()
    main(["stage=preview", "loss=simpo", "preview.num_examples=2", "training.batching=packed"])
    out = capsys.readouterr().out
    assert "example 2: row" in out
    assert "example 3" not in out
    assert "simpo" in out
    assert "packed, 1 × " in out
    page = tmp_path / "runs" / "default" / "round_0" / "preview.html"
    assert out.rstrip().endswith(str(page))
    assert page.is_file()
    assert not (page.parent / "checkpoint").exists()
    with pytest.raises(SystemExit):
        main(["stage=preview", "preview.num_examples=0"])
    assert "preview.num_examples=0 must be between 1 and 100" in capsys.readouterr().err


def test_an_encoder_decoder_is_refused_what_it_cannot_do(t5_folder):
    template = models.load_template(ModelConfig(name="t5", path=str(t5_folder)), t5_folder)
    with pytest.raises(ConfigError, match=r"training\.batching=shared"):
        stage._batching(TrainingConfig(batching="shared"), template)
