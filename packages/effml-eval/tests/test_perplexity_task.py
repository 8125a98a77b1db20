from __future__ import annotations

import pytest
from effml_eval.scoring import RollingScore
from effml_eval.tasks import Document, PerplexityTask
from effml_eval.tasks.task import Asking
from effml_shared.errors import ConfigError

DOCUMENT = Document(id="1", text="two words")


def test_requests_and_lines() -> None:
    task = PerplexityTask(name="texts", questions=[DOCUMENT])
    assert task.requests(DOCUMENT, "", Asking()) == ["two words"]
    expected = {"target": None, "lls": [-7.0], "n_tokens": [3], "n_bytes": 9, "n_words": 2}
    assert task.lines(DOCUMENT, [RollingScore(-7.0, 3, 9, 2)]) == [expected]


def test_texts_stand_alone() -> None:
    for options in ({"shots": [DOCUMENT]}, {"description": "A text:"}):
        with pytest.raises(ConfigError, match=r"expected texts alone"):
            PerplexityTask(name="texts", questions=[DOCUMENT], **options)
