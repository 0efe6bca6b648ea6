"""B31 to B37: bugs of other programs in templates, rows and caches of them. README.md lists them all."""

import shutil
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from prefpipe import artifacts, models
from prefpipe.prompts import ChatTemplate, TemplateError
from prefpipe.records import Pair, prompt_id
from prefpipe.settings import DataMixerConfig, ModelConfig, SourceConfig, TrainingConfig
from prefpipe.sources.turns import messages
from prefpipe.stages.prepare import prepare
from prefpipe.training.batches import encode

THINKS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and not loop.last and '</t>' in m['content'] %}{{ m['content'].split('</t>')[1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Thoughts stay in the last turn only, as Qwen 3 and DeepSeek have it."""

THINKS_UNTIL_ANSWERED = THINKS.replace("not loop.last", "loop.index < messages | length - 1")
"""Thoughts stay until an answer follows, so that the same prompt is another one then."""

OTHER_END = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|system|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Turns end in a token that is not the tokenizer's eos, as Gemma's do; here <|system|> stands for <end_of_turn>."""


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def loaded(folder: Path, template: str | None = None) -> tuple[PreTrainedTokenizerBase, ChatTemplate]:
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = models.load_tokenizer(ModelConfig(name="m", path=str(folder)), folder)
    return tokenizer, ChatTemplate(tokenizer, models.stop_token_ids(tokenizer, folder))


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def set_stops(folder: Path, ids: list[int]) -> None:
    file = folder / "generation_config.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {"eos_token_id": ids}))


@pytest.mark.parametrize("place", ["question", "answer"])
def test_b31_a_text_that_brings_its_own_bos_is_refused_and_counted(folder: Path, place: str) -> None:
    tokenizer, template = loaded(folder)
    texts = {"question": "Hi", "answer": "yes"} | {place: f"{tokenizer.bos_token}Hello"}
    rows = [
        Pair(prompt_id=prompt_id(talk(question)), messages=talk(question), source="t", chosen=answer, rejected="no")
        for question, answer in (("Hi", "yes"), (texts["question"], texts["answer"]))
    ]
    (kept,), counts = encode(rows, template, TrainingConfig(), pairwise=True)
    assert counts["special_token"] == 1
    assert [*kept.prompt.tolist(), *kept.chosen.tolist()].count(tokenizer.bos_token_id) == 1
    with pytest.raises(TemplateError, match="holds the special token"):
        template.encode(talk(texts["question"]), texts["answer"])


def test_b33_the_token_at_which_generation_stops_is_trained(folder: Path) -> None:
    """With an end of turn of its own it is the last one; eos does not follow."""
    tokenizer, _ = loaded(folder, OTHER_END)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|system|>")
    set_stops(folder, [tokenizer.eos_token_id, end_of_turn])
    _, template = loaded(folder)
    encoded = template.encode(talk("Hi"), "yes")
    assert encoded.completion == [*tokenizer("yes", add_special_tokens=False)["input_ids"], end_of_turn]
    row = Pair(prompt_id=prompt_id(talk("Hi")), messages=talk("Hi"), source="t", chosen="yes", rejected="no")
    (example,), _ = encode([row], template, TrainingConfig(), pairwise=True)
    assert example.chosen[-1] == example.rejected[-1] == end_of_turn
    assert template.decode(encoded.completion) == "yes"


def test_b33_an_end_of_turn_that_nothing_declares_is_trained_with_an_eos_behind_it(folder: Path) -> None:
    tokenizer, template = loaded(folder, OTHER_END)
    completion = template.encode(talk("Hi"), "yes").completion
    assert tokenizer.convert_tokens_to_ids("<|system|>") in completion
    assert completion[-1] == tokenizer.eos_token_id
    assert completion.count(tokenizer.eos_token_id) == 1


def test_b35_thoughts_that_leave_the_history_leave_it_in_training_as_in_generation(folder: Path) -> None:
    tokenizer, template = loaded(folder, THINKS)
    history = talk("1+1?", "<t>one, two</t>2", "2+2?")
    encoded = template.encode(history, "<t>four</t>4")
    assert encoded.prompt == template.prompt(history)
    assert "one, two" not in tokenizer.decode(encoded.prompt)
    assert template.decode(encoded.completion) == "<t>four</t>4"


def test_b35_a_template_whose_history_depends_on_the_answer_is_refused(folder: Path) -> None:
    _, template = loaded(folder, THINKS_UNTIL_ANSWERED)
    with pytest.raises(TemplateError, match="renders the prompt differently once an answer follows"):
        template.encode(talk("1+1?", "<t>one, two</t>2", "2+2?"), "<t>four</t>4")


def pairs_read(file: Path, out: Path) -> list[Pair]:
    mixer = DataMixerConfig("t", {"s": SourceConfig(str(file), heldout="none")})
    prepare(out, mixer=mixer, seed=0)
    return list(artifacts.read(out / "pairs", Pair, key="test"))


def test_b36_keys_that_arrow_fills_with_none_never_reach_a_record(tmp_path: Path) -> None:
    """The same rows as Parquet, where each message has every key of any message, and as JSON, where it has its own."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": "a", "name": "x"},
                {"role": "user", "content": "again", "weight": 1.0},
            ],
            "chosen": "good",
            "rejected": "bad",
        }
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist()[0]["prompt"][0] == {
        "role": "user",
        "content": "q0",
        "name": None,
        "weight": None,
    }
    (tmp_path / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    found = [pairs_read(tmp_path / f"rows.{kind}", tmp_path / kind) for kind in ("parquet", "jsonl")]
    assert found[0] == found[1]
    assert sorted(row.messages[0]["content"] for row in found[0]) == ["q0", "q1", "q2"]
    for row in found[0]:
        assert row.messages[1:] == talk("", "a", "again")[1:]
    again = orjson.loads(orjson.dumps(found[0]))
    assert [Pair(**row) for row in again] == found[0]


def test_b36_both_spellings_of_a_turn_in_one_arrow_column() -> None:
    """Rows of {from, value} beside rows of {role, content}: Arrow gives each turn all four keys."""
    turns = [{"role": None, "content": None, "from": "human", "value": "Hi"}]
    assert messages(turns, "prompt") == messages([{"from": "human", "value": "Hi"}], "prompt") == talk("Hi")


def test_b37_one_character_of_the_template_makes_other_artifacts(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig(name="m", path=str(folder))
    before = models.model_uses(config, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + " ")
    assert models.model_uses(config, folder) != before
    (folder / "chat_template.jinja").write_text(template)
    assert models.model_uses(config, folder) == before
    named = tmp_path / "named.jinja"
    named.write_text(template)
    own = ModelConfig(name="m", path=str(folder), chat_template=str(named))
    first = models.model_uses(own, folder)
    named.write_text(template + " ")
    assert models.model_uses(own, folder) != first != before


def test_b37_using_a_tokenizer_changes_no_identity(folder: Path) -> None:
    """Padding and truncation settle in a fast tokenizer's state, which unstable fingerprints take in."""
    config = ModelConfig(name="m", path=str(folder))
    before = models.model_uses(config, folder)
    tokenizer, template = loaded(folder)
    first = template.encode(talk("Hi"), "yes")
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert template.encode(talk("Hi"), "yes") == first
    assert models.model_uses(config, folder) == before


def test_b37_other_stop_tokens_make_other_artifacts(folder: Path) -> None:
    """They end samples and completions, so that what was made with the old ones is out of date."""
    config = ModelConfig(name="m", path=str(folder))
    before, (_, template) = models.model_uses(config, folder), loaded(folder)
    set_stops(folder, [*template.stop_ids, 3])
    assert loaded(folder)[1].stop_ids != template.stop_ids
    assert models.model_uses(config, folder) != before
