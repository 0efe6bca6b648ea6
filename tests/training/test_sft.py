"""SFT on conversations with several answers: which tokens count, alone and in a batch; from a file to a checkpoint."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from engine_oracle import CPU, gradients
from test_engine import BATCHINGS, model, prepared
from test_loop import TRAINING, job, metrics, pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefpipe import artifacts, models
from prefpipe.artifacts import Plan
from prefpipe.cli import main
from prefpipe.errors import ArtifactError, ConfigError, DataError
from prefpipe.losses import SFT
from prefpipe.prompts import ChatTemplate
from prefpipe.records import Completion, Demonstration, Pair, Prompt, completion_id, prompt_id
from prefpipe.rounds import Layout
from prefpipe.settings import ModelConfig, SelectionConfig, TrainingConfig
from prefpipe.training.batches import Example, collate, encode
from prefpipe.training.data import training_rows
from prefpipe.training.engine import Engine, choose_engine
from prefpipe.training.loop import train


def conversations(seed: int = 0, count: int = 6) -> list[Example]:
    """Random tokens and masks, each with at least one trained token; the last two have the same first prompt."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        prompt, chosen = (rng.integers(3, 61, size).astype(np.int32) for size in rng.integers(1, 14, 2))
        trained = rng.random(len(chosen)) < 0.6
        trained[[0, -1]] = True
        made.append(Example(row, prompt, chosen, chosen[:0], trained=trained if row % 3 else None))
    made[-1] = made[-1]._replace(prompt=made[-2].prompt)
    return made


def one_at_a_time(net: torch.nn.Module, rows: list[Example]) -> tuple[list[torch.Tensor], list[int]]:
    """The sum of log p of the marked tokens, from the model's own logits of one conversation, position by position."""
    sums, counts = [], []
    for example in rows:
        ids = [*example.prompt.tolist(), *example.chosen.tolist()]
        marks = [True] * len(example.chosen) if example.trained is None else example.trained.tolist()
        logps = net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        at = [len(example.prompt) + i for i, mark in enumerate(marks) if mark]
        sums.append(sum(logps[i - 1, ids[i]] for i in at))
        counts.append(len(at))
    return sums, counts


