"""The errors that a user can act on. Their messages name the key or file:line, the value, the rule and the remedy."""


class PrefpipeError(Exception):
    """Base of all errors that end a command with one line instead of a traceback.

    kind: the class of failure that `prefpipe status` shows and `prefpipe retry --only` takes.
    """

    kind: str = "error"


class ConfigError(PrefpipeError, ValueError):
    """A config value cannot work."""

    kind = "config"


class ArtifactError(PrefpipeError, RuntimeError):
    """An artifact on disk is missing, unfinished, damaged, made with other settings, or of another schema."""

    kind = "artifact"


class DataError(PrefpipeError, ValueError):
    """Input rows cannot be used: too many bad rows, an unreadable file, or a text that its template cannot render."""

    kind = "data"


class ApiError(PrefpipeError, RuntimeError):
    """A server refuses every request, too many requests fail, or the next one might exceed the budget."""

    kind = "api"


class HangError(PrefpipeError, RuntimeError):
    """A process of a training run no longer gets on, and the others wait for it."""

    kind = "hang"


OUT_OF_MEMORY: tuple[str, ...] = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "cublas_status_alloc_failed",
)


def kind_of(error: BaseException) -> str:
    """The class of any failure, as PrefpipeError.kind; "oom" for memory that ran out, of a device or the machine."""
    if isinstance(error, PrefpipeError) and error.kind != PrefpipeError.kind:
        return error.kind
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "interrupted"
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or "outofmemory" in text or any(words in text for words in OUT_OF_MEMORY):
        return "oom"
    return PrefpipeError.kind


class OutOfMemoryError(PrefpipeError, RuntimeError):
    """Memory ran out in training; what takes less of it was logged before. See prefpipe/ladder.py."""

    kind = "oom"
