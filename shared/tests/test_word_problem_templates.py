"""Stories: grammar of one and many, and sentences that cannot be told."""

import pytest
from effml_shared.data.word_problem_templates import TEMPLATES, Template
from effml_shared.errors import ConfigError


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_sentence_says_its_number(name):
    story = TEMPLATES[name]
    sentences = [story.opening, *(phrase for phrases in story.phrases.values() for phrase in phrases)]
    for sentence in sentences:
        assert "17" in story.fill(sentence, "Ada", 17)
    assert story.fill(story.question, "Ada", 0).endswith("?")


def test_one_thing_is_not_many():
    story = TEMPLATES["market"]
    assert story.fill(story.opening, "Ada", 1) == "Ada has 1 apple."
    assert story.fill(story.opening, "Ada", 2) == "Ada has 2 apples."


@pytest.mark.parametrize("phrases", [{}, {"^": ["{n}"]}, {"+": []}])
def test_operations_that_do_not_exist(phrases):
    with pytest.raises(ConfigError, match=r"phrases: got operations"):
        Template(("", ""), "{n}", phrases, "?")


@pytest.mark.parametrize("sentence", ["{number}", "{0}", "{n", "{}", "{n:q}"])
def test_placeholders_that_do_not_exist(sentence):
    with pytest.raises(ConfigError, match=r"template: got"):
        Template(("", ""), "{n}", {"+": [sentence]}, "?")
