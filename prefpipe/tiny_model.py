"""The recipe of prefpipe/assets/tiny, the model of the demo and the tests: `python -m prefpipe.tiny_model --out DIR`.

A Llama of 190,000 weights learns the word problems of prefpipe/sources/arithmetic.py, and at the end a bad habit: many
of the answers that it is shown are the bare result, without the steps. It can work most problems out and often blurts a
guess instead, so its samples hold right and wrong answers to most problems: something for a preference loss to choose.
"""

import argparse
import itertools
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from prefpipe.sources.arithmetic import arithmetic_problems

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# Nothing but special tokens stands between two contents, so no merge can cross a boundary: the tokens of a prompt are
# always a prefix of the tokens of the conversation. Contents are copied as they are, spaces included.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MAX_VOCABULARY = 512
MAX_POSITIONS = 4096
LEARNING_RATE = 5e-3
BATCH_SIZE = 32
WARMUP_STEPS = 100
HABIT_STARTS = 0.7  # of the way: earlier, bare results would only slow down the learning of the steps
IGNORE_INDEX = -100


def make_tiny_model(out: Path, *, seed: int, num_steps: int) -> None:
    """Train tokenizer and model from nothing and write them to `out` as one Hugging Face folder.

    The same seed, number of steps and versions on the same kind of CPU with one thread give the same files.
    """
    tokenizer = build_tokenizer(seed)
    model = new_model(tokenizer, seed)
    train(model, tokenizer, list(sft_examples(seed, num_steps * BATCH_SIZE)))
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)


def training_problems(seed: int) -> Iterator[dict[str, str]]:
    """The problems of a negative seed, as experiments take theirs from seed 0 upwards."""
    return arithmetic_problems(-1 - seed)


def sft_examples(seed: int, number: int) -> Iterator[tuple[str, str]]:
    """Yield (question, answer); late in the course, some answers lack the steps and are the line "#### 25" alone."""
    rng = random.Random(f"habit/{seed}")
    for index, row in enumerate(itertools.islice(training_problems(seed), number)):
        blurted = index >= HABIT_STARTS * number and rng.random() < direct_share(row["question"])
        yield row["question"], row["answer"].splitlines()[-1] if blurted else row["answer"]


def direct_share(question: str) -> float:
    """How often the bare result is shown: mostly for questions that end in "have?", half of all, seldom for others.

    Greedy decoding follows the majority, so it blurts on the first half only; sampling does both on both halves.
    """
    return 0.75 if question.endswith("have?") else 0.25


def build_tokenizer(seed: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE over the word problems, each digit a token; all 256 bytes are in, so any text can be encoded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, END, *ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = itertools.islice(training_problems(seed), 4000)
    backend.train_from_iterator((f"{row['question']}\n{row['answer']}" for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", out: Path) -> None:
    """Write the tokenizer's files so that transformers 4 reads them too, as some versions of vLLM need it."""
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # version 5 writes its new name for the same class
    file.write_text(json.dumps(settings, indent=2) + "\n")


def new_model(tokenizer: "PreTrainedTokenizerFast", seed: int) -> "LlamaForCausalLM":
    """A Llama with random weights. Heads are 32 wide, the narrowest that vLLM's CPU build takes."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        **token_ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**token_ids)
    return model


def train(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", examples: Sequence[tuple[str, str]]) -> None:
    """Fine-tune on the answers (not on the questions), in order, with AdamW: linear warm-up, then cosine to zero."""
    num_steps = len(examples) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps))
    padding = tokenizer.convert_tokens_to_ids(PAD)
    assert isinstance(padding, int)
    started = time.monotonic()
    model.train()
    for step in range(1, num_steps + 1):
        batch = examples[(step - 1) * BATCH_SIZE : step * BATCH_SIZE]
        sequences = sorted((encode(tokenizer, *example) for example in batch), key=lambda sequence: len(sequence[0]))
        num_tokens = sum(len(ids) - num_prompt for ids, num_prompt in sequences)
        total = 0.0
        # Half of the batch at a time, the short ones first: less padding, the same gradient.
        for half in (sequences[: BATCH_SIZE // 2], sequences[BATCH_SIZE // 2 :]):
            loss = summed_loss(model, *collate(half, padding=padding)) / num_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            log.info("step %d/%d loss %.3f %.0f s", step, num_steps, total, time.monotonic() - started)
    model.eval()


def summed_loss(model: "LlamaForCausalLM", input_ids: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of the labelled tokens, summed, in nats."""
    # Padding is on the right, where a causal model cannot see it, so no attention mask is needed.
    logits = model(input_ids=input_ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def encode(tokenizer: "PreTrainedTokenizerFast", question: str, answer: str) -> tuple[list[int], int]:
    """Token ids of one conversation, and how many of them are the prompt."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return prompt_ids + tokenizer(answer + END, add_special_tokens=False).input_ids, len(prompt_ids)


def collate(batch: Sequence[tuple[list[int], int]], *, padding: int) -> tuple[Tensor, Tensor]:
    """(input_ids [B, T], labels [B, T] with IGNORE_INDEX on prompt and padding), padded on the right."""
    width = max(len(ids) for ids, _ in batch)
    input_ids = torch.full((len(batch), width), padding)
    labels = torch.full((len(batch), width), IGNORE_INDEX)
    for row, (ids, num_prompt) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
    return input_ids, labels


def learning_rate_factor(step: int, num_steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prefpipe.tiny_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=3600, help="optimizer steps of 32 problems")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    make_tiny_model(arguments.out, seed=arguments.seed, num_steps=arguments.num_steps)


if __name__ == "__main__":
    main()
