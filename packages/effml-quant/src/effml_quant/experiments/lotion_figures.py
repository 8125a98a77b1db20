"""Figures of `quant.lotion`, drawn from its stored metrics and summary."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from effml_shared.experiments import interval
from effml_shared.trainings import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures"]

COLORS = {"PTQ": "#6b7280", "QAT": "#c2711f", "RAT": "#7a4fb0", "LSQ": "#14713d", "LOTION": "#1f6fb4"}
VARIANTS = {"LOTION, strength 0.3": "#7db3dc", "LOTION, scale detached": "#b3261e"}


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw final losses on text, what quantising cost, where weights lie, and the problems without data."""
    if "linear" not in summary:
        return {}
    return {
        "Text: held-out loss at the weights deployed, mean and 95% interval over seeds (dots); rings: GPTQ": _final(
            summary
        ),
        "Cost of the cast: quantised against full-precision held-out loss; on the line it costs nothing": _cost(
            summary
        ),
        "Grid: where weights lie in their cells after training on text, one seed": _grid(summary),
        "Quadratic: mean loss at cast weights on the way, each method at its best learning rate": _progress(rows),
        "Least squares: final loss at cast weights, seed by seed, and the gain over QAT against width": _linear(
            summary
        ),
    }


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _color(key: str) -> str:
    return COLORS[key.partition(" per ")[0]]


def _interval(axes: Axes, place: float, values: list[float], color: str) -> None:
    mean, low, high = interval(values)
    error = [[mean - low], [high - mean]] if math.isfinite(low) else None
    axes.errorbar(mean, place, xerr=error, fmt="o", color=color, capsize=4)
    axes.plot(values, [place] * len(values), ".", color="black", markersize=4)


def _final(summary: dict[str, Any]) -> Figure:
    finals = summary["finals"]
    figure = _figure(7.5, 1.0 + 0.4 * len(finals))
    axes = figure.add_subplot()
    for place, (key, stored) in enumerate(finals.items()):
        _interval(axes, -place, numbers(stored), _color(key))
        gptq = summary["gptq"].get(key, [])
        axes.plot(gptq, [-place] * len(gptq), "o", markerfacecolor="none", color=_color(key), markersize=7)
    axes.set_yticks([-place for place in range(len(finals))], list(finals))
    axes.set_xlabel("held-out loss (nats)")
    _plain(axes)
    return figure


def _cost(summary: dict[str, Any]) -> Figure:
    figure = _figure(5.5, 4.5)
    axes = figure.add_subplot()
    full = [numbers(values) for values in summary["full"].values()]
    for (key, stored), across in zip(summary["finals"].items(), full, strict=True):
        marker = "o" if key.endswith("tensor") else "^"
        axes.plot(across, numbers(stored), marker, color=_color(key), label=key)
    line = [value for values in full for value in values if math.isfinite(value)]
    if line:
        axes.plot([min(line), max(line)], [min(line), max(line)], "--", color="black", linewidth=1)
    axes.set(xlabel="full-precision loss (nats)", ylabel="loss at the weights deployed (nats)")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


def _grid(summary: dict[str, Any]) -> Figure:
    scales = list(dict.fromkeys(key.partition(" per ")[2] for key in summary["distance"]))
    figure = _figure(7.5, 3.4)
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for axes, scale in zip(panels, scales, strict=True):
        for key, shares in summary["distance"].items():
            if shares is not None and key.endswith(f" per {scale}"):
                edges = [0.5 * i / len(shares) for i in range(len(shares) + 1)]
                axes.stairs(
                    [100 * share for share in shares], edges, color=_color(key), label=key.partition(" per ")[0]
                )
        axes.set_title(f"one scale per {scale}", fontsize=9, loc="left")
        axes.set_xlabel("distance to the nearest grid point (of the cell)")
        _plain(axes)
    panels[0].set_ylabel("% of weights")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _progress(rows: list[dict[str, Any]]) -> Figure:
    figure = _figure(7.5, 3.6)
    axes = figure.add_subplot()
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        problem, _, method = row["trial"].partition("/")
        if problem == "quadratic" and row.get("eval_rtn") is not None:
            curves[method].append((row["step"], row["eval_rtn"]))
    for method, points in curves.items():
        color = {**COLORS, **VARIANTS}[method]
        axes.plot([step for step, _ in points], [value for _, value in points], color=color, label=method)
    axes.set(yscale="log", xlabel="steps", ylabel="loss at cast weights")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _plain(axes)
    return figure


def _linear(summary: dict[str, Any]) -> Figure:
    figure = _figure(7.5, 3.4)
    losses, gains = figure.subplots(1, 2, width_ratios=[3, 2])
    quadratic = summary["linear"]["quadratic"]
    for place, (method, found) in enumerate(quadratic.items()):
        _interval(losses, -place, numbers(found["rtn"]), {**COLORS, **VARIANTS}[method])
    losses.set_yticks([-place for place in range(len(quadratic))], list(quadratic), fontsize=8)
    losses.set_xlabel("quadratic: loss at cast weights")
    layers = {problem: found for problem, found in summary["linear"].items() if problem != "quadratic"}
    for place, methods in enumerate(layers.values()):
        qat, ours = (numbers(methods[method]["rtn"]) for method in ("QAT", "LOTION"))
        mean, low, high = interval([theirs - mine for theirs, mine in zip(qat, ours, strict=True)])
        error = [[mean - low], [high - mean]] if math.isfinite(low) else None
        gains.errorbar(place, mean, yerr=error, fmt="o", color=COLORS["LOTION"], capsize=4)
    gains.set_xticks(range(len(layers)), [problem.rpartition(" ")[2] for problem in layers])
    gains.axhline(0, color="black", linewidth=0.8)
    gains.set(xlabel="width of the two layers", ylabel="loss of QAT minus LOTION")
    for axes in (losses, gains):
        _plain(axes)
    return figure
