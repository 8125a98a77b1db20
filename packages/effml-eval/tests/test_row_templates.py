from __future__ import annotations

import pytest
from effml_eval.tasks.row_templates import choice_reader, document_reader, fill, gold_index, open_reader
from effml_shared.errors import ConfigError

ROW = {"q": "Which?", "id": 7, "options": ["red", "2"], "labels": ["A", "B"], "right": "B", "about": {"book": "x"}}


def test_templates() -> None:
    assert fill(r"{{ q }} {q} \boxed{} {{about.book}}{{id}}", ROW) == r"Which? {q} \boxed{} x7"
    assert fill("{{q}}", {"q": "{{id}}"}) == "{{id}}"  # what a row holds is no template
    with pytest.raises(ConfigError, match=r"field title: got a row with 'q, id"):
        fill("{{title}}", ROW)


def test_the_right_choice() -> None:
    assert gold_index("b", ["a", "b"]) == 1
    assert gold_index(1, ["1", "2"]) == 1
    assert gold_index("2", ["1", "2"]) == 1  # a text that is a choice is no index
    assert gold_index("2", ["x", "y"], ["1", "2"]) == 1
    assert gold_index(" A ", ["x", "y"], ["A", "B"]) == 0
    assert gold_index(5, ["a", "b"]) == 5  # which no question takes
    for gold in ("C", "", None, "-1"):
        with pytest.raises(ConfigError, match=r"gold: got"):
            gold_index(gold, ["a", "b"])


def test_choices() -> None:
    read = choice_reader("Q: {{q}}\nA:", "options", "right", labels="labels", id="id", tags=["about.book"])
    question = read(ROW, 0)
    assert (question.id, question.tags, question.gold) == ("7", {"about.book": "x"}, 1)
    assert question.pairs == (("Q: Which?\nA:", " red"), ("Q: Which?\nA:", " 2"))
    fixed = choice_reader("{{q}}", ["yes {{id}}", "no"], "answer", delimiter="\n")({**ROW, "answer": "no"}, 3)
    assert (fixed.id, fixed.gold, fixed.pairs[0]) == ("3", 1, ("Which?", "\nyes 7"))
    with pytest.raises(ConfigError, match=r"choices: got 'Which\?', expected a list of texts"):
        choice_reader("", "q", "right")(ROW, 0)


def test_open_questions_and_documents() -> None:
    question = open_reader("{{q}}", "options", solution=" {{right}}")(ROW, 4)
    assert (question.id, question.golds, question.shown) == ("4", ("red", "2"), "Which? B")
    assert open_reader("{{q}}", "id")(ROW, 4).golds == ("7",)
    assert document_reader("{{q}}\n")(ROW, 4).text == "Which?\n"
