from __future__ import annotations

import pytest
from effml_eval.tasks.questions import ChoiceQuestion, Document, OpenQuestion, choice_question
from effml_shared.errors import ConfigError


def test_what_is_shown_as_an_example() -> None:
    assert choice_question("1", "Q", ["a", "b"], 1, delimiter=": ").shown == "Q: b"
    varied = ChoiceQuestion(id="1", pairs=(("He", " ran"), ("She", " ran")), choices=("He", "She"), gold=1)
    assert varied.shown == "She ran"
    assert OpenQuestion(id="1", prompt="1 + 1 =", golds=("2", "two")).shown == "1 + 1 = 2"
    assert OpenQuestion(id="1", prompt="Q\nA:", golds=("2",), solution=" It is 2.").shown == "Q\nA: It is 2."
    assert Document(id="1", text="some text").shown == "some text"


@pytest.mark.parametrize(
    ("choices", "gold", "message"),
    [
        (["a"], 0, r"two or more choices"),
        ([], 0, r"two or more choices"),
        (["a", ""], 0, r"none empty"),
        (["a", "b"], 2, r"question 7: got gold 2, expected the index of one of 2 choices"),
        (["a", "b"], -1, r"got gold -1"),
        (["a", "b"], True, r"got gold True"),
        (["a", "b"], "0", r"got gold '0'"),
    ],
)
def test_questions_that_are_none(choices: list[str], gold: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choice_question("7", "Q", choices, gold)


def test_a_pair_for_each_choice_and_a_right_answer() -> None:
    with pytest.raises(ConfigError, match=r"a pair each"):
        ChoiceQuestion(id="1", pairs=(("Q", " a"),), choices=("a", "b"), gold=0)
    for golds in ((), ("",)):
        with pytest.raises(ConfigError, match=r"expected one or more answers"):
            OpenQuestion(id="1", prompt="Q", golds=golds)
