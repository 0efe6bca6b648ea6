"""The committed folder prefpipe/assets/tiny: what the demo and the tests rely on."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefpipe
from prefpipe.sources.arithmetic import arithmetic_problems
from prefpipe.tiny_model import BOS, END, PAD, ROLES, build_tokenizer, new_model, sft_examples, train

TINY = Path(prefpipe.__file__).parent / "assets" / "tiny"

# Spaces at the edges, line ends, marks that merge or combine, and everything a byte-level vocabulary could miss.
STRINGS = [
    "",
    " ",
    "  two  spaces  ",
    "\n\nlines\r\n\ttabs \n",
    "12 345,678.90",
    "#### 25",
    "Grüße, naïve café e\u0301",
    "你好，世界。",
    "नमस्ते العربية עברית",
    "👩‍👩‍👧‍👦🏳️‍🌈😀",
    "\u200b\ufeff\u2028\u00a0",
    "".join(chr(code) for code in range(1, 32)) + "\x7f\x85",
    "def f(x):\n    return {x: [x] * 2}  # <b>&amp;</b>",
    "<|", "|>", "<|user", "end|>", "{{ content }} {% if %}",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def ids_of(tokenizer, messages, *, prompt=False):
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False) == ids
    return rendered, ids


def conversation(*contents, system=None):
    roles = itertools.cycle(["user", "assistant"])
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def answers(model, tokenizer, questions):
    prompts = [
        tokenizer.apply_chat_template(conversation(question), tokenize=False, add_generation_prompt=True)
        for question in questions
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    generated = model.generate(**batch, max_new_tokens=96, do_sample=False)
    return generated[:, batch.input_ids.shape[1] :]


def test_the_folder_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in TINY.iterdir()}
    assert sum(files.values()) <= 4 * 2**20
    assert {"model.safetensors", "config.json", "generation_config.json"} <= set(files)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(files)


def test_the_model_is_a_small_llama_that_knows_its_special_tokens(model, tokenizer):
    assert model.config.model_type == "llama"
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.config.max_position_embeddings >= 2048
    assert model.config.vocab_size == len(tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, END, PAD)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("text", STRINGS)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.unk_token is None
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_every_character_of_the_basic_plane_survives(tokenizer):
    text = "".join(chr(code) for code in range(1, 0x10000) if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_digit_is_a_token(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer("1234567890").input_ids] == list("1234567890")


@pytest.mark.parametrize("system", [None, " Be brief.\n"])
def test_rendering_is_verbatim_with_one_bos_and_one_end_per_turn(tokenizer, system):
    messages = conversation(" 1 + 1? \n", "\n\n2 ", "  ", "", "why?", " because\t", system=system)
    rendered, ids = ids_of(tokenizer, messages)
    assert rendered == BOS + "".join(f"<|{turn['role']}|>{turn['content']}{END}" for turn in messages)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == len(messages)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids) == rendered


def test_tokenizing_a_rendered_prompt_adds_no_second_bos(tokenizer):
    rendered, ids = ids_of(tokenizer, conversation("hello"), prompt=True)
    assert tokenizer(rendered, add_special_tokens=True).input_ids == ids


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="no such role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("seed", range(20))
def test_a_prompt_is_a_prefix_of_its_conversation_in_text_and_in_tokens(tokenizer, seed):
    rng = random.Random(seed)
    contents = ["".join(rng.choices(STRINGS, k=rng.randint(1, 3))) for _ in range(6)]
    messages = conversation(*contents, system=rng.choice([None, *STRINGS]))
    for end in range(len(messages) - 1, 0, -2):
        prompt, prompt_ids = ids_of(tokenizer, messages[:end], prompt=True)
        whole, whole_ids = ids_of(tokenizer, messages[: end + 1])
        assert whole == prompt + messages[end]["content"] + END
        assert whole_ids[: len(prompt_ids)] == prompt_ids
        completion = tokenizer(messages[end]["content"] + END, add_special_tokens=False).input_ids
        assert prompt_ids + completion == whole_ids


def test_role_markers_are_single_tokens(tokenizer):
    assert all(len(tokenizer(role).input_ids) == 1 for role in ROLES)


def test_greedy_answers_stop_and_are_often_right_but_far_from_always(model, tokenizer):
    rows = list(itertools.islice(arithmetic_problems(0), 100))
    completions = answers(model, tokenizer, [row["question"] for row in rows])
    right = 0
    for row, completion in zip(rows, completions.tolist(), strict=True):
        assert completion.count(tokenizer.eos_token_id) == 1
        text = tokenizer.decode(completion, skip_special_tokens=True)
        right += text.rpartition("#### ")[2] == row["answer"].rpartition("#### ")[2]
    assert 25 <= right <= 75


def test_training_is_deterministic_and_moves_the_weights(tokenizer):
    def trained():
        model = new_model(tokenizer, seed=3)
        train(model, tokenizer, list(sft_examples(3, 128)))
        return model

    first, second = trained(), trained()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.lm_head.weight, new_model(tokenizer, seed=3).lm_head.weight)


def test_the_recipe_gives_the_committed_tokenizer(tokenizer):
    again = build_tokenizer(seed=0)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert again(STRINGS).input_ids == tokenizer(STRINGS).input_ids


def test_help_names_the_knobs():
    shown = subprocess.run([sys.executable, "-m", "prefpipe.tiny_model", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert {"--out", "--seed", "--num-steps"} <= set(shown.stdout.replace("[", " ").split())
