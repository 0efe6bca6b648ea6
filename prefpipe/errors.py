"""The errors that a user can act on. Their messages name the key or file:line, the value, the rule and the remedy."""


class PrefpipeError(Exception):
    """Base of all errors that end a command with one line instead of a traceback."""


class ConfigError(PrefpipeError, ValueError):
    """A config value cannot work."""


class ArtifactError(PrefpipeError, RuntimeError):
    """An artifact on disk is missing, unfinished, damaged, made with other settings, or of another schema."""


class DataError(PrefpipeError, ValueError):
    """Input rows cannot be used: too many bad rows, an unreadable file, or a text that its template cannot render."""


class ApiError(PrefpipeError, RuntimeError):
    """A server refuses every request, too many requests fail, or the next one might exceed the budget."""
