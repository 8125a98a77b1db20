"""What an evaluation found: estimates of every metric of every task, the samples behind them, and the record of it all.

    results.json            the record, schema 1: results, config, tasks, model, engine, counts, ...
    samples/TASK.jsonl      one line per sample: what was answered, what is right, and the scores

Both are written whole. Whatever is in the record but `started` and `ended` depends on the model, the data and the
settings alone, so equal evaluations have equal records, byte by byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.files import write_whole

from effml_eval.evaluation.manifest import SCHEMA
from effml_eval.grading import Grading, Intervals, Line, read_grading
from effml_eval.grading.grading import by_question
from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.variance_split import VarianceSplit, variance_split

__all__ = ["EvalResult", "graded_result"]

Record = dict[str, Any]
_HARNESS_NAMES = {"byte_ppl": "byte_perplexity", "word_ppl": "word_perplexity", "token_ppl": "token_perplexity"}
_LOWER_IS_BETTER = {"bits_per_byte", "byte_ppl", "word_ppl", "token_ppl", "brier", "nll", "ece"}
_COUNTS = ("requested", "scored", "truncated", "boundary_merges", "unparsed", "length_stopped", "shots_dropped")


@dataclass(frozen=True)
class EvalResult:
    """The outcome of an evaluation.

    Attributes:
        metrics: task -> metric -> estimate.
        record: everything that `results.json` holds, as plain values.
        lines: task -> its samples.
    """

    metrics: Mapping[str, Mapping[str, Estimate]]
    record: Record
    lines: Mapping[str, Sequence[Line]]

    def samples(self, task: str) -> list[Line]:
        """Return the samples of a task, in the order of its questions.

        Raises:
            ConfigError: there is no such task.
        """
        if task not in self.lines:
            raise ConfigError(f"task: got {task!r}, expected one of {', '.join(self.lines)}")
        return [dict(line) for line in self.lines[task]]

    def grading(self, task: str) -> Grading:
        """Return how a task was graded."""
        return read_grading(self.record["tasks"][task]["grading"])

    def variance(self, task: str) -> VarianceSplit:
        """Split the variance of correctness between questions and samples; its `advice` says which to have more of.

        Raises:
            ConfigError: the task has fewer than two samples of each question, or fewer than two questions.
        """
        questions = by_question(self.samples(task))
        return variance_split([[line["correct"] for line in samples] for samples in questions.values()])

    def save(self, path: str | Path) -> None:
        """Write record and samples into a directory.

        Raises:
            CheckpointError: it cannot be written.
        """
        folder = Path(path)
        try:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be made ({error.strerror}); choose another place") from None
        for task, lines in self.lines.items():
            write_whole(folder / "samples" / f"{task}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_whole(folder / "results.json", json.dumps(self.record, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Read what `save` wrote, or what is in the `out_dir` of a finished evaluation.

        Raises:
            CheckpointError: it is not there, not finished, or damaged.
        """
        folder = Path(path)
        try:
            record = json.loads((folder / "results.json").read_text())
            if record["schema"] != SCHEMA:
                raise CheckpointError(f"{folder}: got results of schema {record['schema']}, expected {SCHEMA}")
            metrics = {
                task: {name: _read_estimate(row) for name, row in rows.items()}
                for task, rows in record["results"].items()
            }
            lines = {
                task: [json.loads(line) for line in (folder / "samples" / f"{task}.jsonl").read_text().splitlines()]
                for task in metrics
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = getattr(error, "strerror", None) or f"damaged, {error!r:.80}"
            raise CheckpointError(f"{folder}: got no results ({reason}), expected a finished evaluation") from None
        return cls(metrics, record, lines)

    def table(self) -> str:
        """Return the estimates as aligned text, with what is worth knowing of the answers."""
        header = ["task", "n", "metric", "value", "± SE", f"{100 * self.record['config']['level']:g}% interval", ""]
        rows = [header]
        for task, estimates in self.metrics.items():
            for i, (metric, estimate) in enumerate(estimates.items()):
                spread = ["", ""]
                if math.isfinite(estimate.stderr):
                    spread = [f"{estimate.stderr:.4f}", f"[{estimate.ci_low:.4f}, {estimate.ci_high:.4f}]"]
                first = [task, str(estimate.n)] if i == 0 else ["", ""]
                notes = _notes(self.record["tasks"][task]["counts"]) if i == 0 else ""
                rows.append([*first, metric, f"{estimate.value:.4f}", *spread, notes])
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        left = {0, 2, 6}
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def to_harness_json(self) -> dict[str, Any]:
        """Return the results under the names that EleutherAI's lm-evaluation-harness gives them."""
        tasks = self.record["tasks"]
        results: dict[str, dict[str, Any]] = {}
        for task, estimates in self.metrics.items():
            results[task] = {"alias": task}
            for metric, estimate in estimates.items():
                name = _HARNESS_NAMES.get(metric, metric)
                results[task][f"{name},none"] = _number(estimate.value)
                unknown = math.isnan(estimate.stderr)
                results[task][f"{name}_stderr,none"] = "N/A" if unknown else _number(estimate.stderr)
        return {
            "results": results,
            "versions": {task: row["version"] for task, row in tasks.items()},
            "n-shot": {task: row["n_shot"] for task, row in tasks.items()},
            "n-samples": {
                task: {"original": row["questions"], "effective": row["evaluated"]} for task, row in tasks.items()
            },
            "higher_is_better": {
                task: {_HARNESS_NAMES.get(metric, metric): metric not in _LOWER_IS_BETTER for metric in estimates}
                for task, estimates in self.metrics.items()
            },
            "config": {"model": self.record["model"]["id"], "limit": self.record["config"]["limit"]},
            "git_hash": self.record["git"]["commit"],
        }


def graded_result(
    answered: Mapping[str, Sequence[Line]], gradings: Mapping[str, Grading], record: Record, intervals: Intervals
) -> EvalResult:
    """Grade lines, make estimates of them, and put both into a record that has everything else."""
    lines = {task: [gradings[task].grade(line) for line in answered[task]] for task in answered}
    metrics = {task: gradings[task].estimate(lines[task], intervals) for task in lines}
    tasks = {
        task: {**record["tasks"][task], "grading": gradings[task].describe(), "counts": _counts(lines[task])}
        for task in lines
    }
    record = {
        **record,
        "results": {
            task: {metric: _estimate(estimate) for metric, estimate in estimates.items()}
            for task, estimates in metrics.items()
        },
        "tasks": tasks,
        "counts": {name: sum(row["counts"][name] for row in tasks.values()) for name in _COUNTS},
    }
    return EvalResult(metrics, record, lines)


def _counts(lines: Sequence[Line]) -> dict[str, int]:
    """Return what happened to the requests of a task."""
    return {
        "requested": sum(line["requests"] for line in lines),
        "scored": sum(line["requests"] for line in lines if "scores" in line),
        "truncated": sum(line.get("truncated", 0) for line in lines),
        "boundary_merges": sum(line.get("boundary_merges", 0) for line in lines),
        "unparsed": sum("extracted" in line and line["extracted"] is None for line in lines),
        "length_stopped": sum(line.get("finish_reason") == "length" for line in lines),
        "shots_dropped": sum(line["shots_dropped"] for line in lines),
    }


def _notes(counts: Mapping[str, int]) -> str:
    names = ("unparsed", "length_stopped", "truncated", "boundary_merges", "shots_dropped")
    return ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in names if counts[name])


def _estimate(estimate: Estimate) -> dict[str, Any]:
    ends = [_number(estimate.ci_low), _number(estimate.ci_high)]
    value, stderr = _number(estimate.value), _number(estimate.stderr)
    return {"value": value, "stderr": stderr, "ci": ends, "n": estimate.n, "method": estimate.method}


def _read_estimate(row: Mapping[str, Any]) -> Estimate:
    value, stderr = (math.nan if row[name] is None else float(row[name]) for name in ("value", "stderr"))
    low, high = (
        end if found is None else float(found) for found, end in zip(row["ci"], (-math.inf, math.inf), strict=True)
    )
    return Estimate(value, stderr, low, high, row["n"], row["method"])


def _number(value: float) -> float | None:
    """Return None for what JSON has no number for."""
    return value if math.isfinite(value) else None
