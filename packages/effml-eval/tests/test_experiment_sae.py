from __future__ import annotations

from typing import Any

import pytest
from effml_eval.concepts.concept_report import ConceptReport
from effml_eval.experiments.concept_claims import KINDS
from effml_eval.experiments.dictionary_trials import REPORT
from effml_eval.experiments.sae import ConceptsConfig, experiment
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.report import write_report
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit


class TestConceptsExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 6  # inside the second training


def _finished(path: Any, *overrides: str) -> Run:
    config = experiment.configure("smoke", overrides=overrides)
    run = Run.create(path, {"experiment": "eval.sae", "preset": "smoke"}, to_yaml(config))
    experiment.execute(config, run)
    return run


def test_effects_are_those_of_the_measured_numbers(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run")
    effects, points, numbers = (run.summary[name] for name in ("effects", "points", "numbers"))
    r2 = {name: rows[0]["r2"] for name, rows in points.items()}
    assert set(r2) == {*KINDS, "BatchTopK, another seed", "PCA", "k-means", "ICA", "semi-NMF"}
    best = max(r2[name] for name in ("PCA", "k-means", "ICA", "semi-NMF"))
    assert effects["front"] == [pytest.approx(r2["BatchTopK"] - best)]
    assert effects["best autoencoder"] == [pytest.approx(r2["BatchTopK"] - max(r2["TopK"], r2["JumpReLU"]))]
    assert effects["rare are not"] == [pytest.approx(numbers["stability, strong"][0] - numbers["stability, weak"][0])]
    assert numbers["sum of bridges"] == [pytest.approx(numbers["pair similarity"][0], rel=1e-5)]
    front = run.summary["front"]
    assert set(front) == {*KINDS, "PCA", "k-means", "ICA", "semi-NMF"}
    assert all(rows[0]["r2"] == r2[name] for name, rows in front.items())
    assert {name: len(rows) for name, rows in front.items() if len(rows) != 2} == {"k-means": 1}
    assert len(run.summary["table"]) == len(r2) + len(numbers)


def test_the_record_of_all_concepts_stands_in_the_run_directory(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run")
    report = ConceptReport.load(run.path / REPORT)
    assert report.n_concepts == 12
    assert report.image_rows == 20
    assert all(caption.startswith("concepts ") for caption in report.text_labels.values())
    assert report.pair_similarity == pytest.approx(run.summary["numbers"]["pair similarity"][0])


def test_trainings_that_diverge_leave_their_claims_open(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run", "lr=1e38")
    assert all(claim["verdict"] == "inconclusive" and claim["seeds"] == 0 for claim in run.summary["claims"])
    assert not (run.path / REPORT).exists()
    assert "data:image" in write_report(run, experiment).read_text()


def test_configurations_that_cannot_be_are_refused() -> None:
    for bad, message in (
        ({"k": 300}, r"^k, other_ks, top: got 300, \[4, 16\] and 64"),
        ({"linear_rows": 100}, r"^linear_rows: got 100, expected at least 256"),
        ({"lr": 0.0}, r"^lr: got 0.0"),
        ({"seeds": 0}, r"^seeds: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ConceptsConfig(**bad)
