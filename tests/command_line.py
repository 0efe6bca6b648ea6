"""The command line in a test's own process: what the fixture `prefpipe` returns, and what it must not import."""

from collections.abc import Callable
from typing import NamedTuple

HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "pandas",
    "mlflow",
    "matplotlib",
    "vllm",
    "deepspeed",
}
"""Packages that neither `prefpipe --help` nor a plan may wait for."""


class Result(NamedTuple):
    code: int
    out: str
    err: str


Prefpipe = Callable[..., Result]


def refused(result: Result) -> str:
    """The one line of a command that was refused."""
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith("prefpipe: error: ")
    return result.err.removeprefix("prefpipe: error: ").strip()
