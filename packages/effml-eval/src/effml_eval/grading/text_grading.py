"""Grade the likelihood of texts: perplexities and bits per byte of a corpus, with bootstrap intervals over documents.

A line holds `lls` (of the one document), `n_tokens`, `n_bytes` and `n_words`. Only bits per byte can be compared
document by document: the bits of each are a sum, and the bytes do not depend on the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError

from effml_eval.grading.grading import Intervals, Line, Paired, by_question, cluster_labels
from effml_eval.metrics.text_likelihood import text_likelihood
from effml_eval.scoring.scorer import RollingScore
from effml_eval.statistics.estimate import Estimate

__all__ = ["TEXT_METRICS", "TextGrading"]

TEXT_METRICS = ("bits_per_byte", "byte_ppl", "word_ppl", "token_ppl")


@dataclass(frozen=True)
class TextGrading:
    """Grade the likelihood of texts by some of `TEXT_METRICS`; `word_ppl` needs words in every document."""

    metrics: tuple[str, ...] = TEXT_METRICS

    def __post_init__(self) -> None:
        for metric in self.metrics:
            check_choice("metrics", metric, TEXT_METRICS)

    def describe(self) -> dict[str, Any]:
        return {"kind": "rolling", "metrics": list(self.metrics)}

    def check(self, intervals: Intervals, n_samples: int) -> None:
        """Accept everything: these intervals are bootstrapped, which their method says."""

    def grade(self, line: Line) -> Line:
        bits = -float(line["lls"][0]) / math.log(2)
        return {**line, "scores": {"bits_per_byte": bits / line["n_bytes"]} if line["n_bytes"] else {}}

    def estimate(self, lines: Sequence[Line], intervals: Intervals) -> dict[str, Estimate]:
        documents = [_document(line) for line in lines]
        estimates = text_likelihood(
            documents,
            clusters=cluster_labels(by_question(lines), intervals.cluster),
            method="bca" if intervals.ci == "bca" else "percentile",
            level=intervals.level,
            seed=intervals.seed,
        )
        return {metric: estimates[metric] for metric in self.metrics if metric in estimates}

    def paired(self, lines: Sequence[Line], metric: str) -> Paired:
        if metric != "bits_per_byte":
            raise ConfigError(f"metric: got {metric!r}, expected 'bits_per_byte', the only one of single documents")
        documents = {line["doc_id"]: _document(line) for line in lines}
        bits = {id: -document.logprob / math.log(2) for id, document in documents.items() if document.n_bytes}
        return Paired(bits, {id: float(documents[id].n_bytes) for id in bits}, False)


def _document(line: Line) -> RollingScore:
    return RollingScore(float(line["lls"][0]), line["n_tokens"][0], line["n_bytes"], line["n_words"])
