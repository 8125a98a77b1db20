"""Figures of `quant.mx`, drawn from its stored metrics and summary."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
from effml_shared.experiments import interval
from effml_shared.trainings import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures"]

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#c2711f", "#14713d", "#6b7280"
COLORS = {
    "all E4M3": BLUE,
    "norms exempt": GREEN,
    "rceil": ORANGE,
    "forward only": "#7db3dc",
    "all E3M2": "#7a4fb0",
    "all E2M1": "#b3261e",
}
BRANCHES = {
    "float32": "black",
    "none": "#b3261e",
    "fp32": GREY,
    "bump_exponent": ORANGE,
    "no_norm_quant": GREEN,
    "bf16_act_all": BLUE,
    "forward_only": "#7a4fb0",
}


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw the bias of the gradient, what moved gains do, the precision matrix and the interventions."""
    if "matrix" not in summary:
        return {}
    return {
        "Bias: |quantised gradient - exact| / |exact| at the same weights, by step (median; thin: seeds)": _bias(
            summary
        ),
        "Gains: the same model, its gains moved along an exact symmetry (mean, 95% interval, seeds)": _rescaled(
            summary
        ),
        "Matrix: held-out loss of the language model above float32, weights by activations and gradients": _matrix(
            summary
        ),
        "Interventions: training loss of the proxy over float32's, one seed (mean over 20 steps)": _traces(
            rows, summary
        ),
    }


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _bias(summary: dict[str, Any]) -> Figure:
    figure = _figure(7.5, 4.0)
    axes = figure.add_subplot()
    found = summary["rho"]
    steps = sorted(found[0], key=int)
    for name, color in COLORS.items():
        curves = [[rho[step][name] for step in steps] for rho in found]
        for curve in curves:
            axes.plot(range(len(steps)), curve, color=color, alpha=0.25, linewidth=0.8)
        middle = [statistics.median(values) for values in zip(*curves, strict=True)]
        axes.plot(range(len(steps)), middle, "o-", color=color, label=name)
    axes.set_xticks(range(len(steps)), steps)
    axes.set(xlabel="float32 training steps before", ylabel="rho", yscale="log")
    axes.legend(frameon=False, ncols=2)
    _plain(axes)
    return figure


def _rescaled(summary: dict[str, Any]) -> Figure:
    figure = _figure(7.5, 5.0)
    panels = figure.subplots(2, 1, sharex=True)
    found = summary["rescaled"]
    factors, names = list(found[0]), list(found[0][next(iter(found[0]))]["rho"])
    for axes, key, label in zip(panels, ("rho", "loss"), ("rho", "loss over float32's"), strict=True):
        for place, name in enumerate(names):
            for at, factor in enumerate(factors):
                values = [seed[factor][key][name] for seed in found]
                mean, low, high = interval(values)
                error = [[mean - low], [high - mean]] if math.isfinite(low) else None
                x = at + 0.26 * (place - 1)
                style = {"color": COLORS[name], "width": 0.24, "capsize": 3, "alpha": 0.85}
                axes.bar(x, mean, yerr=error, label=name if at == 0 else None, **style)
                axes.plot([x] * len(values), values, ".", color="black", markersize=3)
        axes.set_ylabel(label)
        _plain(axes)
    panels[1].set_ylim(bottom=min(1.0, *(v for s in found for f in s.values() for v in f["loss"].values())))
    clamped = [statistics.fmean(seed[factor]["clamped"] for seed in found) for factor in factors]
    labels = [f"x {factor}\n{share:.0%} clamp" for factor, share in zip(factors, clamped, strict=True)]
    panels[1].set_xticks(range(len(factors)), labels)
    panels[1].set_xlabel("gains, and the share of them that E4M3 clamps")
    panels[0].legend(frameon=False)
    return figure


def _matrix(summary: dict[str, Any]) -> Figure:
    shape = summary["shape"]
    weights, activations = shape["weights"], shape["activations"]
    figure = _figure(1.6 + 1.3 * len(activations), 1.2 + 0.8 * len(weights))
    axes = figure.add_subplot()
    exact = numbers(summary["matrix"]["float32"])

    def above(weight: str, activation: str) -> tuple[float, str]:
        losses = numbers(summary["matrix"][f"{weight} x {activation}"])
        gaps = [100 * (loss / base - 1) for loss, base in zip(losses, exact, strict=True)]
        if not all(map(math.isfinite, gaps)):
            return math.nan, "diverged"
        mean, low, _ = interval(gaps)
        return mean, f"{mean:+.2f}%" + (f"\n± {mean - low:.2f}" if math.isfinite(low) else "")

    cells = [[above(weight, activation) for activation in activations] for weight in weights]
    values = np.array([[value for value, _ in row] for row in cells])
    finite = values[np.isfinite(values)]
    ends = {"vmin": min(-0.5, *finite), "vmax": max(2.0, *finite)}  # differences below these are noise of few seeds
    image = axes.imshow(values, cmap="viridis_r", aspect="auto", **ends)
    for i, row in enumerate(cells):
        for j, (value, text) in enumerate(row):
            shade = float(np.asarray(image.norm(np.asarray(value)))) if math.isfinite(value) else 0.0
            axes.text(j, i, text, ha="center", va="center", color="white" if shade > 0.5 else "black", fontsize=9)
    axes.set_xticks(range(len(activations)), activations)
    axes.set_yticks(range(len(weights)), weights)
    axes.set(xlabel="activations and gradients", ylabel="weights")
    return figure


def _traces(rows: list[dict[str, Any]], summary: dict[str, Any]) -> Figure:
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.get("proxy_loss") is not None:
            losses[row["trial"]][row["step"]] = row["proxy_loss"]
    traces = summary["shape"]["traces"]
    figure = _figure(7.5, 0.6 + 2.4 * max(len(traces), 1))
    panels = figure.subplots(max(len(traces), 1), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (fmt, branches) in zip(panels, traces.items(), strict=False):
        exact = losses[branches["float32"][0]]
        for branch, trials in branches.items():
            if branch == "float32":
                continue
            run = {step: loss for trial in trials for step, loss in losses[trial].items() if step in exact}
            points = _windows({step: loss / exact[step] for step, loss in run.items() if exact[step]})
            color = BRANCHES.get(branch, GREY)
            axes.plot([at for at, _ in points], [ratio for _, ratio in points], color=color, label=branch)
        axes.axhline(1.0, color=BRANCHES["float32"], linewidth=0.8)
        axes.set_title(f"{fmt} everywhere, then", fontsize=9, loc="left")
        axes.set_ylabel("loss over float32's")
        _plain(axes)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=6, fontsize=8
    )
    panels[-1].set_xlabel("steps")
    return figure


def _windows(values: dict[int, float], width: int = 20) -> list[tuple[float, float]]:
    """Average over windows of steps; the batches of both runs are the same, so their ratio is smooth already."""
    grouped: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for step, value in values.items():
        grouped[(step - 1) // width].append((step, value))
    return [
        (statistics.fmean(step for step, _ in points), statistics.fmean(value for _, value in points))
        for _, points in sorted(grouped.items())
    ]
