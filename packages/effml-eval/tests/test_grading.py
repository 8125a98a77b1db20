from __future__ import annotations

from typing import Any

import pytest
from effml_eval.grading import AnswerGrading, ChoiceGrading, Intervals, TextGrading, read_grading
from effml_eval.grading.grading import by_question, cluster_labels
from effml_shared.errors import ConfigError


def test_intervals() -> None:
    assert Intervals(ci="wilson").mean([1, 1, 0], None).method == "wilson"
    assert Intervals(ci="bca", cluster="book").mean([1, 1, 0], ["a", "a", "b"]).method == "bootstrap bca, clustered"
    for options, message in (
        ({"ci": "exact"}, r"ci: got 'exact'"),
        ({"level": 95}, r"level: got 95"),
        ({"ci": "wilson", "cluster": "book"}, r"ci: got 'wilson' with clusters"),
    ):
        with pytest.raises(ConfigError, match=message):
            Intervals(**options)


def test_lines_of_a_question_are_in_the_order_of_samples() -> None:
    lines: list[Any] = [{"doc_id": id, "sample": s, "tags": {"book": id.upper()}} for id in "ba" for s in (1, 10, 0, 2)]
    questions = by_question(lines)
    assert list(questions) == ["b", "a"]
    assert [line["sample"] for line in questions["a"]] == [0, 1, 2, 10]
    assert cluster_labels(questions, "book") == ["B", "A"]
    assert cluster_labels(questions, None) is None
    with pytest.raises(ConfigError, match=r"cluster: got 'page', expected a tag of question b \(it has book\)"):
        cluster_labels(questions, "page")


def test_what_is_recorded_of_a_grading_makes_it_again() -> None:
    for grading in (
        ChoiceGrading(("brier", "acc")),
        TextGrading(("byte_ppl",)),
        AnswerGrading(("pass@2",), "regex:first:(a)@1", "numeric"),
    ):
        assert read_grading(grading.describe()) == grading
    with pytest.raises(ConfigError, match=r"kind of task: got 'guess'"):
        read_grading({"kind": "guess", "metrics": []})
