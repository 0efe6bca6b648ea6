"""Asking a judge: questions from templates, answers as texts or as the reason why there is none."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefpipe.api import ApiConfig
from prefpipe.errors import ConfigError
from prefpipe.records import Message
from prefpipe.scorers import Missing

if TYPE_CHECKING:
    from prefpipe.api.client import Outcome

ASSETS = Path(__file__).parent / "assets"
TEMPLATES = ASSETS / "judge"


class Template:
    """Renders questions. Texts are values, never template code; the marks around them hold a tag that no text holds.

    path: a Jinja file with the blocks `user` and, if wanted, `system`.
    Raises ConfigError where it is none, here and in `messages`.
    """

    def __init__(self, path: Path) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.path = path
        self.errors = jinja2.TemplateError
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        try:
            self.template = environment.from_string(path.read_text(encoding="utf-8"))
        except (self.errors, UnicodeDecodeError) as error:
            raise ConfigError(f"scorer.template={path}: {error}") from None
        if "user" not in self.template.blocks:
            raise ConfigError(f"scorer.template={path} has no block `user`; see {TEMPLATES / 'single.jinja'}")

    def messages(self, held: Sequence[str], **values: Any) -> list[Message]:
        """The system message, if the template has one, and the user message.

        held: every text of others that is in the values; `tag` is in none of them.
        """
        try:
            context = self.template.new_context({**values, "tag": _tag(held)})
            return [
                Message(role=role, content="".join(self.template.blocks[role](context)).strip())
                for role in ("system", "user")
                if role in self.template.blocks
            ]
        except self.errors as error:
            raise ConfigError(f"scorer.template={self.path}: {error}") from None


def ask(
    questions: Sequence[Sequence[Message]],
    api: ApiConfig,
    *,
    component: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
) -> list[str | Missing]:
    """The judge's text on each question, in order; where there is none, or no whole one, the reason.

    seed: of temperatures above 0.
    """
    if not questions:
        return []
    from prefpipe.api.client import Client

    with Client(api, component=component) as client:
        bodies = [
            client.body(
                question,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed if temperature > 0 else None,
            )
            for question in questions
        ]
        return [_text(outcome) for outcome in client.complete(bodies)]


def f1_scores(precision: float, recall: float) -> dict[str, float]:
    """Both with their harmonic mean, which is 0 where both are 0."""
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def _text(outcome: Outcome) -> str | Missing:
    from prefpipe.api.replies import Failure

    if isinstance(outcome, Failure):
        return Missing(outcome.reason)
    choice = outcome.choices[0]
    if choice.finish_reason == "length":
        return Missing("truncated")  # another verdict may have followed
    return choice.text if choice.finish_reason == "stop" else Missing(choice.finish_reason)


def _tag(texts: Sequence[str]) -> str:
    """8 hex digits that occur in none of the texts, so that none can forge the mark that ends it; always the same."""
    for attempt in itertools.count():
        seen = hashlib.sha256(str(attempt).encode())
        for text in texts:
            seen.update(hashlib.sha256(text.encode()).digest())
        tag = seen.hexdigest()[:8]
        if not any(tag in text for text in texts):
            return tag
    raise AssertionError
