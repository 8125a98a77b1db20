from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_eval.scoring import GenerationRequest, LMScorer, SamplingParams, ScoreRequest
from effml_eval.tasks import GenerativeTask, MultipleChoiceTask, OpenQuestion, choice_question
from effml_eval.tasks.few_shot import choose_shots, fits_into, prefix_of
from effml_eval.tasks.task import Asking
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import ConfigError
from torch import Tensor, nn

QUESTIONS = [choice_question(str(i), f"{i} + 1 =", [str(i + 1), "0"], 0) for i in range(6)]


def task(**options: Any) -> MultipleChoiceTask:
    return MultipleChoiceTask(**{"name": "sums", "questions": QUESTIONS[:2], "shots": QUESTIONS, **options})


class Flat(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 257)


def test_examples_are_drawn_for_each_question() -> None:
    drawn = [[shot.id for shot in choose_shots(task(), question, 4, seed=0)] for question in QUESTIONS]
    assert all(len(set(ids)) == 4 and str(i) not in ids for i, ids in enumerate(drawn))  # never the question itself
    assert len({tuple(ids) for ids in drawn}) > 1
    assert drawn[0] == [shot.id for shot in choose_shots(task(metrics=("acc",)), QUESTIONS[0], 4, seed=0)]
    assert drawn != [[shot.id for shot in choose_shots(task(), question, 4, seed=1)] for question in QUESTIONS]
    assert [shot.id for shot in choose_shots(task(shot_choice="first"), QUESTIONS[1], 3, seed=0)] == ["0", "2", "3"]
    with pytest.raises(ConfigError, match=r"num_fewshot: got 6 for task sums, which has 5"):
        choose_shots(task(), QUESTIONS[0], 6, seed=0)
    with pytest.raises(ConfigError, match=r"num_fewshot: got -1"):
        choose_shots(task(), QUESTIONS[0], -1, seed=0)


def test_a_prefix() -> None:
    opened = task(shot_choice="first", description="Add.", separator="\n")
    assert prefix_of(opened, QUESTIONS[0], 2, Asking(), lambda _: True) == ("Add.\n1 + 1 = 2\n2 + 1 = 3\n", 2, 0)
    assert prefix_of(task(), QUESTIONS[0], 0, Asking(), lambda _: True) == ("", 0, 0)
    assert prefix_of(opened, QUESTIONS[0], 2, Asking(), lambda _: False) == ("Add.\n", 0, 2)


def test_examples_that_do_not_fit_are_dropped_from_the_front() -> None:
    first = task(shot_choice="first", separator="\n")
    shown = "1 + 1 = 2\n2 + 1 = 3\n3 + 1 = 4\n"
    whole = len(shown + "0 + 1 = 1") - 1  # the last token is not read
    for longest, kept in ((whole, 3), (whole - 1, 2), (whole - 10, 2), (whole - 11, 1), (8, 0), (4, 0)):
        fits = fits_into(LMScorer(Flat(), ByteTokenizer(), max_length=longest))
        prefix = prefix_of(first, QUESTIONS[0], 3, Asking(), fits)
        assert prefix == (shown[10 * (3 - kept) :], kept, 3 - kept)


def test_room_for_what_is_written() -> None:
    fits = fits_into(LMScorer(Flat(), ByteTokenizer(), max_length=10))
    assert fits(GenerationRequest("123456", SamplingParams(max_new_tokens=4)))
    assert not fits(GenerationRequest("1234567", SamplingParams(max_new_tokens=4)))
    assert fits(ScoreRequest("1234567", " abc"))
    assert not fits(ScoreRequest("12345678", " abc"))
    assert fits("a document of any length")
    question = OpenQuestion(id="1", prompt="12", golds=("3",))
    writing = GenerativeTask(
        name="w", questions=[question], shots=[OpenQuestion(id="2", prompt="4", golds=("5",))], separator=""
    )
    asking = Asking(sampling=SamplingParams(max_new_tokens=5))
    assert prefix_of(writing, question, 1, asking, fits).text == "4 5"
    assert prefix_of(writing, question, 1, Asking(sampling=SamplingParams(max_new_tokens=6)), fits).text == ""
