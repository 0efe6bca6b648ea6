"""Logging set-up, and how an error ends a process: one line for the user's errors, a traceback for ours."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefpipe.errors import ConfigError, PrefpipeError
from prefpipe.processes import tell_parent

EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


def set_up_logging() -> None:
    """prefpipe's own lines on stderr, and of other libraries only warnings."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO)
    logging.getLogger("prefpipe").setLevel(logging.DEBUG)  # for the file of log_to
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", message=".*torchvision.*")


def say(text: str) -> None:
    """Print what was asked for. What the terminal's encoding lacks is spelt out; `| head` may stop reading."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_to(file: Path) -> None:
    """Append what is logged to a file as well, for whoever looks for the reason the next morning."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(process)d] %(message)s"))
    logging.getLogger("prefpipe").addHandler(handler)


@contextmanager
def report_errors() -> Iterator[None]:
    """End the process with one line for what a user can act on; other exceptions keep their traceback."""
    try:
        yield
    except PrefpipeError as error:
        tell_parent(error)
        print(f"prefpipe: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)
    except KeyboardInterrupt:
        print("prefpipe: interrupted; the same command again goes on from here", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        tell_parent(error)
        raise
