"""Figures of `diffusion.flex`, drawn from its stored metrics and summary, and the page that shows a plan growing."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effml_shared.files import write_whole

from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.trace import Trace
from effml_diffusion.trace_figure import trace_figure
from effml_diffusion.trace_page import trace_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PAGE", "figures", "plan_page"]

PAGE = "plan.html"
"""File in the run directory: one plan, animated."""

_COLORS = {
    "FlexMDM": "#1f6fb4",
    "FlexMDM, distribution head": "#14713d",
    "MDM, equal spacing": "#c2711f",
    "MDM, packed legs": "#7a4fb0",
    "MDM, true length": "#6b7280",
    "MDM, padded canvas": "#c2711f",
}


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw success against sampling steps, lengths of lines beside the data's, and one plan at several steps."""
    if "plans" not in summary:
        return {}
    drawn = {
        "Plans: right ones against sampling steps, every seed a dot; dashed, insertion in the last step too": (
            _success(summary["plans"])
        ),
        "Lines: lengths of generated texts, mean over seeds; grey, held-out lines": _lengths(summary),
    }
    if summary["shown"]:
        trace = _trace(summary)
        outcome = "right and without a detour" if summary["shown"]["right"] else "not a right one"
        panels = sorted({0, trace.steps // 4, trace.steps // 2, 3 * trace.steps // 4, trace.steps})
        caption = f"One plan: FlexMDM from waypoints on, {outcome}; {PAGE} in the run directory animates it"
        drawn[caption] = trace_figure(trace, _maze(summary), steps=panels)
    return drawn


def plan_page(directory: Path, summary: dict[str, Any]) -> None:
    """Write the animated page of one plan, self-contained, into a run directory; none if the training diverged."""
    if summary["shown"]:
        title = "A path through given waypoints, by insertion"
        caption = "FlexMDM inserts masks between the waypoints and reveals them, in any order."
        page = trace_page(_trace(summary), _maze(summary), title=title, caption=caption)
        write_whole(directory / PAGE, page)


def _maze(summary: dict[str, Any]) -> Maze:
    stored = summary["maze"]
    return Maze(stored["n"], tuple((a, b) for a, b in stored["passages"]))


def _trace(summary: dict[str, Any]) -> Trace:
    events = [(step, event, row, position, token) for step, event, row, position, token in summary["shown"]["events"]]
    row = events[0][2] if events else 0
    trace = Trace.from_flex(events, _maze(summary).cells, row=row, start=summary["shown"]["start"])
    return Trace(trace.start, trace.events, summary["shown"]["steps"], trace.mask_id)


def _success(plans: dict[str, Any]) -> Figure:
    """Draw adaptive and vanilla order in a panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    for place, order in enumerate(("adaptive", "vanilla"), start=1):
        axes = figure.add_subplot(1, 2, place)
        for method, samplers in plans.items():
            _curve(axes, samplers, order, color=_COLORS[method], label=method)
            if order == "adaptive":
                _curve(axes, samplers, "closing insertion", color=_COLORS[method], linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set(title=f"{order} order", xlabel="sampling steps", ylim=(-2, 103))
        if place == 1:
            axes.set_ylabel("right plans (%)")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
        _plain(axes)
    return figure


def _curve(axes: Axes, samplers: dict[str, list[float | None]], kind: str, *, color: str, **style: Any) -> None:
    points = {}
    for name, values in samplers.items():
        there = [100 * value for value in values if value is not None]
        if name.startswith(f"{kind}, ") and there:
            points[_steps(name)] = there
    if not points:
        return
    axes.plot(list(points), [statistics.fmean(values) for values in points.values()], color=color, **style)
    for steps, dots in points.items():
        axes.plot([steps] * len(dots), dots, "o", color=color, markersize=4, alpha=0.7)


def _lengths(summary: dict[str, Any]) -> Figure:
    """Draw a histogram for each number of sampling steps."""
    from matplotlib.figure import Figure

    steps = sorted({_steps(name) for samplers in summary["lines"].values() for name in samplers})
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    reference = summary["held_out_lengths"]
    for place, count in enumerate(steps, start=1):
        axes = figure.add_subplot(1, max(1, len(steps)), place)
        axes.bar(range(len(reference)), _shares(reference), width=1.0, color="#d8dde2", label="held-out lines")
        for method, samplers in summary["lines"].items():
            for name, histograms in samplers.items():
                there = [histogram for histogram in histograms if histogram is not None]
                if _steps(name) == count and there:
                    pooled = _shares([sum(column) for column in zip(*there, strict=True)])
                    dashed = name.startswith("closing")
                    label = f"{method}, closing insertion" if dashed else method
                    style = "--" if dashed else "-"
                    axes.plot(range(len(pooled)), _smooth(pooled), style, color=_COLORS[method], lw=1.2, label=label)
        axes.set(title=f"{count} sampling steps", xlabel="bytes of a line", ylabel="share" if place == 1 else "")
        if place == 1:
            axes.legend(frameon=False, fontsize=8)
        _plain(axes)
    return figure


def _steps(name: str) -> int:
    found = re.search(r"(\d+) steps$", name)
    return int(found[1]) if found else 0


def _shares(counts: list[int]) -> list[float]:
    return [count / max(sum(counts), 1) for count in counts]


def _smooth(shares: list[float]) -> list[float]:
    """Average over three neighbouring lengths, and fewer at the ends."""
    return [statistics.fmean(shares[max(0, place - 1) : place + 2]) for place in range(len(shares))]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
