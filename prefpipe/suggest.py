"""What a user may have meant: the nearest key or option, and where it lives. No Hydra here: conf/ and dataclasses."""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from prefpipe import settings
from prefpipe.components import COMPONENTS
from prefpipe.config import DATA_GROUPS, RunConfig

KEYS_WITHOUT_GROUP: dict[str, type] = {
    "inputs": settings.InputsConfig,
    "preview": settings.PreviewConfig,
    "browse": settings.BrowseConfig,
}


def groups_and_options(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Group → its options, as the folders and YAML files of conf/ (and of --config-dir) say."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.glob("*/**/*.yaml"):
            group, option = path.parent.relative_to(folder).as_posix(), path.stem
            found.setdefault(group, set()).add(option)
    return {group: sorted(found[group]) for group in sorted(found)}


def declared_keys() -> dict[str, list[str]]:
    """Every key that some choice of options has → the options that bring it, [] for keys that are always there."""
    keys: dict[str, list[str]] = {}
    for field in dataclasses.fields(RunConfig):
        name = field.name
        if name in COMPONENTS:
            for option, cls in COMPONENTS[name].items():
                prefix = f"task.{option}" if name == "task" else name
                for key in dataclasses.fields(cls):
                    keys.setdefault(f"{prefix}.{key.name}", []).append(f"{name}={option}")
        elif name in DATA_GROUPS or name in KEYS_WITHOUT_GROUP:
            cls = KEYS_WITHOUT_GROUP.get(name) or DATA_GROUPS[name]
            keys |= {f"{name}.{key.name}": [] for key in dataclasses.fields(cls)}
        else:
            keys[name] = []
    return keys


def nearest(word: str, words: Iterable[str], limit: int = 3) -> list[str]:
    """At most `limit` of the words that `word` may be a slip of, the likeliest first.

    A key that ends alike in another place comes after every key that is one slip away: loss.max_steps, gamma.
    """
    from rapidfuzz.distance import OSA

    def distance(other: str) -> float:
        tail, other_tail = word.rpartition(".")[2], other.rpartition(".")[2]
        elsewhere = 1.5 + OSA.distance(tail, other_tail) if "." in other else float("inf")
        return min(OSA.distance(word, other), elsewhere)

    scored = sorted((distance(other), other) for other in set(words))
    furthest = min(scored[0][0] + 1.5, max(2, len(word) / 2)) if scored else 0
    return [other for score, other in scored[:limit] if score <= furthest]


def unknown_key(key: str, present: Collection[str], chosen: Mapping[str, Any], groups: Mapping[str, list[str]]) -> str:
    """One line about a key that the chosen options do not have.

    Args:
        present: the keys that they have. chosen: group → option, empty where that is not known.
    """
    declared = declared_keys()
    message = f"no such config key: {key}"
    if key in declared:
        return message + _where_it_lives(key, declared, present, chosen)
    words = {*present, *declared} | ({group for group in groups if "/" not in group} if "." not in key else set())
    guesses = nearest(key, words)
    if not guesses:
        return f"{message}; `prefpipe --cfg job` prints the keys that there are"
    named = [f"{guess} (a group: {' '.join(groups[guess])})" if guess in groups else guess for guess in guesses]
    return f"{message}; nearest: {', '.join(named)}" + _where_it_lives(guesses[0], declared, present, chosen)


def unknown_option(group: str, option: str, options: Collection[str], groups: Mapping[str, list[str]]) -> str:
    """One line about an option that its group does not have."""
    message = f"no such option: {group}={option}"
    if not options:
        known = nearest(group, groups)
        return f"{message}; there is no group {group}" + (f"; nearest: {', '.join(known)}" if known else "")
    if guesses := nearest(option, options):
        message += f"; nearest: {', '.join(f'{group}={guess}' for guess in guesses)}"
    if homes := [home for home, names in groups.items() if option in names]:
        message += f"; {option} belongs to {_or(homes)}"
    return f"{message}; {group} has {', '.join(sorted(options))}"


def one_line(text: object) -> str:
    """Any message without its line breaks."""
    return re.sub(r"\s+", " ", str(text)).strip()


def short_hash(text: str) -> str:
    """8 hex digits that tell two texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _where_it_lives(
    key: str, declared: Mapping[str, list[str]], present: Collection[str], chosen: Mapping[str, Any]
) -> str:
    if key in present or not declared.get(key):
        return ""
    group = key.partition(".")[0]
    text = f"; {key.rpartition('.')[2]} belongs to {_or(declared[key])}"
    if group not in chosen:
        return text
    option = chosen[group]
    return f"{text}; you chose {group}={option if isinstance(option, str) else '[' + ','.join(option) + ']'}"


def _or(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
