"""Outcomes of a sweep as a picture: quality against cost, and costs as predicted against costs as measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .frame import UNITS, Outcome, Sweep

COLOURS = ("#0b6e99", "#d1660d", "#4b8b3b", "#8a4fa3", "#b5342f", "#7a6a53")
"""Of series, in their order; they differ in brightness too, for those who see no colours."""

MARKERS = "osD^vP"
GREY = "#555555"
RIVAL_DASHES = ("--", ":", "-.")
OFFSETS = ((6, 4), (-11, -11), (6, -11), (-11, 5))
"""Where a series' labels stand from their points: points of several series are often near each other."""


def plot(sweep: Sweep, outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw quality against cost; beside it, where costs are predicted, predictions against measurements.

    Settings with a problem, or without the two numbers, are left out; rivals, whose quality is the unchanged model's, are
    lines at their cost, where that is in the picture.

    Args:
        sweep: says which cost and which quality.
        outcomes: what was found.
        path: where the picture goes; its ending decides the format.

    Raises:
        ValueError: matplotlib does not know the ending.
    """
    from matplotlib.figure import Figure

    shown = [o for o in outcomes if not o.problem and sweep.x in o.cost and sweep.y in o.quality]
    ours = [o for o in shown if not o.setting.rival]
    foreseen = [o for o in ours if sweep.x in o.predicted]
    figure = Figure(figsize=(12 if foreseen else 7.5, 5), layout="constrained", dpi=130)
    parts: Any = figure.subplots(1, 2, width_ratios=(1.6, 1)) if foreseen else [figure.subplots()]
    figure.suptitle(f"{sweep.title[0].upper()}{sweep.title[1:]}", fontsize=13)
    looks = {name: k for k, name in enumerate(dict.fromkeys(o.setting.series for o in ours if o.setting.series))}
    _draw_trade(parts[0], sweep, ours, looks)
    _draw_rivals(parts[0], sweep, [o for o in shown if o.setting.rival])
    if parts[0].get_legend_handles_labels()[0]:
        parts[0].legend(fontsize=9, frameon=False)
    if foreseen:
        _draw_predictions(parts[1], sweep, foreseen, looks)
    figure.savefig(path)


def _draw_trade(axes: Any, sweep: Sweep, ours: Sequence[Outcome], looks: dict[str, int]) -> None:
    _prepare(axes, UNITS.get(sweep.x, sweep.x), UNITS.get(sweep.y, sweep.y))
    single = [o for o in ours if not o.setting.series]
    for name, look in looks.items():
        line = [o for o in ours if o.setting.series == name]
        start = [o for o in single if not o.setting.passes][:1]
        joined = sorted([*start, *line], key=lambda o: o.cost[sweep.x])
        axes.plot(*_points(sweep, joined), color=_colour(look), linewidth=1.4, alpha=0.6, zorder=2)
        axes.scatter(*_points(sweep, line), color=_colour(look), marker=_marker(look), s=34, zorder=3, label=name)
        for outcome in line:
            _annotate(axes, sweep, outcome, _colour(look), look)
    axes.scatter(*_points(sweep, single), color="black", marker="*", s=110, zorder=4)
    for outcome in single:
        _annotate(axes, sweep, outcome, "black")


def _draw_rivals(axes: Any, sweep: Sweep, rivals: Sequence[Outcome]) -> None:
    # Ours decide what is shown: a rival far away would press them together, and its number stands in the legend.
    left, right = axes.get_xlim()
    for outcome, dashes in zip(rivals, RIVAL_DASHES * len(rivals), strict=False):
        place = outcome.cost[sweep.x]
        label = f"{outcome.setting.name} {place:.3g}" + (" (right of this)" if place > right else "")
        axes.axvline(place, color=GREY, linestyle=dashes, linewidth=1, label=label, zorder=1)
    axes.set_xlim(left, right)


def _draw_predictions(axes: Any, sweep: Sweep, foreseen: Sequence[Outcome], looks: dict[str, int]) -> None:
    _prepare(axes, "predicted from flops and bytes", "measured")
    pairs = [(o.predicted[sweep.x], o.cost[sweep.x]) for o in foreseen]
    least, most = min(map(min, pairs)), max(map(max, pairs))
    axes.plot([least, most], [least, most], color=GREY, linewidth=1, linestyle="--", zorder=1)
    for outcome, (x, y) in zip(foreseen, pairs, strict=True):
        look = looks.get(outcome.setting.series)
        style = (
            {"color": "black", "marker": "*", "s": 110} if look is None else {"color": _colour(look), "marker": _marker(look)}
        )
        axes.scatter([x], [y], zorder=3, **style)
    axes.set_title(UNITS.get(sweep.x, sweep.x), fontsize=10, color=GREY)


def _prepare(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.12)


def _points(sweep: Sweep, outcomes: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    return [o.cost[sweep.x] for o in outcomes], [o.quality[sweep.y] for o in outcomes]


def _annotate(axes: Any, sweep: Sweep, outcome: Outcome, colour: str, look: int = 0) -> None:
    place, offset = (outcome.cost[sweep.x], outcome.quality[sweep.y]), OFFSETS[look % len(OFFSETS)]
    axes.annotate(outcome.setting.label, place, offset, textcoords="offset points", fontsize=8, color=colour)


def _colour(look: int) -> str:
    return COLOURS[look % len(COLOURS)]


def _marker(look: int) -> str:
    return MARKERS[look % len(MARKERS)]
