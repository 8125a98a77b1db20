"""`report.html`: one self-contained page made from a run directory alone, at any time during or after the run.

Claims with intervals first, then the experiment's own plots, the loss of each method's best trial against steps and
against time, the results table, and at the end what is needed to repeat it all: configuration, versions, machine.
"""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effml_shared.errors import CheckpointError
from effml_shared.experiments import Experiment
from effml_shared.files import write_whole
from effml_shared.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["claims_table", "mean_with_interval", "number", "write_report"]

_COLORS = {"holds": "#14713d", "does not hold": "#b3261e", "inconclusive": "#8a5a00"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2024; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.5rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
p.sub { color: #5b6570; margin-top: 0 } table { border-collapse: collapse; width: 100%; font-size: .92rem }
th { text-align: left; color: #5b6570; border-bottom: 2px solid #d8dde2; padding: .35rem .7rem .35rem 0 }
td { border-bottom: 1px solid #e7eaed; padding: .45rem .7rem .45rem 0; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } th.n { text-align: right }
.verdict { white-space: nowrap; font-weight: 650 }
.holds { color: #14713d } .does { color: #b3261e } .inconclusive { color: #8a5a00 }
figure { margin: 1rem 0 } img { width: 100%; height: auto } figcaption { color: #5b6570; font-size: .9rem }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; border-radius: 6px }
"""


def write_report(run: Run, experiment: Experiment) -> Path:
    """Draw the plots into `plots/` and write `report.html`; returns its path.

    Raises:
        CheckpointError: a file cannot be written; it then is what it was before.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows, summary = run.metrics(), run.summary
    figures = {**_claims_figure(summary), **experiment.figures(rows, summary), **_loss_figures(rows)}
    try:
        (run.path / "plots").mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {run.path / 'plots'}: {error.strerror}") from None
    pictures = []
    for caption, figure in figures.items():
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
        name = "".join(c if c.isalnum() else "-" for c in caption.split(":")[0].lower())
        write_whole(run.path / "plots" / f"{name}.png", buffer.getvalue())
        source = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(caption)
        pictures.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'
        )
    manifest = run.manifest
    status = (
        "" if summary["status"] == "finished" else f" · {html.escape(summary['status'])}: figures below are partial"
    )
    machine = {
        **manifest["versions"],
        **manifest["machine"],
        "git commit": manifest["git"],
        "command": manifest["command"],
    }
    body = [
        f"<h1>{html.escape(experiment.title)}</h1>",
        f'<p class="sub">{html.escape(experiment.name)} · {html.escape(experiment.paper)} · preset '
        f"{html.escape(manifest['preset'])} · {html.escape(manifest['started'])}{status}</p>",
        *_claims_section(summary.get("claims", [])),
        *(["<h2>Results</h2>", _table(summary["table"])] if summary.get("table") else []),
        "<h2>Plots</h2>" if pictures else "<p>No step has finished yet.</p>",
        *pictures,
        f"<h2>Configuration</h2><pre>{html.escape(run.config_yaml.read_text(encoding='utf-8'))}</pre>",
        "<h2>Versions and machine</h2>",
        _table([{"what": key, "value": str(value)} for key, value in machine.items()]),
    ]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(experiment.name)}</title>"
    path = run.path / "report.html"
    write_whole(path, f"{page}<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n")
    return path


def claims_table(claims: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return stored verdicts as rows of text, for the terminal and the page."""
    rows = []
    for verdict in claims:
        mean, interval = mean_with_interval(verdict)
        rows.append(
            {
                "claim": verdict["claim"]["text"],
                "measured": f"{mean}{verdict['claim']['unit']}",
                "95% interval": f"{interval} n={verdict['seeds']}",
                "paper": verdict["claim"]["paper"],
                "verdict": verdict["verdict"],
            }
        )
    return rows


def mean_with_interval(verdict: Mapping[str, Any]) -> tuple[str, str]:
    """Return a verdict's mean and interval as text, to as many decimals as two digits of its half width need.

    >>> mean_with_interval({"mean": 26.72, "low": 14.06, "high": 39.39})
    ('27', '[14, 39]')
    >>> mean_with_interval({"mean": 3.456, "low": None, "high": None})
    ('3.46', '–')
    """
    mean, low, high = (verdict[key] for key in ("mean", "low", "high"))
    if mean is None or not math.isfinite(mean):
        return number(mean), "–"
    known = low is not None and high is not None and math.isfinite(high - low)
    half = (high - low) / 2 if known else 0.0
    decimals = max(0, 1 - math.floor(math.log10(half or abs(mean) / 10 or 1.0)))

    def text(value: float) -> str:
        return f"{round(value, decimals) + 0.0:.{decimals}f}"  # without a minus before a zero

    return text(mean), f"[{text(low)}, {text(high)}]" if known else "–"


def _claims_section(claims: list[dict[str, Any]]) -> list[str]:
    if not claims:
        return []
    counts = {word: sum(c["verdict"] == word for c in claims) for word in _COLORS}
    words = [f'<span class="verdict {word.split()[0]}">{n} {word}</span>' for word, n in counts.items() if n]
    rule = "A claim holds when the whole 95% interval over seeds lies on the claimed side of the claimed size."
    head = f'<h2>Claims</h2><p>{" · ".join(words)}</p><p class="sub">{rule}</p>'
    return [head, _table(claims_table(claims))]


def number(value: Any, digits: int = 4) -> str:
    """Return a cell's text: so many significant digits, a dash where there is no number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _table(rows: list[dict[str, Any]]) -> str:
    numeric = {key for key in rows[0] if all(isinstance(row.get(key), int | float | None) for row in rows)}
    classes = {key: ' class="n"' if key in numeric else "" for key in rows[0]}
    head = "".join(f"<th{classes[key]}>{html.escape(key)}</th>" for key in rows[0])
    lines = []
    for row in rows:
        cells = []
        for key in rows[0]:
            verdict = f' class="verdict {str(row[key]).split()[0]}"' if key == "verdict" else classes[key]
            cells.append(f"<td{verdict}>{html.escape(number(row.get(key)))}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _claims_figure(summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw each claim on a scale of its own: the measured mean and interval, and the size that was claimed."""
    from matplotlib.figure import Figure

    claims = [claim for claim in summary.get("claims", []) if claim["mean"] is not None]
    if not claims:
        return {}
    figure = Figure(figsize=(7.5, 0.4 + 1.05 * len(claims)), layout="constrained")
    for place, verdict in enumerate(claims, start=1):
        axes = figure.add_subplot(len(claims), 1, place)
        low, high = (verdict["mean"] if verdict[end] is None else verdict[end] for end in ("low", "high"))
        axes.plot(
            [low, high], [0, 0], color=_COLORS[verdict["verdict"]], linewidth=5, solid_capstyle="butt", alpha=0.45
        )
        axes.plot(verdict["mean"], 0, "o", color=_COLORS[verdict["verdict"]], markersize=8)
        axes.axvline(verdict["claim"]["at_least"], color="black", linewidth=1.2, linestyle="--")
        axes.set_title(f"{verdict['claim']['text']}: {verdict['verdict']}", fontsize=9, loc="left")
        axes.set_xlabel(verdict["claim"]["unit"].strip(), fontsize=8)
        axes.set(yticks=[], ylim=(-1, 1))
        axes.margins(x=0.15)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return {"Claims: mean and 95% interval over seeds; dashed, the size that was claimed": figure}


def _loss_figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Plot each method's configuration of most seeds, best among those, against steps and time: mean and range."""
    from matplotlib.figure import Figure

    trials: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        trials[row["trial"]].append(row)
    configurations: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    scores: dict[str, list[float]] = defaultdict(list)
    for name, lines in trials.items():
        losses = [row["loss"] for row in lines if row.get("loss") is not None]
        if losses:
            configuration = name.rpartition("/")[0] or name
            configurations[configuration].append([row for row in lines if row.get("loss") is not None])
            scores[configuration].append(next((r["eval_loss"] for r in lines[::-1] if r.get("eval_loss")), losses[-1]))
    best: dict[str, str] = {}
    for name in sorted(configurations, key=lambda name: (-len(scores[name]), statistics.fmean(scores[name]))):
        best.setdefault(name.split("/")[0], name)
    if not best:
        return {}
    figures = {}
    for axis, unit in (("step", "optimizer steps"), ("seconds", "training seconds")):
        figure = Figure(figsize=(7.5, 4.0))
        axes, tops = figure.add_subplot(), [0.0]
        for method, name in sorted(best.items()):
            length = min(map(len, configurations[name]))
            curves = [_smooth([row["loss"] for row in lines[:length]]) for lines in configurations[name]]
            along = [statistics.fmean(row[axis] for row in step) for step in zip(*configurations[name], strict=False)]
            label = f"{method} ({name.partition('/')[2] or 'all'}; ends at {statistics.fmean(scores[name]):.3f})"
            (line,) = axes.plot(along, [statistics.fmean(step) for step in zip(*curves, strict=True)], label=label)
            low, high = ([edge(step) for step in zip(*curves, strict=True)] for edge in (min, max))
            axes.fill_between(along, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            tops.append(high[length // 10])
        axes.set(xlabel=unit, ylabel="training loss (smoothed)")
        axes.set_ylim(top=max(tops))  # the fall of the first steps would flatten all that follows
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        figures[f"Loss against {unit}: mean and range over seeds, each method at its best setting"] = figure
    return figures


def _smooth(values: list[float], half_life: float = 5.0) -> list[float]:
    """Average exponentially, with the start corrected for its missing past."""
    decay, total, weight, result = 0.5 ** (1 / half_life), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result
