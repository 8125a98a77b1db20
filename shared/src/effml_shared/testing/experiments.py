"""Conformance kit for experiments: subclass, set `experiment`, and pytest runs its `smoke` preset."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from effml_shared.citations import bibtex
from effml_shared.config import to_yaml
from effml_shared.errors import Interrupted
from effml_shared.experiments import Experiment
from effml_shared.loop import Hook, Loop
from effml_shared.report import write_report
from effml_shared.runs import Run

__all__ = ["ExperimentKit"]


class _InterruptAfter(Hook):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


class ExperimentKit:
    """What every experiment must do. Set `experiment`; `interrupt_after` is a step inside some trial of `smoke`."""

    experiment: Experiment
    interrupt_after = 5

    def _run(self, path: Path, watch: list[Hook]) -> Run:
        config = self.experiment.configure("smoke")
        return Run.create(path, {"experiment": self.experiment.name, "preset": "smoke"}, to_yaml(config), watch=watch)

    def test_has_the_three_presets_and_says_how_long_they_take(self) -> None:
        assert {"smoke", "cpu", "gpu"} <= set(self.experiment.presets) == set(self.experiment.minutes)
        for preset in self.experiment.presets:
            self.experiment.configure(preset)

    def test_what_it_tests_again_can_be_cited(self) -> None:
        papers = self.experiment.papers
        assert any(paper.arxiv in self.experiment.paper for paper in papers)
        assert len({paper.key for paper in papers}) == len(papers)
        for paper in papers:
            fields = dict(re.findall(r"^  (\w+) = {(.+)},$", bibtex(paper), re.MULTILINE))
            assert {"title", "author", "year", "eprint", "url"} <= fields.keys()

    def test_smoke_judges_its_claims_and_an_interrupted_run_ends_the_same(self, tmp_path: Path) -> None:
        config = self.experiment.configure("smoke")
        whole = self._run(tmp_path / "whole", [])
        verdicts = self.experiment.execute(config, whole)
        assert [v.claim for v in verdicts] == list(self.experiment.claims)
        assert all(v.verdict in ("holds", "does not hold", "inconclusive") for v in verdicts)
        page = write_report(whole, self.experiment).read_text()
        assert all(part in page for part in ("<h2>Claims</h2>", "<h2>Results</h2>", "data:image/png", "<h2>Versions"))
        names = {path.name for path in whole.path.iterdir()}
        assert {"config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "plots", "report.html"} <= names

        broken = self._run(tmp_path / "broken", [_InterruptAfter(self.interrupt_after)])
        with pytest.raises(Interrupted):  # none raised: lower `interrupt_after`
            self.experiment.execute(config, broken)
        assert (
            "partial" in write_report(Run(broken.path), self.experiment).read_text() or broken.summary["trials"] == {}
        )
        resumed = Run(broken.path)
        again = self.experiment.configure("smoke", yaml=resumed.config_yaml)
        assert again == config
        self.experiment.execute(again, resumed)
        assert _untimed(resumed.metrics()) == _untimed(whole.metrics())


def _untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
