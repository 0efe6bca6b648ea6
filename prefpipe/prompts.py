"""Chat templates to token ids, the same for generation, training and evaluation.

One BOS, one end of turn, the stop token inside the completion, the prompt a token-prefix of prompt and completion; what
cannot keep these promises raises DataError with the reason, never a silently different text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TemplateError(DataError):
    """A text that its template cannot render faithfully. `code` is counted in manifests."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Encoded(NamedTuple):
    """Token ids of a prompt (BOS first, generation prompt last) and of a completion (stop token last)."""

    prompt: list[int]
    completion: list[int]


class ChatTemplate:
    """Renders conversations with a tokenizer's own template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.bos = tokenizer.bos_token_id
        # Some templates write BOS themselves and some leave it to the tokenizer; either way there must be one.
        self.adds_bos = self.bos is not None and tokenizer("x")["input_ids"][:1] == [self.bos]
        self.special = _special_token_pattern(tokenizer)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a prompt, ending where the assistant starts to write."""
        self._refuse_special_tokens(messages)
        return self._ids(self._render(messages, add_generation_prompt=True))

    def encode(self, messages: Sequence[Message], completion: str) -> Encoded:
        """Ids of a prompt and of its completion; together they are the ids of the whole rendered conversation.

        Raises TemplateError when the template rewrites the prompt once an answer follows, when a token spans the
        boundary, or when a text holds a special token.
        """
        answered = [*messages, Message(role="assistant", content=completion)]
        self._refuse_special_tokens(answered)
        prompt_text = self._render(messages, add_generation_prompt=True)
        full_text = self._render(answered, add_generation_prompt=False)
        if not full_text.startswith(prompt_text):
            raise TemplateError(
                "template_prefix",
                "the chat template renders the prompt differently once an answer follows, so training would see "
                "another prompt than generation; set model.chat_template to a template without that",
            )
        prompt, full = self._ids(prompt_text), self._ids(full_text)
        if full[: len(prompt)] != prompt:
            raise TemplateError(
                "token_prefix",
                "the last token of the prompt merges with the start of the completion, so the prompt of generation is "
                "no token-prefix of the training text; let the generation prompt of model.chat_template end in a "
                "special token",
            )
        return Encoded(prompt, self._ended(full[len(prompt) :]))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without its stop token."""
        body = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        text = self.tokenizer.decode(list(body), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError as JinjaError

        conversation: list[Any] = list(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except JinjaError as error:
            roles = [m["role"] for m in messages]
            raise TemplateError("template_refused", f"the chat template refuses the roles {roles}: {error}") from None
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.bos is None:
            return ids
        if self.adds_bos and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        if ids[:2] == [self.bos, self.bos]:
            raise ConfigError("the chat template writes two BOS tokens; remove one from model.chat_template")
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        """A completion up to and including its first stop token; one is added where the template writes none."""
        for index, token in enumerate(ids):
            if token in self.stop_ids:
                return ids[: index + 1]
        eos = self.tokenizer.eos_token_id
        return [*ids, int(eos) if eos is not None else min(self.stop_ids)]

    def _refuse_special_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            found = self.special.search(message["content"]) if self.special else None
            if found:
                raise TemplateError(
                    "special_token",
                    f"the {message['role']} turn holds the special token {found.group()!r}, which would end or "
                    "forge a turn",
                )


def _special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= set(tokenizer.all_special_tokens)
    tokens.discard("")
    return re.compile("|".join(re.escape(token) for token in sorted(tokens))) if tokens else None
