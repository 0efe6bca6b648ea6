"""What was loaded last, for those who ask for the same again."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def keep_last(number: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function to keep its results for the `number` different arguments that were asked for last.

    Arguments are plain data, such as settings, and compared by their text. One more result is made only after the
    oldest was let go: there may be no room for both models.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        kept: dict[str, T] = {}

        @wraps(make)
        def found(*args: P.args, **kwargs: P.kwargs) -> T:
            key = repr((args, kwargs))
            if key in kept:
                kept[key] = kept.pop(key)
                return kept[key]
            while len(kept) >= number:
                del kept[next(iter(kept))]
            kept[key] = make(*args, **kwargs)
            return kept[key]

        return found

    return decorate
