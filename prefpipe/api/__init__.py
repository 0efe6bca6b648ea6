"""OpenAI-compatible servers (vLLM, SGLang, hosted ones): one client for every component that asks one."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from prefpipe.components import runtime
from prefpipe.errors import ConfigError
from prefpipe.settings import check_choice

MANAGED = {"model", "messages", "temperature", "top_p", "top_k", "seed", "n", "stream"}
"""Keys of a request that are set by the component, so never by extra_body."""


@dataclass
class ApiConfig:
    """Where a server is, what it costs, and how patiently it is asked.

    base_url: up to and with /v1. model: the name that the server knows its model by.
    endpoint: the name that answers are kept under, base_url by default. Give one name to servers of the same weights (a
        job that moves between hosts), and another one after the weights behind a URL have changed.
    api_key_env: the environment variable that holds the key; null sends none.
    allow_http: plain http to another machine, where the key and every text travel readable.
    extra_body: more keys of each request, e.g. {chat_template_kwargs: {enable_thinking: false}}.
    max_tokens_key: how the server calls the limit: max_tokens, or max_completion_tokens with newer hosted models.
    max_concurrency: requests at once. timeout_seconds: of one attempt, from connecting to the last byte.
    max_attempts: of one request. Before another one, a random time of at most backoff_seconds passes, doubled each
        time up to max_backoff_seconds; Retry-After is waited for, unless it is above max_retry_after_seconds.
    max_answer_bytes: a longer answer is cut off and counted as too_large.
    max_failed_fraction: the stage stops when more of a part's requests fail; fewer are counted in the manifest.
    prompt_price, completion_price: per million tokens, in any currency.
    max_cost: the stage stops before the spend noted in `ledger` can exceed this. An attempt whose answer was lost (a
        time-out, a kill) counts with the most that it can have cost.
    cache: a folder; what was answered once is never asked, or paid for, again. ledger: an SQLite file that adds up the
        spend of all that name it; spend.sqlite beside the answers by default.
    """

    base_url: str = runtime("http://localhost:8000/v1")
    endpoint: str = ""
    model: str | None = None
    api_key_env: str | None = runtime(None)
    allow_http: bool = runtime(False)
    extra_body: Any = None
    max_tokens_key: str = runtime("max_tokens")
    max_concurrency: int = runtime(32)
    timeout_seconds: float = runtime(600.0)
    max_attempts: int = runtime(6)
    backoff_seconds: float = runtime(1.0)
    max_backoff_seconds: float = runtime(60.0)
    max_retry_after_seconds: float = runtime(300.0)
    max_answer_bytes: int = runtime(8 << 20)
    max_failed_fraction: float = runtime(0.05)
    prompt_price: float = runtime(0.0)
    completion_price: float = runtime(0.0)
    max_cost: float | None = runtime(None)
    cache: str = runtime("~/.cache/prefpipe/api")
    ledger: str = runtime("")

    def __post_init__(self) -> None:
        self._check_url()
        self._check_numbers()
        check_choice("api.max_tokens_key", self.max_tokens_key, ("max_tokens", "max_completion_tokens"))
        # The value may be the key itself, so the message must not show it.
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ConfigError(
                "api.api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, never a key; "
                "what is given there is no such name (and not repeated here, should it be a key)"
            )
        if self.extra_body is not None and not isinstance(self.extra_body, Mapping):
            raise ConfigError(f"api.extra_body={self.extra_body} must be a mapping such as {{min_p: 0.05}}")
        taken = sorted((MANAGED | {"max_tokens", "max_completion_tokens"}) & (self.extra_body or {}).keys())
        if taken:
            raise ConfigError(
                f"api.extra_body holds {', '.join(taken)}, which the component sets itself; drop it there"
            )

    def with_endpoint(self) -> "ApiConfig":
        """The same with its endpoint named; not in __post_init__, as Hydra would take the default URL for given."""
        return replace(self, endpoint=self.endpoint or self.base_url)

    def _check_url(self) -> None:
        parts = urlsplit(self.base_url)
        if set("@?#") & set(self.base_url):
            raise ConfigError(
                "api.base_url must hold no user, password, query or fragment (not repeated here, should it hold a "
                "secret); put a key into an environment variable, and the name of that into api.api_key_env"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"api.base_url={self.base_url} must be a URL such as https://host/v1")
        if parts.scheme == "http" and not self.is_local and not self.allow_http:
            raise ConfigError(
                f"api.base_url={self.base_url} would send the key and every text readable to another machine; use "
                f"https, or set api.allow_http=true in a network that you trust"
            )

    def _check_numbers(self) -> None:
        for key in ("max_concurrency", "max_attempts", "max_answer_bytes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"api.{key}={getattr(self, key)} must be at least 1")
        if not self.timeout_seconds > 0:
            raise ConfigError(f"api.timeout_seconds={self.timeout_seconds} must be above 0")
        at_least_0 = ("backoff_seconds", "max_backoff_seconds", "max_retry_after_seconds")
        for key in (*at_least_0, "prompt_price", "completion_price"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"api.{key}={getattr(self, key)} must be at least 0")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ConfigError(f"api.max_failed_fraction={self.max_failed_fraction} must be between 0 and 1")
        if self.max_cost is not None:
            if not self.max_cost > 0:
                raise ConfigError(f"api.max_cost={self.max_cost} must be above 0; null sets no limit")
            if not self.prompt_price + self.completion_price > 0:
                raise ConfigError(
                    f"api.max_cost={self.max_cost} would be ignored, as tokens cost nothing here; set api.prompt_price "
                    f"and api.completion_price, per million tokens"
                )

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        host = urlsplit(self.base_url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False
