"""What was loaded last is kept, by what was asked for."""

from dataclasses import dataclass
from pathlib import Path

from prefpipe.kept import keep_last


@dataclass
class Settings:
    """Plain data, without a hash."""

    path: str


def test_the_last_two_are_kept_and_the_oldest_goes_before_another_is_made():
    alive: list[str] = []

    class Model:
        def __init__(self, name: str) -> None:
            assert len(alive) < 2
            self.name = name
            alive.append(name)

        def __del__(self) -> None:
            alive.remove(self.name)

    @keep_last(2)
    def load(settings: Settings, folder: Path, *, key: str = "") -> Model:
        return Model(f"{settings.path}{key}")

    first = id(load(Settings("a"), Path("x")))
    load(Settings("b"), Path("x"))
    assert id(load(Settings("a"), Path("x"))) == first
    load(Settings("a"), Path("x"), key="c")
    assert sorted(alive) == ["a", "ac"]
    load(Settings("d"), Path("x"))
    assert sorted(alive) == ["ac", "d"]
