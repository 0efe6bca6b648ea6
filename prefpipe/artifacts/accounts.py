"""Row accounting: every row that goes into a part comes out of it, or is counted with the reason why not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Account:
    """What became of the input rows of one part.

    rows_in, rows_out: input rows (prompts, files' lines) read for this part, and those of them that are in it.
    filtered: reason → rows left out on purpose. quarantined: bad rows, each with at least a "code".
    kept: what is lacking → rows that are in all the same. measured: counts of another kind, see `Draft.measured`.
    """

    rows_in: int
    rows_out: int
    filtered: Mapping[str, int] = field(default_factory=dict)
    quarantined: Sequence[Mapping[str, Any]] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    measured: Mapping[str, int] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """For the part's note. Raises AssertionError when rows are lost, which no input can cause."""
        left_out = dict(sorted(self.filtered.items()))
        codes = dict(sorted(Counter(str(row["code"]) for row in self.quarantined).items()))
        if self.rows_in != self.rows_out + sum(left_out.values()) + sum(codes.values()):
            raise AssertionError(
                f"rows lost: {self.rows_in} in, {self.rows_out} out, filtered {left_out}, quarantined {codes}"
            )
        data: dict[str, Any] = {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "filtered": left_out,
            "quarantined": codes,
        }
        data |= {"kept": dict(self.kept)} if self.kept else {}
        return data | ({"measured": dict(self.measured)} if self.measured else {})


def describe_counts(counts: Mapping[str, Any]) -> str:
    """Row accounting as one line for the log."""
    text = f"{counts['rows_out']} of {counts['rows_in']} rows used"
    for kind in ("filtered", "quarantined", "kept"):
        if counts.get(kind):
            text += f"; {kind}: " + ", ".join(f"{reason} {n}" for reason, n in counts[kind].items())
    return text


def summed(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of all parts, for the manifest."""
    counts: dict[str, Any] = {name: sum(note[name] for note in notes) for name in ("rows_in", "rows_out")}
    for kind in ("filtered", "quarantined"):
        counts[kind] = _added(notes, kind)
    kept = _added(notes, "kept")
    return counts | ({"kept": kept} if kept else {})


def _added(notes: Sequence[Mapping[str, Any]], kind: str) -> dict[str, int]:
    return dict(sorted(sum((Counter(note.get(kind, {})) for note in notes), Counter[str]()).items()))
