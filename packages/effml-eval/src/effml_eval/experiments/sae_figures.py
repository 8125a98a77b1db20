"""What experiments on concepts show: explained variance of every method, stability by energy, modality, bridges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figures"]

_BLUE, _ORANGE, _GREY = "#1f6fb4", "#c2711f", "#6b7280"


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw the plots of a finished run from its summary."""
    from matplotlib.figure import Figure

    if "points" not in summary:
        return {}
    explained = Figure(figsize=(7.5, 3.4), layout="constrained")
    _draw_points(explained.add_subplot(), summary["points"])
    front = Figure(figsize=(7.5, 3.4), layout="constrained")
    _draw_front(front.add_subplot(), summary["front"])
    drawn = {
        "Variance explained on held-out pairs: every seed a dot, active codes per row in brackets": explained,
        "The front of the first seed: variance explained against active codes per row": front,
    }
    columns = summary["columns"]
    if not columns:
        return drawn
    concepts = Figure(figsize=(7.5, 3.4), layout="constrained")
    _draw_stability(concepts.add_subplot(1, 2, 1), columns, summary["numbers"])
    _draw_modality(concepts.add_subplot(1, 2, 2), columns)
    drawn["Concepts of the first seed: cosine to another seed's atom against energy; modality scores"] = concepts
    bridges = Figure(figsize=(7.5, 1.9), layout="constrained")
    _draw_bridges(bridges.add_subplot(), summary["numbers"])
    drawn["Strongest concept pairs that link one true concept: every seed a dot"] = bridges
    return drawn


def _draw_front(axes: Axes, front: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in front.items():
        known = sorted((row["l0"], row["r2"]) for row in rows if row["r2"] is not None)
        dashes = "-" if _is_sparse(name) else "--"
        axes.plot([x for x, _ in known], [y for _, y in known], marker="o", markersize=4, lw=1.2, ls=dashes, label=name)
    axes.set(xscale="log", xlabel="active codes per row", ylabel="R², held out", ylim=(None, 1.0))
    ticks = [1, *sorted(round(row["l0"]) for row in front["PCA"])]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, ncols=2)
    _plain(axes, "y")


def _is_sparse(name: str) -> bool:
    return "Top" in name or "ReLU" in name


def _draw_points(axes: Axes, points: dict[str, list[dict[str, Any]]]) -> None:
    labels = []
    for y, (name, rows) in enumerate(points.items()):
        known = [row for row in rows if row["r2"] is not None]
        sparsity = sum(row["l0"] for row in known) / len(known) if known else float("nan")
        labels.append(f"{name} ({sparsity:.3g})")
        color = _BLUE if _is_sparse(name) else _ORANGE
        if known:
            axes.barh(y, sum(row["r2"] for row in known) / len(known), height=0.55, color=color, alpha=0.25)
        axes.plot([row["r2"] for row in known], [y] * len(known), "o", color=color, markersize=5, alpha=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="R², held out", xlim=(None, 1.0))
    _plain(axes, "x")


def _draw_stability(axes: Axes, columns: dict[str, Any], numbers: dict[str, Any]) -> None:
    alive = [(e, s) for e, s in zip(columns["energy"], columns["stability"], strict=True) if e]
    axes.plot([e for e, _ in alive], [s for _, s in alive], "o", color=_BLUE, markersize=3, alpha=0.6)
    random = numbers["stability, random"][0]
    axes.axhline(random, color="black", lw=1.0, ls="--")
    axes.text(
        1.0, random, "random dictionaries ", transform=axes.get_yaxis_transform(), va="bottom", ha="right", fontsize=8
    )
    axes.set(xscale="log", xlabel="energy", ylabel="cosine to the other seed's atom", ylim=(None, 1.02))
    _plain(axes, "y")


def _draw_modality(axes: Axes, columns: dict[str, Any]) -> None:
    counts, masses = columns["score histogram"], columns["energy histogram"]
    width = 1 / len(counts)
    places = [(i + 0.5) * width for i in range(len(counts))]
    axes.bar([x - 0.2 * width for x in places], counts, width=0.38 * width, color=_GREY, label="concepts")
    axes.bar([x + 0.2 * width for x in places], masses, width=0.38 * width, color=_BLUE, label="energy")
    axes.set(xlabel="modality score (0 text, 1 image)", ylabel="fraction", xlim=(0, 1))
    axes.legend(frameon=False)
    _plain(axes, "y")


def _draw_bridges(axes: Axes, numbers: dict[str, Any]) -> None:
    known = {
        "linked by bridge": ("bridge score", _BLUE),
        "linked by co-activation": ("co-activation alone", _ORANGE),
        "linked at random": ("any two concepts", _GREY),
    }
    names = {name: label for name, (label, _) in known.items() if name in numbers}
    for y, name in enumerate(names):
        color = known[name][1]
        values = [value for value in numbers[name] if value is not None]
        axes.barh(y, sum(values) / max(len(values), 1), height=0.55, color=color, alpha=0.25)
        axes.plot(values, [y] * len(values), "o", color=color, markersize=5, alpha=0.8)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.invert_yaxis()
    axes.set(xlabel="fraction of true links", xlim=(0, 1))
    _plain(axes, "x")


def _plain(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", alpha=0.25)
