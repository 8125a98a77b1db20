from __future__ import annotations

import pytest
from effml_eval.scoring import Score
from effml_eval.tasks import ChoiceQuestion, MultipleChoiceTask, choice_question
from effml_eval.tasks.task import Asking
from effml_shared.errors import ConfigError

QUESTION = choice_question("1", "1 + 1 =", ["2", "11"], 0)


def test_requests_and_lines() -> None:
    task = MultipleChoiceTask(name="sums", questions=[QUESTION], neutral="Answer:", metrics=("acc_pmi",))
    assert task.requests(QUESTION, "Add.\n", Asking()) == [
        ("Add.\n1 + 1 =", " 2"),
        ("Add.\n1 + 1 =", " 11"),
        ("Answer:", " 2"),
        ("Answer:", " 11"),
    ]
    scores = [Score(-1.0, True, 1, 3), Score(-2.0, False, 2), Score(-3.0, False, 1, 0, True), Score(-4.0, False, 2)]
    assert task.lines(QUESTION, scores) == [
        {
            "target": 0,
            "choices": ["2", "11"],
            "lls": [-1.0, -2.0],
            "n_tokens": [1, 2],
            "unconditional": [-3.0, -4.0],
            "truncated": 1,
            "boundary_merges": 1,
        }
    ]


def test_choices_within_the_context() -> None:
    pairs = (("The cat", " sat."), ("The dog", " sat."))
    question = ChoiceQuestion(id="1", pairs=pairs, choices=("cat", "dog"), gold=1)
    task = MultipleChoiceTask(name="blanks", questions=[question])
    assert task.requests(question, "", Asking()) == list(pairs)
    assert "unconditional" not in task.lines(question, [Score(-1.0, True, 1), Score(-2.0, False, 1)])[0]


def test_a_neutral_context_goes_with_its_metric() -> None:
    for options in ({"neutral": ""}, {"metrics": ("acc", "acc_pmi")}):
        with pytest.raises(ConfigError, match=r"expected a text with acc_pmi only"):
            MultipleChoiceTask(name="sums", questions=[QUESTION], **options)
    with pytest.raises(ConfigError, match=r"metrics: got 'accuracy'"):
        MultipleChoiceTask(name="sums", questions=[QUESTION], metrics=("accuracy",))
