from __future__ import annotations

from typing import Any

import pytest
from effml_eval.grading import AnswerGrading, Intervals
from effml_eval.grading.answer_grading import find_extractor
from effml_eval.metrics.extraction import Extractor
from effml_shared.errors import ConfigError


def graded(grading: AnswerGrading, outputs: dict[str, str], target: str = "A") -> list[dict[str, Any]]:
    """Return the lines of questions whose samples wrote one letter each."""
    return [
        grading.grade({"doc_id": id, "sample": i, "tags": {}, "target": [target], "output": output.replace("-", "")})
        for id, letters in outputs.items()
        for i, output in enumerate(letters)
    ]


def test_several_samples() -> None:
    letters = Extractor("letter", 1, lambda text: text or None)
    grading = AnswerGrading(("exact_match", "maj@3", "maj@6", "pass@1", "pass@4", "pass^2", "g-pass@2_0.5"), letters)
    lines = graded(grading, {"1": "AAABBC"})
    found = {name: estimate.value for name, estimate in grading.estimate(lines, Intervals()).items()}
    expected = {"exact_match": 0.5, "maj@3": 0.6, "maj@6": 1, "pass@1": 0.5, "pass@4": 1, "pass^2": 0.2}
    assert found == pytest.approx({**expected, "g-pass@2_0.5": 0.8}, rel=1e-12)
    lines = graded(grading, {"1": "AAABBC", "2": "------"})
    assert [line["extracted"] for line in lines] == [*"AAABBC", *[None] * 6]
    halved = {name: estimate.value for name, estimate in grading.estimate(lines, Intervals()).items()}
    assert halved == pytest.approx({name: value / 2 for name, value in found.items()}, rel=1e-12)
    assert grading.paired(lines, "maj@3").scores == pytest.approx({"1": 0.6, "2": 0})
    assert grading.paired(lines[::-1], "exact_match").scores == {"1": 0.5, "2": 0}


def test_how_answers_are_found_and_compared() -> None:
    line = {"output": "First 3, so the answer is 4.0.", "target": ["4", "four"]}
    for extractor, equal, answer, correct in (
        ("whole", "exact", line["output"], 0),
        ("last_number", "exact", "4.0", 0),
        ("last_number", "numeric", "4.0", 1),
        ("answer_is", "symbolic", "4.0", 1),
        ("regex:First (\\d)", "numeric", "3", 0),
        ("boxed", "numeric", None, 0),
    ):
        found = AnswerGrading(("exact_match",), extractor, equal).grade(line)
        assert (found["extracted"], found["correct"], found["scores"]) == (answer, correct, {"exact_match": correct})


def test_what_cannot_be_had() -> None:
    for metric in ("acc", "pass@0", "pass@", "maj@1.5", "g-pass@4", "g-pass@4_2", "pass@2x", ""):
        with pytest.raises(ConfigError, match=r"metrics: got"):
            AnswerGrading((metric,))
    grading = AnswerGrading(("exact_match", "g-pass@4_1"))
    grading.check(Intervals(), 4)
    with pytest.raises(ConfigError, match=r"metrics: got g-pass@4_1 of 3 samples"):
        grading.check(Intervals(), 3)
    with pytest.raises(ConfigError, match=r"ci: got 'wilson' for means of 4 samples"):
        grading.check(Intervals(ci="wilson"), 4)
    with pytest.raises(ConfigError, match=r"got pass@3 of 2 samples"):
        AnswerGrading().paired(graded(AnswerGrading(), {"1": "AAA", "2": "AB"}), "pass@3")


def test_extractors_by_recorded_name() -> None:
    for name in ("whole", "boxed", "regex:a@b"):
        recorded = str(find_extractor(name))
        assert str(find_extractor(recorded)) == recorded
    with pytest.raises(ConfigError, match=r"extractor: got 'boxed@9', expected version 1"):
        find_extractor("boxed@9")
