"""A random model that writes statements with citations, and documents for it."""

import math
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefpipe.records import Prompt, prompt_id

RANGES = ["[0-0]", "[1-2]", "[2-2]", "[3-4]", "[4-3]"]  # the last cites nothing
STATEMENTS = ["He has apples.", "She has pears.", "They have plums."]
FOLLOWING = {
    "<a>": ["<statement>"],
    "<statement>": STATEMENTS,
    **{statement: ["<cite"] for statement in STATEMENTS},
    "<cite": [">", ">["],
    ">": [*RANGES, "</cite>"],
    ">[": ["0-", "1-"],
    "0-": ["1]", "3]"],
    "1-": ["1]", "3]"],
    "1]": ["</cite>", *RANGES],
    "3]": ["</cite>"],
    **{cited: ["</cite>", "</cite>", "[2-2]"] for cited in RANGES},
    "</cite>": ["</statement>"],
    "</statement>": [*["<statement>"] * 9, "<eos>"],
}
"""Token → the tokens that may follow it, likelier ones repeated; which one does depends on all the text before."""
TEMPLATE = (
    "{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SENTENCES = ["Tom has 3 apples. ", "Ann has 4 pears. ", "Tim had a plum. ", "Bob is tall. ", "The sun shines."]


def document(question: str, sentences: list[str] = SENTENCES) -> Prompt:
    tagged = "".join(f"<C{number}>{sentence}" for number, sentence in enumerate(sentences))
    text = f"[Document Start]\n{tagged}\n[Document End]\n{question}"
    messages = [{"role": "user", "content": text}]
    return Prompt(prompt_id=prompt_id(messages), messages=messages, source="test")


def save(folder: Path) -> Path:
    """Write model and tokenizer. A token's own place in the stream says what may follow, random layers say which."""
    words = sorted({*FOLLOWING, *(word for words in FOLLOWING.values() for word in words)} - {"<a>", "<eos>"})
    tokens = ["<eos>", "<u>", "<a>", *words]
    tokens += [letter for letter in string.printable[:95] + "\n" if letter not in tokens]
    pattern = "|".join(sorted(map(_escaped, words), key=len, reverse=True))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", additional_special_tokens=["<u>", "<a>"]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    size = len(tokens)
    width = 8 * (size // 8 + 6)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=1024,
            initializer_range=0.3,
            tie_word_embeddings=False,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    table = torch.full((size, size), -40.0)  # [before, after] logits
    for before, after in FOLLOWING.items():
        for word in after:
            table[tokens.index(before), tokens.index(word)] = math.log(after.count(word))
    with torch.no_grad():
        own = torch.cat([torch.eye(size), 0.1 * torch.randn(size, width - size)], dim=1)
        model.model.embed_tokens.weight.copy_(own)
        model.lm_head.weight[:, :size] = table.T / 6
        model.lm_head.weight[:, size:] = 0.3 * torch.randn(size, width - size)
        for layer in model.model.layers:  # the layers write beside the token's own place, and no louder than it
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight[:size] = 0.0
                weight *= 0.006
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def _escaped(word: str) -> str:
    return "".join(f"\\{letter}" if letter in "[].^$*+?(){}|-\\" else letter for letter in word)
