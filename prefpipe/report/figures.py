"""Figures as SVG, in colours for light and for dark pages. The same numbers give the same bytes."""

import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefpipe.records import EvalResult
from prefpipe.report.streams import Histogram
from prefpipe.report.text import visible


@dataclass(frozen=True)
class Theme:
    """Okabe and Ito's palette, which colour-blind readers can tell apart; on dark pages its lighter half."""

    ink: str
    faint: str
    chosen: str
    rejected: str
    plain: str
    before: str


LIGHT = Theme("#3b3f46", "#d9dce1", chosen="#0072b2", rejected="#d55e00", plain="#009e73", before="#8a8f98")
DARK = Theme("#c3c8d0", "#3a3f47", chosen="#56b4e9", rejected="#e69f00", plain="#2ec4a0", before="#7d838d")

SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "prefpipe",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.5,
    "path.simplify": True,
    # A label of ours may quote a task's name; a "$" in it must not start a formula.
    "text.parse_math": False,
    "text.usetex": False,
}


@dataclass(frozen=True)
class Picture:
    """One figure for both themes, as data: URIs."""

    light: str
    dark: str
    caption: str


@dataclass(frozen=True)
class Line:
    """One curve, broken between its segments. role: which of the theme's colours."""

    label: str
    segments: Sequence[Sequence[tuple[float, float]]]
    role: str = "plain"
    dashed: bool = False


Plot = Callable[[Axes], None]


def draw(plot: Plot, caption: str, *, width: float = 4.4, height: float = 2.5) -> Picture:
    """Run `plot` on fresh axes; the dark figure is the light one in other colours."""
    light = _svg(plot, width, height)
    dark = light
    for field in dataclasses.fields(Theme):
        dark = dark.replace(getattr(LIGHT, field.name), getattr(DARK, field.name))
    return Picture(_data_uri(light), _data_uri(dark), caption)


def _svg(plot: Plot, width: float, height: float) -> str:
    keys = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    colours: dict[str, Any] = dict.fromkeys(keys, LIGHT.ink)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the bytes
        settings: Any = matplotlib.rcParams
        settings.update(SETTINGS | colours | {"grid.color": LIGHT.faint})
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.grid(visible=True, axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        plot(axes)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue().decode()


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")


def curves(lines: Sequence[Line], caption: str, *, ends: Sequence[float] = ()) -> Picture:
    """Lines over optimizer steps; `ends` are the steps where one round ends and the next begins."""

    def plot(axes: Axes) -> None:
        for line in lines:
            for number, points in enumerate(line.segments):
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    "--" if line.dashed else "-",
                    marker="o" if len(points) < 12 else "",
                    markersize=3,
                    color=getattr(LIGHT, line.role),
                    label=line.label if number == 0 else None,
                )
        for end in ends:
            axes.axvline(end, color=LIGHT.before, linewidth=1.0, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("optimizer step")
        _legend(axes, len(lines))

    return draw(plot, caption)


def lengths(chosen: Histogram, rejected: Histogram, caption: str) -> Picture:
    """Chosen against rejected, in characters; the longest half per cent are left out so that the rest can be seen."""
    tops = [top for top in (chosen.quantile(0.995), rejected.quantile(0.995)) if top is not None]
    top = max([*tops, 1.0])

    def plot(axes: Axes) -> None:
        bins = [top * i / 40 for i in range(41)] if top > 40 else [i - 0.5 for i in range(int(top) + 2)]
        for found, role, filled in ((chosen, LIGHT.chosen, True), (rejected, LIGHT.rejected, False)):
            label = "chosen" if filled else "rejected"
            axes.hist(
                list(found.counts),
                bins=bins,
                weights=list(found.counts.values()),
                histtype="stepfilled" if filled else "step",
                color=role,
                alpha=0.55 if filled else 1.0,
                linewidth=1.5,
                label=label,
            )
            if found.mean is not None and found.mean <= top:
                axes.axvline(found.mean, color=role, linewidth=1.2, linestyle="-" if filled else "--")
        axes.set_xlabel("characters (lines: means)")
        axes.set_ylabel("pairs")
        _legend(axes, 2)

    return draw(plot, caption)


def margins(found: Histogram, caption: str) -> Picture:
    """Chosen score minus rejected score: bars on the values when there are few different ones, else 30 bins."""

    def plot(axes: Axes) -> None:
        values, counts = list(found.counts), list(found.counts.values())
        if len(values) <= 12:
            gaps = [b - a for a, b in zip(sorted(values), sorted(values)[1:], strict=False)]
            axes.bar(values, counts, width=0.6 * min(gaps, default=1.0), color=LIGHT.plain)
            if len(values) == 1:
                axes.set_xlim(values[0] - 2, values[0] + 2)
        else:
            axes.hist(values, bins=30, weights=counts, color=LIGHT.plain)
        axes.set_xlabel("score margin, chosen minus rejected")
        axes.set_ylabel("pairs")

    return draw(plot, caption)


def results(named: Sequence[tuple[str, EvalResult]], caption: str) -> Picture:
    """One metric over the rounds: bars with their 95 % intervals, the starting model in grey."""

    def plot(axes: Axes) -> None:
        for place, (name, result) in enumerate(named):
            error = [[max(0.0, result.value - result.low)], [max(0.0, result.high - result.value)]]
            colour = LIGHT.before if name == "before" else LIGHT.chosen
            axes.bar(place, result.value, width=0.55, color=colour, alpha=0.85)
            axes.errorbar(place, result.value, yerr=error, color=LIGHT.ink, capsize=4, linewidth=1.2)
        axes.set_xticks(range(len(named)), [visible(name) for name, _ in named])
        axes.set_xlim(-0.6, max(len(named), 3) - 0.4)
        if all(result.low >= 0 and result.high <= 1 for _, result in named):
            axes.set_ylim(0, 1)

    return draw(plot, caption)


def sweep(points: Sequence[tuple[str, float | None, EvalResult]], caption: str) -> Picture:
    """Points of a sweep from best to worst with their 95 % intervals; a hollow mark is the value before."""

    def plot(axes: Axes) -> None:
        for place, (_, before, result) in enumerate(points):
            error = [[max(0.0, result.value - result.low)], [max(0.0, result.high - result.value)]]
            axes.errorbar(result.value, place, xerr=error, fmt="o", color=LIGHT.chosen, ecolor=LIGHT.chosen, capsize=3)
            if before is not None:
                axes.plot(before, place, "o", markerfacecolor="none", markeredgecolor=LIGHT.before)
        axes.set_yticks(range(len(points)), [visible(_short(name)) for name, _, _ in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", linewidth=0.6)

    return draw(plot, caption, width=7.2, height=1.0 + 0.28 * len(points))


def _short(name: str, limit: int = 48) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _legend(axes: Axes, num_lines: int) -> None:
    if num_lines > 1:
        axes.legend(frameon=False, fontsize=8, loc="best")
