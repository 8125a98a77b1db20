"""Figures of `rl.wall`, drawn from its stored metrics and summary."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from effml_rl.experiments.wall_evaluation import PRACTISED, TEST
from effml_rl.experiments.wall_results import BEFORE, CONTROL, FEW, MANY, MORE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures"]

_COLORS = {BEFORE: "#6b7280", CONTROL: "#9aa1ab", MORE: "#c2711f", FEW: "#1f6fb4", MANY: "#14713d"}
_SKILLS = {"plan": "plan", "execute": "execute", "verify": "verify\n(AUROC)", "shortcuts": "shortcuts'\naccuracy"}


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw curves over temperatures, precision problem by problem, skills and knowledge, and rewards in training."""
    drawn = {}
    if "curves" in summary:
        colder = f"the fine-tuned policy read at temperatures {summary['control']:g} times lower"
        drawn = {
            "Temperatures: accuracy and coverage before and after, mean over seeds, each seed a thin line; dashed, the "
            f"control, which has learned nothing: {colder}": _temperatures(summary),
            "Walls: change of the best coverage, one bar per seed, with its 95% interval by paired bootstrap over "
            "problems": _walls(summary),
            "Changes: precision at temperature 1 after less before, problems in the order of precision before; means "
            "over seeds and neighbours, with two standard errors of sampling": _changes(summary),
            "Precision: share of right samples per problem, each temperature sorted by itself, mean over seeds": (
                _sorted(summary)
            ),
            "Skills on test problems: planning, execution and verification; accuracy where shortcuts work; and which "
            "problems are covered. Bars are means, dots seeds": _skills(summary),
        }
    rewards = _rewards(rows, summary)
    return drawn | ({"Rewards: right completions in training, mean over seeds": rewards} if rewards else {})


def _name(policy: str, summary: dict[str, Any]) -> str:
    """Return a policy's name with what it stands for."""
    sizes = summary["sizes"]
    return {
        CONTROL: f"control: logits x {summary['control']:g}",
        FEW: f"GRPO, {sizes['few']} problems",
        MANY: f"GRPO, {sizes['many']} problems",
    }.get(policy, policy)


def _title(problems: str, summary: dict[str, Any]) -> str:
    return f"{summary['sizes']['few']} practised problems" if problems == PRACTISED else "test problems"


