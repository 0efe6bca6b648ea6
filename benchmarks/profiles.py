"""What is trained on: model shapes, lengths of pairs, and a tokenizer in which each word is one token.

Lengths are tokens, special ones included. The two data sets are log-normal: medians are those that the authors of
prefix sharing publish (arXiv:2410.20305, README of dpo-prefix-sharing: overall length and ratio of prompt to
completion), HH-RLHF 186 and 2.15, UltraFeedback 409 and 0.42, with an overall length read as that of a prompt and one
completion. sigma of the logarithm is 0.8 for prompts and 0.6 for completions. Padding a batch of 8 pairs to its longest
row then costs 2.2 times its tokens (HH) and 2.1 times (UltraFeedback).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefpipe.records import Message, Pair

BOS, PAD, END, USER, ASSISTANT = "<|bos|>", "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (BOS, PAD, END, USER, ASSISTANT)
PROMPT_MARKS = 4
"""Of a prompt's tokens: BOS, both roles, the end of the user's turn. A completion has one, its end."""
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights. lora_rank: train adapters of that rank instead of the weights; None trains all."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    lora_rank: int | None = None


SHAPES = {
    "tiny": Shape(32, 2, 2, 2, 64, 256),
    "tiny_lora": Shape(32, 2, 2, 2, 64, 256, lora_rank=4),
    "7m": Shape(256, 4, 4, 4, 672, 8192),
    "7m_v32k": Shape(256, 4, 4, 4, 672, 32_000),
    "1b": Shape(2048, 16, 32, 8, 8192, 128_256, tied=True),
    "8b_lora": Shape(4096, 32, 32, 8, 14_336, 128_256, lora_rank=16),
}
"""7m: 7.3 M weights. 7m_v32k: the same with the vocabulary that memory is measured with, 19.5 M. 1b and 8b_lora: those
of Llama-3.2-1B and Llama-3.1-8B."""


@dataclass(frozen=True)
class Profile:
    """Pairs of one kind, and what is claimed of them.

    prompt, completion: median tokens. spread: sigma of prompt and completion; (0, 0) makes all lengths equal.
    batch_size: pairs per optimizer step. longest: a prompt's or a completion's most tokens. loss: dpo or simpo.
    num_steps: measured in each repeat, after one that is not. num_batches: different ones; None is one for each step.
    target: least theirs / ours in time. target_unshared: the same over our own mode without prefix sharing.
    """

    prompt: int
    completion: int
    batch_size: int
    spread: tuple[float, float] = (0.0, 0.0)
    longest: int = 1024
    loss: str = "dpo"
    num_steps: int = 4
    num_batches: int | None = None
    target: float | None = None
    target_unshared: float | None = None

    @property
    def max_tokens(self) -> int:
        """No row is longer, so nothing is cut."""
        return self.prompt + self.completion if self.spread == (0.0, 0.0) else 2 * self.longest


LENGTHS_HH = {"prompt": 127, "completion": 59, "spread": (0.8, 0.6)}
LENGTHS_ULTRAFEEDBACK = {"prompt": 121, "completion": 288, "spread": (0.8, 0.6)}

PROFILES = {
    "p192_c64": Profile(192, 64, batch_size=4, target=4.0),
    "p64_c192": Profile(64, 192, batch_size=4, target=2.2),
    "hh": Profile(**LENGTHS_HH, batch_size=8, target=6.0),
    "ultrafeedback": Profile(**LENGTHS_ULTRAFEEDBACK, batch_size=8, target=4.0),
    "selfcite": Profile(2048, 64, batch_size=2, num_steps=3, target=4.0, target_unshared=1.8),
    "simpo_hh": Profile(**LENGTHS_HH, batch_size=8, loss="simpo", target=4.0),
}

GPU_PROFILES = {
    "hh": Profile(**LENGTHS_HH, batch_size=16, num_steps=8, target=3.5),
    "ultrafeedback": Profile(**LENGTHS_ULTRAFEEDBACK, batch_size=16, num_steps=8, target=2.5),
}

GATES = {
    loss: Profile(24, 12, batch_size=4, spread=(0.5, 0.5), longest=64, loss=loss, num_steps=19, num_batches=4)
    for loss in ("dpo", "simpo")
}
"""On which both sides must agree over 20 steps, five times over four batches, before any time counts."""

TINY = {
    loss: Profile(16, 8, batch_size=2, spread=(0.5, 0.5), longest=32, loss=loss, num_steps=2)
    for loss in ("dpo", "simpo")
}
"""For the test of the benchmark itself."""


def named_profile(name: str, *, gpu: bool = False) -> Profile:
    """Of PROFILES, on a GPU of GPU_PROFILES; `tiny` and `tiny_simpo` are for tests. SystemExit where there is none."""
    table = (GPU_PROFILES if gpu else PROFILES) | {"tiny": TINY["dpo"], "tiny_simpo": TINY["simpo"]}
    if name not in table:
        raise SystemExit(f"no profile {name}; there are {', '.join(table)}")
    return table[name]


def build_model(shape: Shape, folder: Path, *, seed: int = 0, max_tokens: int = 4096) -> Path:
    """A folder with float32 weights drawn with a seed, and the tokenizer."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = build_tokenizer(shape.vocabulary)
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=shape.tied,
        **token_ids,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**token_ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tokenizer(vocabulary: int) -> Any:
    """Words w0, w1, … between spaces, each one token."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": len(SPECIAL) + i for i in range(vocabulary - len(SPECIAL))}
    backend = Tokenizer(models.WordLevel({**{token: i for i, token in enumerate(SPECIAL)}, **words}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_pairs(profile: Profile, number: int, vocabulary: int, *, seed: int = 0) -> list[Pair]:
    """Random words in the profile's lengths. Every pair has its own prompt."""
    rng = np.random.default_rng(seed)

    def length(median: int, sigma: float, marks: int) -> int:
        drawn = median * math.exp(sigma * rng.standard_normal()) if sigma else median
        return int(np.clip(round(drawn), marks + 1, max(profile.longest, median))) - marks

    def words(median: int, sigma: float, marks: int) -> str:
        drawn = rng.integers(vocabulary - len(SPECIAL), size=length(median, sigma, marks))
        return " ".join(f"w{i}" for i in drawn)

    pairs = []
    for index in range(number):
        prompt = words(profile.prompt, profile.spread[0], PROMPT_MARKS)
        chosen, rejected = (words(profile.completion, profile.spread[1], 1) for _ in range(2))
        pairs.append(
            Pair(
                prompt_id=f"{index:016x}",
                messages=[Message(role="user", content=prompt)],
                source="benchmark",
                chosen=chosen,
                rejected=rejected,
            )
        )
    return pairs


def padding(lengths: Sequence[tuple[int, int, int]], batch_size: int) -> dict[str, float]:
    """Tokens of (prompt, chosen, rejected) lengths in batches: of both completions' rows, padded, and shared."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    padded = sum(2 * len(batch) * max(p + max(c, r) for p, c, r in batch) for batch in batches)
    real = sum(2 * p + c + r for p, c, r in lengths)
    return {"tokens": real, "padded_tokens": padded, "shared_tokens": sum(p + c + r for p, c, r in lengths)}
