"""What `diffusion.order` shows: puzzles solved in every order, losses beside the entropy, one puzzle in two orders."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from effml_shared.files import write_whole

from effml_diffusion.puzzles.sudoku import Sudoku
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_diffusion.trace import Trace
from effml_diffusion.trace_figure import trace_figure
from effml_diffusion.trace_page import trace_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PAGE", "figures", "write_generations"]

PAGE = "generations.html"
"""File in the run directory: one puzzle in two orders, animated side by side."""

_COLORS = {"random": "#6b7280", "margin": "#1f6fb4"}
_OTHER = "#c2711f"
_STYLE = """
body { margin: 0; display: flex; flex-wrap: wrap; background: Canvas }
iframe { flex: 1 1 24rem; height: 100vh; min-height: 40rem; border: 0 }
"""


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw the plots of a finished run from its metrics and summary."""
    from matplotlib.figure import Figure

    if "sizes" not in summary:
        return {}
    sizes: dict[str, dict[str, Any]] = summary["sizes"]
    points = Figure(figsize=(7.5, 3.6), layout="constrained")
    curves = Figure(figsize=(7.5, 3.2), layout="constrained")
    for place, (size, what) in enumerate(sizes.items(), start=1):
        _draw_solved(points.add_subplot(1, len(sizes), place), what)
        _draw_losses(curves.add_subplot(1, len(sizes), place), what, f"{size} {what['label']}", rows)
    drawn = {
        "Puzzles solved: every seed a dot; where not said otherwise, one cell per forward pass": points,
        "Training loss: every seed; dashed, the entropy of uniformly drawn grids; dots, the bound on new ones": curves,
    }
    for order, generation in ((summary["generations"] or {}).get("orders", {})).items():
        outcome = "solved" if generation["solved"] else "not solved"
        caption = f"In {order} order: one puzzle, {outcome}; {PAGE} in the run directory animates it"
        drawn[caption] = trace_figure(_trace(generation), _tokens(summary["generations"]))
    return drawn


def write_generations(directory: Path, generations: dict[str, Any]) -> None:
    """Write the animated page of one puzzle, self-contained, into a run directory."""
    frames = []
    for order, generation in generations["orders"].items():
        outcome = "Solved." if generation["solved"] else "Not solved."
        page = trace_page(_trace(generation), _tokens(generations), title=f"In {order} order", caption=outcome)
        frames.append(f'<iframe title="In {order} order" srcdoc="{html.escape(page)}"></iframe>')
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>One puzzle, two orders</title><style>{_STYLE}</style>"
    )
    write_whole(directory / PAGE, f"{head}<body>{''.join(frames)}</body></html>\n")


def _tokens(generations: dict[str, Any]) -> SudokuTokens:
    return SudokuTokens(Sudoku(generations["box_rows"], generations["box_columns"]))


def _trace(generation: dict[str, Any]) -> Trace:
    return Trace.from_snapshots(torch.tensor(generation["ids"]), SudokuTokens.mask_id)


def _draw_solved(axes: Axes, what: dict[str, Any]) -> None:
    orders = list(what["solved"])
    for y, order in enumerate(orders):
        values = [value for value in what["solved"][order] if value is not None]
        color = _COLORS.get(order.split(",")[0], _OTHER)
        if values:
            axes.barh(y, sum(values) / len(values), height=0.55, color=color, alpha=0.25)
        axes.plot(values, [y] * len(values), "o", color=color, markersize=5, alpha=0.8)
    axes.set_yticks(range(len(orders)), orders)
    axes.invert_yaxis()
    axes.set(title=what["label"], xlim=(0, 103), xlabel="puzzles solved (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def _draw_losses(axes: Axes, what: dict[str, Any], method: str, rows: list[dict[str, Any]]) -> None:
    """Draw means over hundredths of each training: single batches scatter far below the entropy."""
    last = 0
    for trial in sorted({row["trial"] for row in rows if row["trial"].startswith(f"{method}/")}):
        mine = [row for row in rows if row["trial"] == trial and row.get("loss") is not None]
        width = max(1, len(mine) // 100)
        blocks = [mine[start : start + width] for start in range(0, len(mine), width)]
        steps = [block[-1]["step"] for block in blocks]
        axes.plot(steps, [sum(row["loss"] for row in block) / len(block) for block in blocks], color="#1f6fb4", lw=0.9)
        last = max(last, *steps)
    nats = [value for value in what["nats"] if value is not None]
    axes.plot([last] * len(nats), nats, "o", color="#1f6fb4", markersize=5, alpha=0.8, clip_on=False)
    if what["entropy"] is not None:
        axes.plot([0, last], 2 * [what["entropy"]], color="black", lw=1.0, ls="--")
    axes.set(title=what["label"], xlabel="step", ylabel="nats per cell")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