def _there(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _temperatures(summary: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, problems in enumerate((PRACTISED, TEST)):
        for row, measure in enumerate(("accuracy", "coverage")):
            axes = grid[row][column]
            for policy, curves in summary["curves"][problems].items():
                there = _there(curves[measure])
                for curve in there:
                    axes.plot(summary["temperatures"], _percent(curve), color=_COLORS[policy], lw=0.7, alpha=0.35)
                if there:
                    mean = _percent([statistics.fmean(at) for at in zip(*there, strict=True)])
                    style = "--" if policy == CONTROL else "-"
                    label = _name(policy, summary)
                    axes.plot(
                        summary["temperatures"], mean, style, marker="o", ms=4, color=_COLORS[policy], label=label
                    )
            axes.set_ylim(0, 102)
            if row == 0:
                axes.set_title(_title(problems, summary), fontsize=10)
            else:
                axes.set_xlabel("sampling temperature")
            if column == 0:
                axes.set_ylabel(f"{measure} (%)")
            _plain(axes)
    _legend(figure, grid[0][0])
    return figure


def _walls(summary: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, problems in zip(grid, (PRACTISED, TEST), strict=True):
        for x, (policy, seeds) in enumerate(summary["walls"][problems].items()):
            there = _there(seeds)
            for number, (delta, low, high) in enumerate(there):
                place = x + 0.2 * (number - (len(there) - 1) / 2)
                axes.bar(place, delta, 0.16, color=_COLORS[policy], alpha=0.55)
                axes.plot([place, place], [low, high], color=_COLORS[policy], lw=1.5)
        names = [
            _name(policy, summary).replace(", ", ",\n").replace(" fine", "\nfine").replace(": ", ":\n")
            for policy in summary["walls"][problems]
        ]
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(_title(problems, summary), fontsize=10)
        _plain(axes)
    grid[0].set_ylabel("change of best coverage (points)")
    return figure


def _changes(summary: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, problems in zip(grid, (PRACTISED, TEST), strict=True):
        for policy, change in summary["changes"][problems].items():
            if change is None:
                continue
            ranks = _ranks(change["delta"])
            if policy == FEW:
                axes.plot(ranks, _percent(change["before"]), ":", color=_COLORS[BEFORE], label="precision before")
            delta, error = _running(change["delta"], change["error"])
            style = "--" if policy == CONTROL else "-"
            axes.plot(ranks, delta, style, lw=1.3, color=_COLORS[policy], label=_name(policy, summary))
            low, high = ([d + sign * 2 * e for d, e in zip(delta, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(ranks, low, high, color=_COLORS[policy], alpha=0.15, linewidth=0)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_title(_title(problems, summary), fontsize=10)
        axes.set_xlabel("problems, the most often solved before first (%)")
        _plain(axes)
    grid[0].set_ylabel("change of precision (points)")
    _legend(figure, grid[0])
    return figure


def _sorted(summary: dict[str, Any]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    policies = list(summary["sorted"][TEST])
    grid = figure.subplots(2, len(policies), sharex=True, sharey=True)
    temperatures = summary["temperatures"]
    colors = colormaps["plasma"]([0.85 * i / max(len(temperatures) - 1, 1) for i in range(len(temperatures))])
    for row, problems in enumerate((PRACTISED, TEST)):
        for column, policy in enumerate(policies):
            axes = grid[row][column]
            for curve, temperature, color in zip(
                summary["sorted"][problems][policy] or [], temperatures, colors, strict=False
            ):
                axes.plot(_ranks(curve), _percent(curve), color=color, lw=1.3, label=f"T = {temperature:g}")
            if row == 0:
                axes.set_title(_name(policy, summary), fontsize=9)
            else:
                axes.set_xlabel("problems (%)")
            if column == 0:
                axes.set_ylabel(f"precision (%)\n{_title(problems, summary)}")
            _plain(axes)
    _legend(figure, grid[0][0])
    return figure


def _skills(summary: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    policies = list(summary["skills"])
    for place, policy in enumerate(policies):
        shift, color = 0.17 * (place - (len(policies) - 1) / 2), _COLORS[policy]
        for x, skill in enumerate(_SKILLS):
            _dots(left, x + shift, summary["skills"][policy][skill], color, _name(policy, summary) if x == 0 else None)
        for x, word in enumerate(("known", "unknown")):
            _dots(right, x + shift, summary["known"][policy][word], color, None)
    left.set_xticks(range(len(_SKILLS)), list(_SKILLS.values()))
    share = _there(summary["known_share"])
    known = f" ({100 * statistics.fmean(share):.0f}%)" if share else ""
    right.set_xticks(range(2), [f"path known\n{known.strip()}", "path with a pair\nhardly ever shown"])
    right.set_title("best coverage", fontsize=10)
    left.set_title("skills, and shortcuts", fontsize=10)
    left.set_ylabel("%")
    left.set_ylim(0, 102)
    for axes in (left, right):
        _plain(axes)
    _legend(figure, left)
    return figure


def _dots(axes: Axes, x: float, values: list[float | None], color: str, label: str | None) -> None:
    """Draw a bar to the mean, and the seeds."""
    there = _percent(_there(values))
    if there:
        axes.bar(x, statistics.fmean(there), 0.15, color=color, alpha=0.55, label=label)
        axes.plot([x] * len(there), there, "o", color=color, markersize=3.5)


def _rewards(rows: list[dict[str, Any]], summary: dict[str, Any]) -> Figure | None:
    """Draw the mean reward of each reinforced policy against steps, averaged over windows of a twentieth."""
    from matplotlib.figure import Figure

    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.get("reward") is not None:
            found.setdefault(row["trial"].partition("/")[0], {}).setdefault(row["trial"], []).append(row["reward"])
    if not found:
        return None
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for policy, trials in found.items():
        length = min(map(len, trials.values()))
        mean = [statistics.fmean(at) for at in zip(*(of[:length] for of in trials.values()), strict=True)]
        window = max(1, length // 20)
        label = _name(policy, summary) if "sizes" in summary else policy
        smooth = [statistics.fmean(mean[max(0, i + 1 - window) : i + 1]) for i in range(length)]
        axes.plot(range(1, length + 1), _percent(smooth), color=_COLORS.get(policy), label=label)
    axes.set(xlabel="steps", ylabel="right completions (%)")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


def _percent(values: list[float]) -> list[float]:
    return [100 * value for value in values]


def _ranks(values: list[float]) -> list[float]:
    return [100 * (i + 0.5) / len(values) for i in range(len(values))]


def _running(values: list[float], errors: list[float]) -> tuple[list[float], list[float]]:
    """Average over a fifteenth of the places or so, less at the ends; return means and their errors in percent."""
    half, means, spreads = len(values) // 32, [], []
    for i in range(len(values)):
        span = slice(max(0, i - half), i + half + 1)
        means.append(100 * statistics.fmean(values[span]))
        spreads.append(100 * math.hypot(*errors[span]) / len(errors[span]))
    return means, spreads


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(len(labels), 5 if max(map(len, labels)) < 12 else 3),
            frameon=False,
            fontsize=8,
        )


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
