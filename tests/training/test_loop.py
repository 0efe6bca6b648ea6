"""The training loop on the tiny model: first losses in closed form, accumulation, resume, what is saved."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefpipe.components import COMPONENTS
from prefpipe.errors import ConfigError, DataError
from prefpipe.losses import DPO, IPO, SFT, Loss, SimPO
from prefpipe.records import Pair, prompt_id
from prefpipe.settings import HardwareConfig, ModelConfig, SelectionConfig, TrainingConfig
from prefpipe.training import loop
from prefpipe.training.loop import Job, train

TRAINING = TrainingConfig(
    learning_rate=1e-3, global_batch_size=4, micro_batch_size=2, max_steps=5, max_tokens=128, max_prompt_tokens=96
)


def pairs(count: int = 7) -> list[Pair]:
    made = []
    for i in range(count):
        messages = [{"role": "user", "content": f"Tom has {i} apples and buys {i + 2} more. " * (1 + i % 3)}]
        answer = f"{i} + {i + 2} = <<{i}+{i + 2}={2 * i + 2}>>{2 * i + 2}\n#### {2 * i + 2}"
        made.append(
            Pair(
                prompt_id=prompt_id(messages),
                messages=messages,
                source="t",
                chosen=answer,
                rejected=f"#### {i}",
                chosen_score=1.0 + i,
                rejected_score=0.5,
            )
        )
    return made


def job(
    work: Path, folder: Path, loss: Loss, training: TrainingConfig = TRAINING, rows: list[Pair] | None = None
) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    return Job(
        pairs=pairs() if rows is None else rows,
        model=ModelConfig(name="tiny", path="builtin:tiny"),
        policy=folder,
        reference=folder,
        loss=loss,
        training=training,
        hardware=HardwareConfig(name="cpu", device="cpu", precision="fp32"),
        seed=0,
        work=work,
        cache=work.parent / "cache",
    )


def metrics(work: Path) -> list[dict[str, float]]:
    return [orjson.loads(line) for line in (work / "metrics.jsonl").read_bytes().splitlines()]


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "model.safetensors")


@pytest.mark.parametrize(
    ("loss", "expected"), [(DPO(beta=0.3), math.log(2)), (IPO(beta=0.2), 1 / (4 * 0.2**2))], ids=["dpo", "ipo"]
)
def test_first_loss_in_closed_form_and_it_falls(tmp_path, tiny_folder, loss, expected):
    train(job(tmp_path, tiny_folder, loss, replace(TRAINING, max_steps=12)))
    losses = [row["train/loss"] for row in metrics(tmp_path)]
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]


def test_simpo_starts_where_an_independent_computation_says(tmp_path, tiny_folder):
    """Mean log-probabilities from transformers' own loss (labels = completion), one completion at a time."""
    rows = pairs(4)
    train(job(tmp_path, tiny_folder, SimPO(), rows=rows))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)

    def mean_logp(pair: Pair, completion: str) -> float:
        turns = [*pair.messages, {"role": "assistant", "content": completion}]
        prompt = tokenizer.apply_chat_template(pair.messages, add_generation_prompt=True, tokenize=False)
        full = tokenizer.apply_chat_template(turns, tokenize=False)
        length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(full, add_special_tokens=False)["input_ids"]
        ids = ids[: ids.index(tokenizer.eos_token_id, length) + 1]
        labels = torch.tensor([[-100] * length + ids[length:]])
        with torch.no_grad():
            return -model(torch.tensor([ids]), labels=labels).loss.item()

    margins = [2.0 * (mean_logp(p, p.chosen) - mean_logp(p, p.rejected)) - 1.0 for p in rows]
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)
    assert metrics(tmp_path)[0]["train/loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", sorted(name for name, loss in COMPONENTS["loss"].items() if not loss.batch_wise))
