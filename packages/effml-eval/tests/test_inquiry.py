from __future__ import annotations

from typing import Any

import pytest
from effml_eval.evaluation.inquiry import check_tasks, describe_task, inquire, lines_of
from effml_eval.grading import Intervals
from effml_eval.scoring import Generation, SamplingParams, Score
from effml_eval.tasks import GenerativeTask, MultipleChoiceTask, OpenQuestion, choice_question
from effml_eval.tasks.task import Asking
from effml_shared.errors import ConfigError

CHOICES = [choice_question(str(i), f"{i} + 1 =", [str(i + 1), "0"], 0, tags={"kind": "sum"}) for i in range(4)]
OPEN = [OpenQuestion(id="1", prompt="1 + 1 =", golds=("2",))]
SAMPLED = Asking(sampling=SamplingParams(temperature=1.0), n_samples=3)


def quiz(**options: Any) -> MultipleChoiceTask:
    return MultipleChoiceTask(**{"name": "quiz", "questions": CHOICES, "shots": CHOICES, **options})


def asked(task: Any, asking: Asking, **options: Any) -> Any:
    return inquire(task, asking, **{"limit": None, "num_fewshot": 0, "fits": lambda _: True, **options})


def test_lines_hold_what_was_asked_and_answered() -> None:
    inquiries = asked(quiz(), Asking(), num_fewshot=2, limit=3)
    answers: Any = {key: Score(-1.0, True, 1) for inquiry in inquiries for key in inquiry.keys}
    lines = lines_of(quiz(), inquiries, answers)
    assert [line["doc_id"] for line in lines] == ["0", "1", "2"]
    line = lines[0]
    assert (line["task"], line["sample"], line["requests"], line["n_shots"]) == ("quiz", 0, 2, 2)
    assert (line["tags"], line["lls"], line["target"]) == ({"kind": "sum"}, [-1.0, -1.0], 0)
    assert len({line["request_hash"] for line in lines}) == len({line["prompt_hash"] for line in lines}) == 3


def test_samples_are_lines_of_their_own() -> None:
    task = GenerativeTask(name="open", questions=OPEN)
    (inquiry,) = inquiries = asked(task, SAMPLED)
    answers: Any = {key: Generation(str(key[1]), "eos", 1) for key in inquiry.keys}
    lines = lines_of(task, inquiries, answers)
    assert [(line["sample"], line["output"], line["requests"]) for line in lines] == [
        (0, "0", 1),
        (1, "1", 1),
        (2, "2", 1),
    ]
    assert {line["request_hash"] for line in lines} == {inquiry.keys[0][0]}


def test_the_description_tells_prompts_apart() -> None:
    def described(task: MultipleChoiceTask, **options: Any) -> dict[str, Any]:
        return describe_task(task, asked(task, Asking(), **options), options.get("num_fewshot", 0))

    plain = described(quiz())
    assert (plain["questions"], plain["evaluated"], plain["n_shot"], plain["version"]) == (4, 4, 0, 1)
    assert described(quiz(metrics=("nll",))) == plain
    few = described(quiz(), num_fewshot=1)
    assert few["prompt_hash"] != plain["prompt_hash"]
    assert few["questions_sha256"] == plain["questions_sha256"]
    assert described(quiz(), limit=2)["questions_sha256"] != plain["questions_sha256"]
    assert described(quiz(description="Add."))["prompt_hash"] != plain["prompt_hash"]


def test_what_could_not_be_graded() -> None:
    task = GenerativeTask(name="open", questions=OPEN, metrics=("maj@3",))
    check_tasks([quiz(), task], SAMPLED, Intervals())
    for tasks, asking, intervals, message in (
        ([], SAMPLED, Intervals(), r"tasks: got none"),
        ([quiz(), quiz()], SAMPLED, Intervals(), r"tasks: got quiz, quiz"),
        ([task], Asking(), Intervals(), r"got maj@3 of 1 samples"),
        ([task], Asking(n_samples=3), Intervals(), r"n_samples: got 3 at temperature 0 for task open"),
        ([task], SAMPLED, Intervals(ci="wilson"), r"ci: got 'wilson' for means of 3 samples"),
        ([quiz()], Asking(n_samples=0), Intervals(), r"n_samples: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_tasks(tasks, asking, intervals)
    check_tasks([quiz()], SAMPLED, Intervals(ci="wilson"))  # of choices there is one sample whatever is asked
    with pytest.raises(ConfigError, match=r"limit: got 0"):
        asked(quiz(), Asking(), limit=0)
