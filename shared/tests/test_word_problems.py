"""Word problems: exact answers, what a story allows, splits that share nothing, and the same problem every time."""

from fractions import Fraction

import pytest
from effml_shared.data.word_problem_templates import Template
from effml_shared.data.word_problems import SPLITS, WordProblem, WordProblemGenerator
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

spans = st.integers(1, 40).flatmap(lambda low: st.tuples(st.just(low), st.integers(low + 10, low + 60)))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    numbers=spans,
    fractions=st.booleans(),
    split=st.sampled_from(SPLITS),
    start=st.integers(0, 10**6),
)
def test_problems_are_what_their_settings_allow(seed, numbers, fractions, split, start):
    generator = WordProblemGenerator(seed, numbers=numbers, fractions=fractions)
    (problem,) = generator.problems(1, split, start=start)
    low, high = generator.ood_ops if split == "ood" else generator.ops
    assert low <= len(problem.steps) <= high
    assert numbers[0] <= problem.start <= numbers[1]
    value = Fraction(problem.start)
    for (operation, operand), total in zip(problem.steps, problem.values[1:], strict=True):
        span = numbers if operation in "+-" else generator.factors
        assert span[0] <= operand <= span[1]
        value = {"+": value + operand, "-": value - operand, "*": value * operand, "/": value / operand}[operation]
        assert value == total
        assert value >= 0
        assert fractions or type(total) is int
    assert problem.answer == value
    assert type(problem.answer) is (int if value.denominator == 1 else Fraction)


def test_fractions_occur_where_wanted():
    answers = [problem.answer for problem in WordProblemGenerator(fractions=True).problems(100)]
    assert any(isinstance(answer, Fraction) for answer in answers)


def test_the_question_tells_every_number():
    for problem in WordProblemGenerator(seed=5).problems(50) + WordProblemGenerator(seed=5).problems(50, "ood"):
        told = problem.question
        for number in (problem.start, *(operand for _, operand in problem.steps)):
            place = told.find(str(number))
            assert place >= 0, (problem, number)
            told = told[place + len(str(number)) :]
        assert problem.question.endswith("?")


def test_train_and_test_share_no_arithmetic_whatever_the_seed():
    train = {(p.start, p.steps) for s in range(3) for p in WordProblemGenerator(s, numbers=(1, 5)).problems(500)}
    test = {(p.start, p.steps) for s in range(3) for p in WordProblemGenerator(s, numbers=(1, 5)).problems(200, "test")}
    assert train
    assert test
    assert not train & test


def test_the_third_split_has_other_stories_and_more_operations():
    problems = WordProblemGenerator().problems(20, "ood")
    assert all("grow there" in problem.question and len(problem.steps) in (5, 6) for problem in problems)


def test_a_problem_follows_from_its_number():
    generator = WordProblemGenerator(seed=7)
    whole = generator.problems(30)
    assert whole[10:25] == WordProblemGenerator(seed=7).problems(15, start=10)
    assert whole != WordProblemGenerator(seed=8).problems(30)
    assert whole[0].question == (
        "Grace collects cards and owns 24 cards. A lucky trade leaves Grace with 6 times as many. A lucky trade leaves "
        "Grace with 4 times as many. Grace shares them equally among 2 people and is one of them. "
        "How many cards does Grace own in the end?"
    )


def test_stories_of_ones_own():
    story = Template(("mile", "miles"), "{name} ran {count}.", {"+": ["Then {count}."]}, "How many {things}?")
    (problem,) = WordProblemGenerator(templates=[story], ops=(1, 1), numbers=(2, 9)).problems(1)
    assert problem.question.endswith("miles. How many miles?")


def test_a_story_without_a_way_on_is_told_again():
    story = Template(("", ""), "{n}", {"-": ["- {n}"]}, "?")
    for problem in WordProblemGenerator(templates=[story], ops=(3, 3), numbers=(1, 9)).problems(20):
        assert problem.answer >= 0


@pytest.mark.parametrize(
    "settings",
    [
        *({"ops": (0, 2)}, {"ops": (3, 2)}, {"ops": (1,)}, {"ops": (1.0, 2.0)}, {"numbers": (0, 9)}),
        *({"factors": (1, 9)}, {"ood_ops": (2, 1)}, {"templates": ()}, {"templates": ("nobody",)}),
        *({"ood_templates": ()}, {"ood_templates": ("nobody",)}),
    ],
)
def test_impossible_settings(settings):
    with pytest.raises(ConfigError, match=r"got"):
        WordProblemGenerator(**settings)


def test_impossible_requests():
    generator = WordProblemGenerator()
    for arguments in ((1, "rl"), (-1, "train")):
        with pytest.raises(ConfigError, match=r"got"):
            generator.problems(*arguments)
    subtract = Template(("", ""), "{n}", {"-": ["- {n}"]}, "?")
    with pytest.raises(ConfigError, match=r"expected a wider range: no train problem"):
        WordProblemGenerator(templates=[subtract], numbers=(5, 5)).problems(1)


def test_values_of_a_problem_by_hand():
    problem = WordProblem("", 7, (("/", 2), ("*", 4), ("-", 20), ("+", 1)))
    assert problem.values == (7, Fraction(7, 2), 14, -6, -5)
