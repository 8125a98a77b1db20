from __future__ import annotations

import math
from typing import Any

import pytest
from effml_eval.grading import ChoiceGrading, Intervals
from effml_shared.errors import ConfigError


def line(id: str, lls: list[Any], target: int, **more: Any) -> dict[str, Any]:
    choices = ["cat", "dog", "elephants"][: len(lls)]
    about = {"doc_id": id, "sample": 0, "tags": {}, "target": target, "choices": choices}
    return {**about, "lls": lls, "n_tokens": [1, 1, 2][: len(lls)], **more}


def test_the_scores_of_a_question() -> None:
    grading = ChoiceGrading(("acc", "acc_norm", "acc_pmi", "nll"))
    graded = grading.grade(line("1", [-6.0, -5.0, -9.0], 2, unconditional=[-3.0, -1.0, -7.5]))
    assert {name: graded["scores"][name] for name in ("acc", "acc_norm", "acc_token", "acc_pmi")} == {
        "acc": 0,
        "acc_norm": 1,
        "acc_token": 1,
        "acc_pmi": 1,
    }
    assert graded["correct"] == 0
    assert graded["scores"]["prob"] == pytest.approx(0.013213, abs=1e-6)
    assert grading.grade(graded) == graded
    assert ChoiceGrading().grade(line("1", [-6.0, "-inf"], 0))["scores"]["prob"] == 1
    with pytest.raises(ConfigError, match=r"metrics: got acc_pmi, expected a task that has a neutral context"):
        grading.grade(line("1", [-6.0, -5.0, -9.0], 2))


def test_estimates_and_pairs() -> None:
    grading = ChoiceGrading(("acc", "prob", "ece"))
    lines = [grading.grade(line(str(i), [0.0, -math.log(3)], int(i > 2))) for i in range(4)]
    found = grading.estimate(lines, Intervals())
    assert found["acc"].value == 0.75
    assert found["prob"].value == pytest.approx(0.75 * 0.75 + 0.25 * 0.25)
    assert found["ece"].value == pytest.approx(0, abs=1e-12)
    assert (found["ece"].method, math.isnan(found["ece"].stderr)) == ("no interval", True)
    assert grading.paired(lines, "acc") == ({"0": 1, "1": 1, "2": 1, "3": 0}, None, True)
    assert not grading.paired(lines, "brier").higher_is_better
    for metric, message in (("ece", r"metric: got 'ece'"), ("acc_pmi", r"metric: got 'acc_pmi', expected one of acc")):
        with pytest.raises(ConfigError, match=message):
            grading.paired(lines, metric)


def test_intervals_that_do_not_hold() -> None:
    ChoiceGrading(("acc", "acc_norm", "ece")).check(Intervals(ci="wilson"), 1)
    with pytest.raises(ConfigError, match=r"ci: got 'wilson' for brier, nll"):
        ChoiceGrading(("acc", "brier", "nll")).check(Intervals(ci="wilson"), 1)
