from __future__ import annotations

from typing import Any

import pytest
from effml_eval.concepts.concept_report import ConceptReport
from effml_eval.experiments.dictionary_trials import REPORT
from effml_eval.experiments.digits import PAGE, DigitsConfig, experiment
from effml_eval.experiments.handwritten_digits import FACTS, load_digits
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.report import write_report
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit


class TestDigitsExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 6  # inside the first dictionary


class TestInterruptedEmbedding(ExperimentKit):
    experiment = experiment
    interrupt_after = 2


def _finished(path: Any, *overrides: str) -> Run:
    config = experiment.configure("smoke", overrides=overrides)
    run = Run.create(path, {"experiment": "eval.digits", "preset": "smoke"}, to_yaml(config))
    experiment.execute(config, run)
    return run


def test_the_run_directory_holds_the_concepts_and_a_page_with_images_and_captions(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run")
    numbers, effects = run.summary["numbers"], run.summary["effects"]
    assert effects["same meaning"] == numbers["linked by bridge"]
    assert numbers["sum of bridges"] == [pytest.approx(numbers["pair similarity"][0], rel=1e-5)]
    assert all(0 <= numbers[name][0] <= 1 for name in ("linked at random", "bridges of a concept with itself"))
    report = ConceptReport.load(run.path / REPORT)
    assert (report.n_concepts, report.image_rows, report.text_rows) == (12, 20, 20)
    known = {", ".join(n for n, holds in zip(FACTS, row, strict=True) if holds) for row in load_digits().facts.tolist()}
    assert {label.removeprefix("digit ") for label in report.image_labels.values()} <= known
    page = (run.path / PAGE).read_text()
    assert page.count("data:image/png") == len(report.image_labels)
    assert all(caption in page for caption in report.text_labels.values())
    rows = {entry["what"] for entry in run.summary["table"]}
    assert {"images whose digit is named right", "gap between the modalities", "R² of PCA"} <= rows


def test_examples_are_bridges_with_every_concept_once_at_either_end(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run")
    examples = run.summary["columns"]["examples"]
    edges = ConceptReport.load(run.path / REPORT).bridges
    assert edges is not None
    found = set(zip(edges.image.tolist(), edges.text.tolist(), strict=True))
    assert examples
    assert all((example["image"], example["text"]) in found for example in examples)
    for end in ("image", "text"):
        assert len({example[end] for example in examples}) == len(examples)
    assert all(0 <= row < 1797 for example in examples for row in example["images"])


def test_embeddings_that_diverge_leave_the_claims_open(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run", "embedding.lr=1e30")
    assert all(claim["verdict"] == "inconclusive" and claim["seeds"] == 0 for claim in run.summary["claims"])
    assert not (run.path / REPORT).exists()
    assert not (run.path / PAGE).exists()
    assert "data:image" in write_report(run, experiment).read_text()


def test_configurations_that_cannot_be_are_refused() -> None:
    for bad, message in (
        ({"held_out": 600}, r"^train_images, held_out: got 1200 and 600, expected at most 1797 together"),
        ({"train_images": 0}, r"^train_images: got 0"),
        ({"train_images": 4}, r"^linear_rows: got 16000, expected at least 128 of 2 x train_images x captions"),
        ({"k": 200}, r"^k, other_ks, top: got 200, \[2, 8\] and 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            DigitsConfig(**bad)