def test_accumulation_does_not_change_the_result(tmp_path, tiny_folder, name):
    """One batch of 4 and four of 1 (trl#2615, transformers#34191); the last step of the epoch is a smaller batch."""
    runs = {}
    for micro in (4, 1):
        # Not Adam: its first updates are the sign of the gradient, so rounding alone could turn one around.
        training = replace(
            TRAINING, micro_batch_size=micro, max_steps=None, num_epochs=1.0, optimizer="sgd", learning_rate=1e-2
        )
        train(job(tmp_path / str(micro), tiny_folder, COMPONENTS["loss"][name](), training))
        runs[micro] = metrics(tmp_path / str(micro))
    assert len(runs[4]) == 2
    # Before the first update policy and reference are one model, and which reward is larger is rounding.
    runs[4][0].pop("train/rewards/accuracy", None)
    runs[1][0].pop("train/rewards/accuracy", None)
    for whole, cut in zip(runs[4], runs[1], strict=True):
        assert cut == pytest.approx(whole, rel=1e-3, abs=1e-5)
    for key, value in weights(tmp_path / "4").items():
        assert torch.allclose(value, weights(tmp_path / "1")[key], atol=1e-6), key


def test_every_token_of_an_sft_batch_weighs_the_same(tmp_path, tiny_folder):
    train(job(tmp_path, tiny_folder, SFT(), replace(TRAINING, max_steps=1, global_batch_size=7, micro_batch_size=7)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    total, count = 0.0, 0
    for pair in pairs():
        turns = [*pair.messages, {"role": "assistant", "content": pair.chosen}]
        prompt = tokenizer.apply_chat_template(pair.messages, add_generation_prompt=True, tokenize=False)
        length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        ids = ids[: ids.index(tokenizer.eos_token_id, length) + 1]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logps[i - 1, ids[i]].item() for i in range(length, len(ids)))
        count += len(ids) - length
    assert metrics(tmp_path)[0]["train/loss"] == pytest.approx(total / count, abs=1e-4)


class KilledError(RuntimeError):
    """Stands for SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("loss", [DPO(), IPO(), SimPO()], ids=["dpo", "ipo", "simpo"])
@pytest.mark.parametrize("kill_after", [1, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, tiny_folder, loss, kill_after, monkeypatch):
    training = replace(TRAINING, save_every_steps=1, max_steps=5)
    train(job(tmp_path / "whole", tiny_folder, loss, training))
    real = loop._save_state

    def save_then_die(work, step, *args, **kwargs):
        real(work, step, *args, **kwargs)
        if step == kill_after:
            raise KilledError

    monkeypatch.setattr(loop, "_save_state", save_then_die)
    with pytest.raises(KilledError):
        train(job(tmp_path / "killed", tiny_folder, loss, training))
    monkeypatch.undo()
    train(job(tmp_path / "killed", tiny_folder, loss, training))
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "killed")[key]), key


def test_a_row_of_several_steps_holds_their_means(tmp_path, tiny_folder, monkeypatch):
    """The last row is of fewer; weights are the same, and a killed run writes the same rows."""
    each = replace(TRAINING, max_steps=7)
    every = replace(each, log_every_steps=3, save_every_steps=3)
    train(job(tmp_path / "each", tiny_folder, DPO(), each))
    train(job(tmp_path / "every", tiny_folder, DPO(), every))
    rows, found = metrics(tmp_path / "each"), metrics(tmp_path / "every")
    assert [row["step"] for row in found] == [3, 6, 7]
    for row, part in zip(found, (rows[:3], rows[3:6], rows[6:]), strict=True):
        for key in ("train/loss", "train/rewards/margin", "train/rewards/accuracy", "train/logps/chosen"):
            assert row[key] == pytest.approx(sum(step[key] for step in part) / len(part), rel=1e-9)
        for key in ("epoch", "train/learning_rate", "train/grad_norm"):
            assert row[key] == part[-1][key]
    timing = [orjson.loads(line) for line in (tmp_path / "every" / "timing.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in timing] == [3, 6, 7]
    real = loop._save_state

    def save_then_die(*args):
        real(*args)
        raise KilledError

    monkeypatch.setattr(loop, "_save_state", save_then_die)
    with pytest.raises(KilledError):
        train(job(tmp_path / "killed", tiny_folder, DPO(), every))
    monkeypatch.undo()
    train(job(tmp_path / "killed", tiny_folder, DPO(), every))
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "every" / "metrics.jsonl").read_bytes()
    for folder in ("every", "killed"):
        for key, value in weights(tmp_path / "each").items():
            assert torch.equal(value, weights(tmp_path / folder)[key]), key


def test_a_loss_of_several_steps_that_is_not_finite_stops_with_the_rows(tmp_path, tiny_folder):
    training = replace(TRAINING, learning_rate=1e38, max_grad_norm=1e38, max_steps=4, log_every_steps=4)
    with pytest.raises(DataError, match=r"the loss of steps 1 to 4 is not finite for rows \[\d"):
        train(job(tmp_path, tiny_folder, IPO(), training))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("log", "save"), [(0, None), (2, 3)])
def test_states_hold_whole_rows_of_metrics(log, save):
    with pytest.raises(ConfigError, match=r"training\.log_every_steps=\d must be at least 1 and divide"):
        TrainingConfig(log_every_steps=log, save_every_steps=save)


@pytest.mark.parametrize("kind", ["online", "cached"])
def test_online_and_cached_references_are_the_same(tmp_path, tiny_folder, kind):
    train(job(tmp_path / "auto", tiny_folder, DPO()))
    train(job(tmp_path / kind, tiny_folder, DPO(), replace(TRAINING, reference=kind)))
    for mine, theirs in zip(metrics(tmp_path / kind), metrics(tmp_path / "auto"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_a_moving_reference_follows_and_survives_a_kill(tmp_path, tiny_folder, adapter, monkeypatch):
    """Of an adapter a copy moves, which no checkpoint holds."""
    training = replace(TRAINING, reference="moving", reference_alpha=1.0, reference_steps=2, save_every_steps=1)
    model = ModelConfig(name="tiny", path="builtin:tiny", adapter=adapter)

    def moving(name: str) -> Job:
        return replace(job(tmp_path / name, tiny_folder, DPO(beta=1.0), training), model=model)

    train(moving("whole"))
    losses = [row["train/loss"] for row in metrics(tmp_path / "whole")]
    # alpha = 1 replaces the reference by the policy after steps 2 and 4, so the next step starts at ln 2 again.
    assert [losses[i] == pytest.approx(math.log(2), abs=1e-5) for i in range(5)] == [True, False, True, False, True]
    real = loop._save_state

    def save_then_die(work, step, *args, **kwargs):
        real(work, step, *args, **kwargs)
        if step == 3:
            raise KilledError

    monkeypatch.setattr(loop, "_save_state", save_then_die)
    with pytest.raises(KilledError):
        train(moving("killed"))
    monkeypatch.undo()
    train(moving("killed"))
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "killed")[key]), key
    assert [file.name for file in (tmp_path / "whole").rglob("*reference*")] == []
    state = load_file(tmp_path / "whole" / "state" / "step-000004" / "model.safetensors")
    whole = sum(value.numel() for value in weights(tmp_path / "whole").values())
    assert (sum(value.numel() for value in state.values()) < whole) == (adapter != "none")


LORA = ModelConfig(name="tiny", path="builtin:tiny", adapter="lora", adapter_rank=4, adapter_alpha=8.0)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("reference", ["cached", "online"])
def test_an_adapter_starts_at_ln_2_learns_and_is_merged_at_the_end(tmp_path, tiny_folder, adapter, reference):
    training = replace(TRAINING, max_steps=8, reference=reference)
    start = job(tmp_path / "a", tiny_folder, DPO(beta=0.3), training)
    train(replace(start, model=replace(LORA, adapter=adapter)))
    losses = [row["train/loss"] for row in metrics(tmp_path / "a")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    model, base = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "a"),
        AutoModelForCausalLM.from_pretrained(tiny_folder),
    )
    moved = [n for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True) if not torch.equal(p, q)]
    assert moved
    assert all("proj" in name for name in moved)
    # A further round starts from the merged weights, with a fresh adapter, at ln 2 again (trl#495).
    train(replace(job(tmp_path / "b", tmp_path / "a", DPO(), training), model=replace(LORA, adapter=adapter)))
    assert metrics(tmp_path / "b")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_saved_adapter_is_what_was_merged(tmp_path, tiny_folder):
    from peft import PeftModel

    train(replace(job(tmp_path, tiny_folder, DPO()), model=LORA))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        apart = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(merged, apart, atol=1e-4, rtol=1e-4)


def test_tdpo_reads_the_reference_with_its_adapter_off(tmp_path, tiny_folder):
    loss = COMPONENTS["loss"]["tdpo"]()
    train(replace(job(tmp_path / "lora", tiny_folder, loss), model=LORA))
    train(job(tmp_path / "full", tiny_folder, loss))
    for folder in ("lora", "full"):
        losses = [row["train/loss"] for row in metrics(tmp_path / folder)]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
        assert losses[-1] < losses[0]


def test_adapter_targets_that_do_not_exist_are_named(tmp_path, tiny_folder):
    with pytest.raises(ConfigError, match=r"adapter_targets=\['q_prj'\].*linear layers are .*q_proj"):
        train(replace(job(tmp_path, tiny_folder, DPO()), model=replace(LORA, adapter_targets=["q_prj"])))


def test_runs_share_the_reference_whatever_the_loss(tmp_path, tiny_folder, caplog):
    caplog.set_level("INFO")
    train(job(tmp_path / "a", tiny_folder, DPO(beta=0.3)))
    train(job(tmp_path / "b", tiny_folder, IPO(), replace(TRAINING, micro_batch_size=4), pairs(9)))
    first, second = [line for line in caplog.messages if "completions are in the cache" in line]
    assert first == "reference: 0 of 14 completions are in the cache"
    assert second == "reference: 14 of 18 completions are in the cache"
    assert metrics(tmp_path / "b")[0]["train/loss"] == pytest.approx(25.0, abs=1e-3)


def test_other_weights_have_other_reference_values(tmp_path, tiny_folder):
    """A checkpoint that was overwritten in place must not meet the old one's values (peers' open bug)."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    train(job(tmp_path / "a", folder, DPO()))
    for file in (tmp_path / "a").glob("model.safetensors"):
        shutil.copy(file, folder / "model.safetensors")
    train(job(tmp_path / "b", folder, DPO()))
    assert metrics(tmp_path / "b")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_moving_reference_of_another_model_is_refused(tmp_path, tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder)
    config.tie_word_embeddings = not config.tie_word_embeddings
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    training = replace(TRAINING, reference="moving", reference_alpha=0.5, reference_steps=1)
    with pytest.raises(ConfigError, match=r"training\.reference=moving: .* only one of them has lm_head\.weight"):
        train(replace(job(tmp_path / "work", tiny_folder, DPO(), training), reference=tmp_path / "other"))


