"""Chat templates to token ids, the same for generation, training and evaluation.

One BOS, one end of turn, the stop token inside the completion, the prompt a token-prefix of prompt and completion; what
cannot keep these promises raises DataError with the reason, never a silently different text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefpipe.errors import ConfigError, DataError
from prefpipe.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TemplateError(DataError):
    """A text that its template cannot render faithfully. `code` is counted in manifests."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Encoded(NamedTuple):
    """Token ids of a prompt (BOS first, generation prompt last) and of a completion (stop token last).

    trained: which tokens of the completion are the assistant's, where it holds turns of the user too; None: all.
    """

    prompt: list[int]
    completion: list[int]
    trained: list[bool] | None = None


class ChatTemplate:
    """Renders conversations with a tokenizer's own template.

    decoder_start: the token before a completion where that has a decoder of its own; None where it follows the prompt.
    """

    decoder_start: int | None = None

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

    def encode_turns(self, messages: Sequence[Message], completion: str) -> list[Encoded]:
        """Ids of a conversation, all turns of the assistant marked: `completion` and those in `messages`.

        One Encoded where the template renders a turn in the same way whatever follows it: its prompt is what comes
        before the first answer, and `trained` marks each answer with the stop token that ends it. Where it does not
        (templates strip earlier thoughts, or end no turn but the last), one Encoded for each answer, as `encode` gives
        it: behind the prompt that generation would see. Raises TemplateError as `encode` does.
        """
        turns = [*messages, Message(role="assistant", content=completion)]
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        whole = self._in_one(turns, answers) if len(answers) > 1 else None
        return [whole] if whole else [self.encode(turns[:index], turns[index]["content"]) for index in answers]

    def _in_one(self, turns: Sequence[Message], answers: Sequence[int]) -> Encoded | None:
        """A whole conversation with its answers marked; None where a prefix of it would be rendered differently."""
        self._refuse_special_tokens(turns)
        text = self._render(turns, add_generation_prompt=False)
        ids = self._ids(text)
        spans = []
        for index in answers:
            asked = self._render(turns[:index], add_generation_prompt=True)
            answered = self._render(turns[: index + 1], add_generation_prompt=False)
            if not (text.startswith(answered) and answered.startswith(asked)):
                return None
            before, after = self._ids(asked), self._ids(answered)
            start = len(before)
            stop = next((i for i in range(start, len(after)) if after[i] in self.stop_ids), None)
            if stop is None or ids[: stop + 1] != after[: stop + 1] or ids[:start] != before:
                return None
            spans.append((start, stop + 1))
        first, end = spans[0][0], spans[-1][1]
        trained = [False] * end
        for start, stop in spans:
            trained[start:stop] = [True] * (stop - start)
        return Encoded(ids[:first], ids[first:end], trained[first:])

    def encode_open(self, messages: Sequence[Message], answer: str, start: int = 0) -> Encoded:
        """Ids of a prompt and of an answer that goes on, so that nothing ends it: split at answer[start].

        A token that reaches over that place belongs to the completion. Raises TemplateError where a text holds a
        special token, ConfigError for an encoder-decoder model and for a tokenizer that knows no offsets.
        """
        if self.decoder_start is not None or not self.tokenizer.is_fast:
            raise ConfigError("only decoder-only models with a fast tokenizer can be asked about a part of an answer")
        self._refuse_special_tokens([*messages, Message(role="assistant", content=answer)])
        prompt = self._render(messages, add_generation_prompt=True)
        found = self.tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
        ids = self._with_bos(found["input_ids"])
        ends = [end for _, end in found["offset_mapping"]]
        border = len(prompt) + start
        first = next((i for i, end in enumerate(ends) if end > border), len(ends)) + len(ids) - len(ends)
        return Encoded(ids[:first], ids[first:])

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
        return self._with_bos(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_bos(self, ids: list[int]) -> list[int]:
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


class ConversationTemplate(ChatTemplate):
    """For reward models, which read a whole rendered conversation: what stands behind the stop token stays.

    So the last token is the one that `apply_chat_template` ends in, at which others train and ask reward models too.
    """

    def _ended(self, ids: list[int]) -> list[int]:
        return ids or super()._ended(ids)


class EncoderDecoderTemplate(ChatTemplate):
    """For models whose encoder reads the prompt and whose decoder writes the completion: each is a text of its own.

    Both get what the tokenizer itself puts around a text (T5: `</s>` behind it). The prompt is the rendered
    conversation where there is a chat template, else the text of its one turn, as such models are trained (T5, BART).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], decoder_start: int) -> None:
        super().__init__(tokenizer, stop_ids)
        self.decoder_start = decoder_start
        self.bos = self.bos if self.adds_bos else None
        self._said: set[str] = set()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a prompt. Raises TemplateError for several turns, or a system turn, without a chat template."""
        self._refuse_special_tokens(messages)
        if self.tokenizer.chat_template:
            text = self._render(messages, add_generation_prompt=True)
        elif [message["role"] for message in messages] == ["user"]:
            text = messages[0]["content"]
        else:
            raise TemplateError(
                "several_turns",
                f"without a chat template the encoder reads one user turn and nothing else, here there are "
                f"{[message['role'] for message in messages]}; set model.chat_template=builtin:plain, or a Jinja file",
            )
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:  # one is the template's
            ids = ids[1:]
        self._compare("prompt", text, ids)
        return ids

    def encode(self, messages: Sequence[Message], completion: str) -> Encoded:
        """Ids of a prompt and of a completion, each encoded alone.

        Raises TemplateError as `prompt` does, and when a text holds a special token, or the completion a character
        that the tokenizer does not know: it would be learnt as `<unk>`, and decoding drops that.
        """
        self._refuse_special_tokens([Message(role="assistant", content=completion)])
        prompt = self.prompt(messages)
        ids: list[int] = self.tokenizer(text_target=completion)["input_ids"]
        if ids[:1] == [self.decoder_start]:  # mBART's language, T5Gemma's BOS: given to the decoder, not asked of it
            ids = ids[1:]
        if self._unknown(ids):
            raise TemplateError(
                "unknown_token",
                f"the completion holds {self._culprit(completion)!r}, which the tokenizer does not know, so that "
                f"another text would be learnt; write it in other characters",
            )
        self._compare("completion", completion, ids)
        return Encoded(prompt, self._ended(ids))

    def _in_one(self, turns: Sequence[Message], answers: Sequence[int]) -> None:
        """An answer that later ones follow is in the encoder then, which learns no text."""

    def _unknown(self, ids: Sequence[int]) -> bool:
        unknown = self.tokenizer.unk_token_id
        return unknown is not None and unknown not in self.stop_ids and unknown in ids

    def _culprit(self, text: str) -> str:
        return next((mark for mark in text if self._unknown(self.tokenizer(mark)["input_ids"])), text)

    def _compare(self, what: str, text: str, ids: list[int]) -> None:
        """Say once where the tokenizer cannot hold a text as it is: T5's has no line breaks, braces or `<`."""
        if what in self._said:
            return
        read = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self._unknown(ids) or read != (self.special.sub("", text) if self.special else text):
            self._said.add(what)
            log.warning("the tokenizer changes some texts; the first is a %s, %.300r, read as %.300r", what, text, read)


def _special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= set(tokenizer.all_special_tokens)
    tokens.discard("")
    return re.compile("|".join(re.escape(token) for token in sorted(tokens))) if tokens else None
