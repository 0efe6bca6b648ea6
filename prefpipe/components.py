"""The swappable parts of a run.

A component is a dataclass: its fields are its config, its one public method is its job.
`register` is all the machinery there is.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

COMPONENTS: dict[str, dict[str, type[Any]]] = {
    kind: {} for kind in ("generator", "sampling", "scorer", "pairer", "loss", "task", "tracking")
}
"""kind → name → class; `<kind>=<name>` on the command line, `conf/<kind>/<name>.yaml` on disk."""


def register(kind: str) -> Callable[[T], T]:
    """Offer a dataclass as `<kind>=<default of its field name>` on the command line."""

    def add(cls: T) -> T:
        name: str = cls.name  # type: ignore[attr-defined]
        if name in COMPONENTS[kind]:
            raise ValueError(f"two {kind}s are named {name!r}: {COMPONENTS[kind][name]} and {cls}")
        COMPONENTS[kind][name] = cls
        return cls

    return add


def runtime(default: Any) -> Any:
    """A field of a component that says how a result is reached, never what it is: a time-out, a price, a folder.

    Manifests leave it out, so it may be changed between the attempts of a run.
    """
    return field(default=default, metadata={"recorded": False})