@pytest.mark.parametrize("head", ["plain", "chunked"])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_conversations_together_are_what_they_are_one_at_a_time(batching, head):
    """Log-probabilities and gradients to 1e-10 in float64."""
    net, rows = model("llama"), conversations()
    sums, counts = one_at_a_time(net, rows)
    (-sum(sums)).backward()
    slopes = gradients(net)
    net.zero_grad()
    engine = Engine(CPU, batching, head)
    found = engine.logps(prepared(net, engine), rows, pairwise=False)
    assert found.chosen_tokens.tolist() == counts == [e.num_trained for e in rows]
    assert (found.chosen - torch.stack(sums)).abs().max() < 1e-10
    SFT()(found, None).loss.sum().backward()
    for mine, theirs in zip(gradients(net), slopes, strict=True):
        assert (mine - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("batching", BATCHINGS)
def test_another_conversation_changes_nothing_bit_for_bit(batching):
    """Every token of one conversation is another one: in the questions, in the answers, and in both."""
    net, rows = model("llama"), conversations(3)
    engine = Engine(CPU, batching)
    prepared(net, engine)
    before = engine.logps(net, rows, pairwise=False).chosen
    for changed in ({"prompt"}, {"chosen"}, {"prompt", "chosen"}):
        other = rows[1]._replace(**{name: 64 - getattr(rows[1], name) for name in changed})
        after = engine.logps(net, [rows[0], other, *rows[2:]], pairwise=False).chosen
        kept = [0, *range(2, len(rows))]
        assert torch.equal(before[kept], after[kept])
        assert before[1] != after[1]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_only_marked_tokens_are_targets_and_all_of_them_are_read(batching):
    ids = [np.array(side, np.int32) for side in ([5, 6], [7, 8, 9, 10], [])]
    marked = Example(0, *ids, trained=np.array([True, False, False, True]))
    plain = Example(1, *(np.array(side, np.int32) for side in ([3], [4, 5], [])))
    batch = collate([marked, plain], batching, pairwise=False)
    assert batch.targets.tolist() == [7, 10, 4, 5]
    assert batch.sequences.tolist() == [0, 0, 1, 1]
    assert batch.offsets.tolist() == [0, 1, 0, 1]
    assert (batch.lengths.tolist(), batch.width) == ([2, 2], 2)
    assert batch.input_ids.flatten()[batch.positions].tolist() == [6, 9, 3, 4]  # each is predicted by the one before
    everything = collate([marked._replace(trained=None), plain], batching, pairwise=False)
    assert batch.input_ids.tolist() == everything.input_ids.tolist()
    assert batch.documents == everything.documents


def test_the_engine_is_chosen_by_what_is_trained():
    rows = conversations(1)
    engine = choose_engine(TrainingConfig(), model("llama"), rows, device=CPU, pairwise=False)
    assert engine.batching == "shared"


# ------------------------------------------------------------------------------------------------ encoding


def demonstration(*texts: str) -> Demonstration:
    """Question, answer, question, answer, …"""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Demonstration(prompt_id=prompt_id(turns[:-1]), messages=turns[:-1], source="t", text=texts[-1])


TALK = demonstration("Tom has 2 pens.", "2 pens.", "And now 3?", "3 pens.", "In all?", "#### 5")


@pytest.fixture(scope="module")
def template(tiny_folder):
    tokenizer = models.load_tokenizer(ModelConfig(name="tiny", path="builtin:tiny"), tiny_folder)
    return ChatTemplate(tokenizer, models.stop_token_ids(tokenizer, tiny_folder))


def trained_text(template: ChatTemplate, example: Example) -> str:
    ids = example.chosen if example.trained is None else example.chosen[example.trained]
    return template.tokenizer.decode(ids.tolist())


def test_all_turns_or_the_last_one(template):
    (whole,), counts = encode([TALK], template, TrainingConfig(), pairwise=False, all_turns=True)
    assert trained_text(template, whole) == "2 pens.<|end|>3 pens.<|end|>#### 5<|end|>"
    assert counts == {"demonstrations": 1}
    (last,), _ = encode([TALK], template, TrainingConfig(), pairwise=False)
    assert trained_text(template, last) == "#### 5<|end|>"
    assert [*whole.prompt, *whole.chosen] == [*last.prompt, *last.chosen]


def test_the_chosen_side_of_a_pair_is_the_same_conversation(template):
    pair = Pair(prompt_id="0" * 16, messages=TALK.messages, source="t", chosen=TALK.text, rejected="no")
    for all_turns in (True, False):
        (mine,), _ = encode([pair], template, TrainingConfig(), pairwise=False, all_turns=all_turns)
        (theirs,), _ = encode([TALK], template, TrainingConfig(), pairwise=False, all_turns=all_turns)
        assert trained_text(template, mine) == trained_text(template, theirs)
        assert mine.prompt.tolist() == theirs.prompt.tolist()


@pytest.mark.parametrize("room", range(8, 60, 3))
def test_a_conversation_that_is_too_long_loses_its_end_and_keeps_a_target(template, room):
    limits = TrainingConfig(max_tokens=room, max_prompt_tokens=5)
    (whole,), _ = encode([TALK], template, TrainingConfig(), pairwise=False, all_turns=True)
    (cut,), counts = encode([TALK], template, limits, pairwise=False, all_turns=True)
    assert counts["truncated"] == (len(whole.prompt) + len(whole.chosen) > room)
    assert len(cut.prompt) + len(cut.chosen) <= room
    assert cut.chosen.tolist() == whole.chosen[: len(cut.chosen)].tolist()
    assert cut.trained.tolist() == whole.trained[: len(cut.chosen)].tolist()
    assert cut.num_trained >= 1


def test_a_template_that_strips_thoughts_gives_an_example_for_each_answer(template, tiny_folder, tmp_path):
    file = tmp_path / "strips.jinja"
    content = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    file.write_text(template.tokenizer.chat_template.replace("message['content']", content))
    config = ModelConfig(name="tiny", path="builtin:tiny", chat_template=str(file))
    strips = ChatTemplate(models.load_tokenizer(config, tiny_folder), sorted(template.stop_ids))
    talk = demonstration("a", "<think>x</think>b", "c", "<think>y</think>d")
    parts, counts = encode([talk], strips, TrainingConfig(), pairwise=False, all_turns=True)
    assert counts == {"demonstrations": 1, "split_into_turns": 1}
    assert [trained_text(strips, part) for part in parts] == ["<think>x</think>b<|end|>", "<think>y</think>d<|end|>"]
    assert "<think>" not in strips.tokenizer.decode(parts[1].prompt.tolist())
    assert [part.row for part in parts] == [0, 0]
    assert len({part.pair_id for part in parts}) == 2


def test_score_differences_of_demonstrations_are_refused(template):
    selection = SelectionConfig(name="margin", apply="sampling", transform="none")
    with pytest.raises(DataError, match=r"row 0 of inputs\.demonstrations has no rejected side, and selection=margin"):
        encode([TALK], template, TrainingConfig(), pairwise=False, selection=selection)


def test_turns_is_all_or_last():
    with pytest.raises(ConfigError, match=r"loss\.turns=first must be one of all, last"):
        SFT(turns="first")
    assert (SFT().all_turns, SFT(turns="last").all_turns) == (True, False)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("turns", ["all", "last"])
def test_every_token_of_every_answer_weighs_the_same(tmp_path, tiny_folder, turns):
    """The first loss against labels made by splitting the rendered text at its role tokens."""
    rows = [TALK, demonstration("Hi", "Hello Tom."), demonstration("a", "b", "c", "Ben has 4 + 5 = <<4+5=9>>9 pens.")]
    training = replace(TRAINING, max_steps=1, global_batch_size=3, micro_batch_size=2)
    train(replace(job(tmp_path / "w", tiny_folder, SFT(turns=turns), training), pairs=rows))
    net, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    total, count = 0.0, 0
    end, assistant, user = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>", "<|user|>"])
    for row in rows:
        text = tokenizer.apply_chat_template(
            [*row.messages, {"role": "assistant", "content": row.text}], tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        speaker, labels = user, []
        for token in ids:
            labels.append(token if speaker == assistant and token not in (assistant, user) else -100)
            speaker = token if token in (assistant, user) else speaker
        if turns == "last":
            final = max(i for i, token in enumerate(ids) if token == assistant)
            labels = [-100] * final + labels[final:]
        assert sum(label == end for label in labels) == (1 if turns == "last" else text.count("<|assistant|>"))
        with torch.no_grad():
            logps = net(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logps[i - 1, label].item() for i, label in enumerate(labels) if label >= 0)
        count += sum(label >= 0 for label in labels)
    assert metrics(tmp_path / "w")[0]["train/loss"] == pytest.approx(total / count, abs=1e-4)


# ------------------------------------------------------------------------------------------------ inputs


def write(out: Path, kind: type, rows: list) -> Path:
    with artifacts.draft(out, Plan("test", kind.schema, uses={})) as draft:
        draft.commit(0, rows, rows_in=len(rows), rows_out=len(rows))
    return out


def completion(text: str, finish_reason: str = "stop") -> Completion:
    return Completion(
        prompt_id=TALK.prompt_id,
        completion_id=completion_id(TALK.prompt_id, text, 0, 0),
        messages=TALK.messages,
        source="t",
        text=text,
        finish_reason=finish_reason,
    )


def test_demonstrations_completions_and_pairs_are_read(tmp_path, caplog):
    inputs = {
        "pairs": [write(tmp_path / "p", Pair, pairs(2))],
        "demonstrations": [
            write(tmp_path / "d", Demonstration, [TALK]),
            write(tmp_path / "c", Completion, [completion("whole"), completion("cut", "length")]),
        ],
    }
    rows = list(training_rows(inputs))
    assert rows[:3] == [*pairs(2), TALK]
    assert [(row.text, row.messages) for row in rows[3:]] == [("whole", TALK.messages)]
    assert "c: 1 completions were cut at generator.max_new_tokens and are left out" in caplog.text
    with pytest.raises(
        ArtifactError, match=r"inputs\.demonstrations=.* holds pair/1, but demonstration/1, completion/1"
    ):
        list(training_rows({"demonstrations": inputs["pairs"]}))


def test_the_nearest_of_two_inputs_is_taken_and_a_tie_is_refused(tmp_path):
    at, names = Layout(tmp_path, "", 0), ["demonstrations", "pairs"]
    with pytest.raises(ArtifactError, match=r"no demonstrations in .* run stage=pair first"):
        at.nearest(names)
    given = write(tmp_path / "demonstrations", Demonstration, [TALK])
    assert at.nearest(names) == {"demonstrations": [given]}
    made = write(tmp_path / "round_0" / "pairs", Pair, pairs(1))
    assert at.nearest(names) == {"pairs": [made]}
    write(tmp_path / "round_0" / "demonstrations", Demonstration, [TALK])
    with pytest.raises(
        ArtifactError, match=r"round_0 has demonstrations and pairs; say which is meant, or both: inputs"
    ):
        at.nearest(names)


# ------------------------------------------------------------------------------------------------ the command line


def test_a_file_of_conversations_becomes_a_checkpoint(tmp_path, cli):
    """messages and ShareGPT rows in one mixture → prompts and demonstrations → SFT on all turns."""
    talks = [[f"Tom has {i} pens.", f"{i} pens.", f"He buys {i + 1}. In all?", f"#### {2 * i + 1}"] for i in range(30)]
    rows = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]}
        for talk in talks[:15]
    ]
    others = [
        {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(talk)]}
        for talk in talks[15:]
    ]
    for name, content in (("a", rows), ("b", others)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in content))
    common = ["exp_name=x", "hardware=cpu", "data_mixer=files", "data_mixer.spec='a.jsonl:1.0;b.jsonl:1.0'"]
    training = ["loss=sft", "training.max_steps=12", "training.learning_rate=3e-3", "training.global_batch_size=8"]
    cli("stage=prepare", *common)
    root = tmp_path / "runs" / "x"
    made = list(artifacts.read(root / "demonstrations", Demonstration, key="k"))
    assert sorted(row.text for row in made) == sorted(talk[-1] for talk in talks)
    assert {len(row.messages) for row in made} == {3}
    prompts = {row.prompt_id: row for row in artifacts.read(root / "prompts", Prompt, key="k")}
    assert {row.prompt_id for row in made} == set(prompts)
    assert all(prompts[row.prompt_id].answer == row.text for row in made)

    cli("stage=train", *common, *training)
    checkpoint = root / "round_0" / "checkpoint"
    losses = [row["train/loss"] for row in metrics(checkpoint)]
    assert losses[-1] < losses[0] / 2
    found = artifacts.manifest(checkpoint)
    assert found["parent_paths"] == {"demonstrations": ["../../demonstrations"]}
    assert found["uses"]["loss"] == {"name": "sft", "turns": "all"}
    kept = sum(row.split == "train" for row in made)
    assert orjson.loads((checkpoint / "data_counts.json").read_bytes()) == {
        "demonstrations": 30,
        "other_split": 30 - kept,
    }


def test_a_pairwise_loss_refuses_demonstrations(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PREFPIPE_RUNS", str(tmp_path / "runs"))
    folder = write(tmp_path / "d", Demonstration, [TALK])
    with pytest.raises(SystemExit) as left:
        main(["stage=train", "loss=dpo", f"inputs.demonstrations={folder}"])
    assert left.value.code == 2
    assert "demonstrations have no rejected side, which loss=dpo reads; train on pairs" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["stage=loop", "loss=dpo", "pairer=pseudo_label"])
    assert "pairer=pseudo_label makes demonstrations, and loss=dpo reads pairs; use loss=sft" in capfd.readouterr().err
