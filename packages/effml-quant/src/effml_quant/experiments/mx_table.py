"""The table of `quant.mx`: one row per scheme and part, all with the same columns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from effml_shared.trainings import half_width

from effml_quant.experiments.mx_proxy import BiasStudy, DualStudy
from effml_quant.formats import find_format

__all__ = ["FP32", "bias_rows", "dual_rows", "matrix_rows", "short_name"]

FP32 = "float32"


def short_name(fmt: str) -> str:
    """Return a format's short name, such as `E4M3`."""
    name = find_format(fmt).name
    return {"bfloat16": "bf16", "mxfp4": "E2M1"}.get(name, name.rpartition("_")[2].upper())


def _row(part: str, setting: str, **cells: Any) -> dict[str, Any]:
    names = (
        "learning rate",
        "held-out loss",
        "± 95%",
        "% above float32",
        "± 95% paired",
        "rho untrained",
        "rho trained",
    )
    return {"part": part, "setting": setting, **{name: cells.get(name) for name in names}}


def bias_rows(study: BiasStudy, biases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rho before training and its median over seeds and trained steps; then what rescaled gains do."""
    rows = []
    for name in biases[0]["rho"][str(study.measure_at[-1])]:
        untrained = [b["rho"]["0"][name] for b in biases if "0" in b["rho"]]
        trained = statistics.median(b["rho"][str(step)][name] for b in biases for step in study.trained)
        first = statistics.median(untrained) if untrained else None
        rows.append(_row("bias", name, **{"rho untrained": first, "rho trained": trained}))
    for factor, found in biases[0]["rescaled"].items():
        for name in found["rho"]:
            above = [100 * (b["rescaled"][factor]["loss"][name] - 1) for b in biases]
            cells = {
                "% above float32": statistics.fmean(above),
                "± 95% paired": half_width(above),
                "rho trained": statistics.median(b["rescaled"][factor]["rho"][name] for b in biases),
            }
            rows.append(_row(f"gains x {factor}", name, **cells))
    return rows


def dual_rows(study: DualStudy, duals: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    exact = [_number(dual[FP32]) for dual in duals.values()]
    rows = [_row("proxy", FP32, **_loss_cells(exact, None))]
    for fmt in map(short_name, study.formats):
        for branch in study.branches:
            losses = [_number(dual[fmt][branch]) for dual in duals.values()]
            setting = f"{fmt}" if branch == "none" else f"{fmt}, {branch} from step {study.switch_at}"
            rows.append(_row("proxy", setting, **_loss_cells(losses, exact)))
    return rows


def matrix_rows(
    grid: Sequence[float], rates: Mapping[str, float], losses: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    ends = (min(grid), max(grid))
    rows = []
    for name, found in losses.items():
        rate = f"{rates[name]:g}" + (" (end of grid)" if rates[name] in ends else "")
        cells = _loss_cells(found, None if name == FP32 else losses[FP32])
        rows.append(_row("language model", name, **{"learning rate": rate, **cells}))
    return rows


def _number(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _loss_cells(losses: Sequence[float], exact: Sequence[float] | None) -> dict[str, Any]:
    cells = {"held-out loss": statistics.fmean(losses), "± 95%": half_width(losses)}
    if exact is not None:
        above = [100 * (loss / base - 1) for loss, base in zip(losses, exact, strict=True)]
        cells |= {"% above float32": statistics.fmean(above), "± 95% paired": half_width(above)}
    return cells