def test_a_loss_of_scores_names_the_row_without_any(tmp_path, tiny_folder):
    rows = [replace(pair, chosen_score=None) for pair in pairs()]
    with pytest.raises(DataError, match=r"row \d of inputs\.pairs has no scores"):
        train(job(tmp_path, tiny_folder, COMPONENTS["loss"]["rpo"](), rows=rows))


def test_a_state_of_other_data_is_refused(tmp_path, tiny_folder):
    training = replace(TRAINING, save_every_steps=1)
    train(job(tmp_path, tiny_folder, DPO(), training))
    changed = [*pairs()[:-1], replace(pairs()[-1], rejected="#### 77")]
    with pytest.raises(DataError, match=r"state is of other data: .* overwrite=true"):
        train(job(tmp_path, tiny_folder, DPO(), training, changed))


def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, tiny_folder, caplog):
    training = replace(TRAINING, save_every_steps=1, max_steps=5)
    train(job(tmp_path / "whole", tiny_folder, DPO(), training))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    newest = sorted((tmp_path / "again" / "state").iterdir())[-1]
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    train(job(tmp_path / "again", tiny_folder, DPO(), training))
    assert "step-000004 is damaged; taking the state before it" in caplog.text
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for key, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "again")[key]), key


def test_a_loss_that_is_not_finite_stops_with_the_rows(tmp_path, tiny_folder):
    with pytest.raises(DataError, match=r"the loss of step 2 is not finite for rows \[\d"):
        train(job(tmp_path, tiny_folder, IPO(), replace(TRAINING, learning_rate=1e38, max_grad_norm=1e38)))


