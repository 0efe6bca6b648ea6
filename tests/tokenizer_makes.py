"""Tokenizers of every make, small, trained here on worked problems with annotations."""

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as makes
from transformers import PreTrainedTokenizerFast

NUMBERS = [(a, b) for a in range(60) for b in (3, 17, 125)]
TEXTS = [
    f"Tom has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} pens, {a}*{b}=<<{a}*{b}={a * b}>>{a * b}.\n" for a, b in NUMBERS
]
BRACKETS = [text.replace("<<", "[ ").replace(">>", "] ").replace("\n", " ") for text in TEXTS]


def byte_level(*, use_regex: bool) -> PreTrainedTokenizerFast:
    """As GPT-2's; without its regex, digits merge with what is beside them: "=2", "=<<", ">>12"."""
    backend = Tokenizer(makes.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def unigram(texts: list[str]) -> PreTrainedTokenizerFast:
    """As T5's: pieces of sentencepiece, a space before every text; white space of any length is one space."""
    backend = Tokenizer(makes.Unigram())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=list("0123456789.-+*/=()"),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a character that is no piece of its own is its bytes; here "=" is <0x3D> and "<" is <0x3C>."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"0123456789+-*/.Tomhas", "▁Tom", "24"]
    merges = [("▁", "T"), ("▁T", "o"), ("▁To", "m"), ("2", "4")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "▁T", "▁To"]))}
    backend = Tokenizer(makes.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


MAKES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": lambda: byte_level(use_regex=True),
    "fused byte-level": lambda: byte_level(use_regex=False),
    "unigram": lambda: unigram(TEXTS),
    "unigram of brackets": lambda: unigram(BRACKETS),
    "byte fallback": byte_fallback,
}
