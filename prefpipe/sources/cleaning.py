"""Prompts that a mixture should not hold: near-duplicates, and those of evaluation sets."""

import logging
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prefpipe.records import Message
from prefpipe.settings import DataMixerConfig
from prefpipe.sources.near_duplicates import Near, NgramOverlap, Sketches
from prefpipe.sources.store import RowStore
from prefpipe.words import words

log = logging.getLogger(__name__)


class Removal(NamedTuple):
    """Why a prompt goes. code: see prefpipe/sources/codes.py."""

    code: str
    message: str


@dataclass
class Cleaning:
    """prompts: number of a prompt (RowStore.prompt) → why all of its rows go. report: for the manifest."""

    prompts: dict[int, Removal] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def prompt_text(messages: list[Message]) -> str:
    """What prompts are compared by: all turns but the system's, which many prompts share."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def clean(store: RowStore, mixer: DataMixerConfig) -> Cleaning:
    """Which prompts go, by mixer.near_duplicates and mixer.decontaminate; nothing where neither is set.

    Prompts of sources with heldout=all are kept whatever they are like. Of prompts that are near to each other the
    first in reading order stays, but held-out ones come before those that are trained on. Only the latter are looked
    for in evaluation sets.
    """
    found = Cleaning()
    if mixer.near_duplicates is None and not mixer.decontaminate:
        return found
    order = _order(store, mixer)
    sets = [store.evaluation.get(store.prompt(row), "") for row in order]
    num_tests = sum(name in mixer.decontaminate for name in sets)
    num_fixed = sum(bool(name) for name in sets)

    def text(place: int) -> str:
        return prompt_text(store.load(order[place])[0].messages)

    sketches = Sketches()
    tests: list[tuple[int, list[str]]] = []
    overlap: NgramOverlap | None = None
    leaks: dict[int, tuple[str, Near]] = {}
    for place in range(len(order)):
        present = words(text(place))
        sketches.add(present)
        if place < num_tests:
            tests.append((place, present))
            continue
        if num_tests and overlap is None:
            size, share = mixer.decontaminate_ngram, mixer.decontaminate_share
            assert size is not None
            assert share is not None
            overlap = NgramOverlap(tests, size=size, share=share)
            tests.clear()
        is_trained = store.prompt(order[place]) not in store.heldout
        if overlap is not None and is_trained and (near := overlap.find(present)):
            leaks[place] = ("words", near)
    if num_tests:
        assert mixer.decontaminate_similarity is not None
        similar = sketches.near(
            mixer.decontaminate_similarity, text, fixed=num_tests, among=False, without=leaks.keys()
        )
        leaks |= {
            place: ("similarity", near)
            for place, near in similar.items()
            if store.prompt(order[place]) not in store.heldout
        }
    removed_by = Counter((sets[near.place], how) for how, near in leaks.values())
    if mixer.decontaminate:
        found.report["decontamination"] = {
            name: {"prompts": sets.count(name), "by_words": removed_by[name, "words"]}
            | {"by_similarity": removed_by[name, "similarity"]}
            for name in mixer.decontaminate
        }
    for place, (how, near) in leaks.items():
        what = "of its runs of words" if how == "words" else "similar"
        message = (
            f"the prompt at {store.where(order[near.place])} of the evaluation set {sets[near.place]} is in this one "
            f"({near.similarity:.2f} {what})"
        )
        found.prompts[store.prompt(order[place])] = Removal("LEK", message)
    if mixer.near_duplicates is not None:
        near_ones = sketches.near(mixer.near_duplicates, text, fixed=num_fixed, without=leaks.keys())
        for place, near in near_ones.items():
            message = f"the prompt is {near.similarity:.2f} similar to that at {store.where(order[near.place])}"
            found.prompts[store.prompt(order[place])] = Removal("SIM", message)
        found.report["near_duplicates"] = {"prompts": len(order), "removed": len(near_ones)}
    log.info("prepare: %d of %d prompts are near-duplicates or in evaluation sets", len(found.prompts), len(order))
    return found


def _order(store: RowStore, mixer: DataMixerConfig) -> "array[int]":
    """A row of each prompt: of the sets to decontaminate from, of other evaluation sets, held-out ones, all others."""
    ranks: tuple[array[int], ...] = (array("Q"), array("Q"), array("Q"), array("Q"))
    seen: set[int] = set()
    for row in range(len(store)):
        number = store.prompt(row)
        if number in seen:
            continue
        seen.add(number)
        name = store.evaluation.get(number)
        rank = 3 - (number in store.heldout) if name is None else 1 - (name in mixer.decontaminate)
        ranks[rank].append(row)
    return sum(ranks[1:], ranks[0])