def test_the_checkpoint_loads_with_transformers_and_holds_what_was_trained(tmp_path, tiny_folder):
    train(job(tmp_path, tiny_folder, DPO()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_folder).chat_template


def test_the_reference_stays_what_it_was(tmp_path, tiny_folder):
    """Its log-probabilities are computed once; a second run from the trained policy starts at ln 2 again."""
    train(job(tmp_path / "first", tiny_folder, DPO()))
    train(job(tmp_path / "second", tmp_path / "first", DPO()))
    assert metrics(tmp_path / "second")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    against_base = replace(job(tmp_path / "third", tmp_path / "first", DPO()), reference=tiny_folder)
    train(against_base)
    assert abs(metrics(tmp_path / "third")[0]["train/loss"] - math.log(2)) > 1e-3


def selected(work: Path, folder: Path, rows: list[Pair], training: TrainingConfig, loss: Loss, **settings) -> Path:
    train(replace(job(work, folder, loss, training, rows), selection=SelectionConfig(**settings)))
    return work


SLOW = replace(TRAINING, max_steps=3, optimizer="sgd", learning_rate=1e-2)


@pytest.mark.parametrize("loss", [DPO(), SFT()], ids=["dpo", "sft"])
def test_equal_weights_of_any_size_change_nothing(tmp_path, tiny_folder, loss):
    rows = [replace(pair, meta={"w": 7.0}) for pair in pairs()]
    plain = selected(tmp_path / "a", tiny_folder, rows, SLOW, loss, name="none")
    weighted = selected(
        tmp_path / "b", tiny_folder, rows, SLOW, loss, name="column", column="w", transform="none", apply="loss"
    )
    assert [r["train/loss"] for r in metrics(plain)] == [r["train/loss"] for r in metrics(weighted)]
    assert all(torch.equal(value, weights(weighted)[key]) for key, value in weights(plain).items())


def test_whole_weights_as_repeats_and_as_factors_give_the_same_gradient(tmp_path, tiny_folder):
    rows = [replace(pair, meta={"w": 1.0 + i % 2}) for i, pair in enumerate(pairs(6))]
    column = {"name": "column", "column": "w", "transform": "none"}
    runs = []
    for apply, size in (("sampling", 9), ("loss", 6)):
        training = replace(SLOW, max_steps=None, num_epochs=3.0, global_batch_size=size, micro_batch_size=3)
        runs.append(selected(tmp_path / apply, tiny_folder, rows, training, DPO(), apply=apply, **column))
    losses = [[row["train/loss"] for row in metrics(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for key, value in weights(runs[0]).items():
        assert torch.allclose(value, weights(runs[1])[key], atol=1e-6), key


def test_a_budget_is_counted(tmp_path, tiny_folder):
    work = selected(tmp_path, tiny_folder, pairs(), SLOW, DPO(), name="random", budget=4)
    counts = orjson.loads((work / "data_counts.json").read_bytes())
    assert (counts["selection_taken"], counts["selection_left_out_by_budget"]) == (4, 3)
