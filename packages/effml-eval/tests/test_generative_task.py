from __future__ import annotations

import pytest
from effml_eval.scoring import Generation, GenerationRequest, SamplingParams
from effml_eval.tasks import GenerativeTask, OpenQuestion
from effml_eval.tasks.task import Asking
from effml_shared.errors import ConfigError

QUESTION = OpenQuestion(id="1", prompt="1 + 1 =", golds=("2", "two"))
TASK = GenerativeTask(name="sums", questions=[QUESTION], sampling=SamplingParams(max_new_tokens=8, stop=("\n",)))


def test_requests() -> None:
    assert TASK.requests(QUESTION, "Add. ", Asking()) == [GenerationRequest("Add. 1 + 1 =", TASK.sampling)]
    other = SamplingParams(max_new_tokens=4, temperature=0.5, stop=("Q",))
    asked = TASK.requests(QUESTION, "", Asking(sampling=other, n_samples=2, seed=3))
    merged = SamplingParams(max_new_tokens=4, temperature=0.5, stop=("Q", "\n"))
    assert asked == [GenerationRequest("1 + 1 =", merged, sample, 3) for sample in range(2)]


def test_lines() -> None:
    assert TASK.lines(QUESTION, [Generation(" 2", "stop", 2, 5), Generation("", "length", 8)]) == [
        {"target": ["2", "two"], "output": " 2", "n_tokens": 2, "finish_reason": "stop", "truncated": 1},
        {"target": ["2", "two"], "output": "", "n_tokens": 8, "finish_reason": "length", "truncated": 0},
    ]


def test_what_it_refuses() -> None:
    for options, message in (
        ({"metrics": ("acc",)}, r"metrics: got 'acc'"),
        ({"extractor": "best"}, r"extractor: got 'best'"),
        ({"equal": "alike"}, r"equal: got 'alike'"),
    ):
        with pytest.raises(ConfigError, match=message):
            GenerativeTask(name="sums", questions=[QUESTION], **options)
