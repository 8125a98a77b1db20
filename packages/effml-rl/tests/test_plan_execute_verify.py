"""Plan, execute and verify by hand on the official example, and their identity with the verdict on any text."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from effml_rl.solution_tree import Example, SolutionTreeTask, corruptions, skills, verify_score
from effml_rl.solution_tree.tables import Tables
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

STATES = (9, 2, 3, 3, 0, 5, 4, 4, 2)
ACTIONS = (7, 5, 5, 8, 0, 8, 3, 6)
PROBLEMS = (3, 4, 3, 3, 1, 5, 9, 4, 8)
EXAMPLE = Example(STATES, ACTIONS, PROBLEMS, (0,) * 8)


def official() -> Tables:
    """The tables of the official example, where it shows them."""
    drawn = SolutionTreeTask().tables
    transitions, moves = drawn.transitions.copy(), drawn.problem_moves.copy()
    for before, action, after in zip(STATES, ACTIONS, STATES[1:], strict=False):
        transitions[before, action] = after
    transitions[9, 1] = 6
    for before, action, after in zip(PROBLEMS, ACTIONS, PROBLEMS[1:], strict=False):
        row = moves[before]
        other = int(np.flatnonzero(row == after)[0])
        row[action], row[other] = after, row[action]  # rows stay permutations
    return dataclasses.replace(drawn, transitions=transitions, problem_moves=moves)


TABLES = official()
TINY = SolutionTreeTask(n_states=3, n_actions=2, n_contexts=2, n_problem=4, len_range=(1, 3), n_irrelevant=0)


def test_the_official_example_by_hand() -> None:
    gold = skills(TABLES, EXAMPLE, EXAMPLE.completion)
    assert (gold.plan, gold.execute, gold.correct) == (1.0, 1.0, True)

    last = dataclasses.replace(EXAMPLE, states=(*STATES[:-1], 5))
    wrong_end = skills(TABLES, EXAMPLE, last.completion)
    assert (wrong_end.plan, wrong_end.execute, wrong_end.correct) == (1.0, 7 / 8, False)
    assert (wrong_end.plan_success, wrong_end.execute_success) == (True, False)

    actions, states = (1, *ACTIONS[1:]), [9]
    for action in actions:
        states.append(int(TABLES.transitions[states[-1], action]))
    assert states[1] == 6
    detour = skills(TABLES, EXAMPLE, Example(tuple(states), actions, PROBLEMS, (0,) * 8).completion)
    assert (detour.plan, detour.execute, detour.correct) == (7 / 8, 1.0, False)
    assert (detour.plan_success, detour.execute_success) == (False, True)

    endless = skills(TABLES, EXAMPLE, EXAMPLE.completion.removesuffix(" <pad>"))
    assert (endless.plan, endless.execute) == (1.0, 1.0)
    assert (endless.well_formed, endless.correct) == (False, False)


def test_answers_of_other_lengths_and_none() -> None:
    short = skills(TABLES, EXAMPLE, "S 9 A 7 S 2 <pad>")
    assert (short.plan, short.execute, short.plan_success, short.execute_success) == (1.0, 1.0, False, True)
    assert not short.correct
    long = skills(TABLES, EXAMPLE, EXAMPLE.completion.replace("<pad>", "A 0 S 0 <pad>"))
    assert (long.plan, long.execute, long.correct) == (1.0, 1.0, False)
    assert skills(TABLES, EXAMPLE, "")[:3] == (0.0, 0.0, False)
    assert skills(TABLES, EXAMPLE, "S 9 <pad>") == (0.0, 0.0, True, True, False, False)
    elsewhere = skills(TABLES, EXAMPLE, EXAMPLE.completion.replace("S 9", "S 8", 1))
    assert not elsewhere.starts_right
    assert not elsewhere.correct


def test_integers_that_are_no_states_or_actions_execute_nothing() -> None:
    example = TINY.sample(1)[0]
    strange = skills(TINY.tables, example, "S 3 A 3 S 3 <pad>")  # the vocabulary has four integers
    assert (strange.execute, strange.well_formed, strange.correct) == (0.0, True, False)


@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["S", "A", "<pad>", *"0123x"])), max_size=3),
)
def test_right_is_well_formed_and_started_and_planned_and_executed(row: int, edits: list[tuple[int, str]]) -> None:
    example = TINY.sample(1, start=row)[0]
    words = example.completion.split()
    for place, word in edits:
        words[place % len(words)] = word
    text = " ".join(words)
    (verdict,) = TINY.verifier([example.prompt], [text], [example.completion])
    found = skills(TINY.tables, example, text)
    assert found.correct == (verdict.status == "correct")
    assert found.well_formed == (verdict.status != "unparseable")


def test_corruptions_are_wrong_in_one_word() -> None:
    rng = np.random.default_rng(0)
    for text in corruptions(TABLES, EXAMPLE, 200, rng):
        differing = [i for i, (a, b) in enumerate(zip(text.split(), EXAMPLE.completion.split(), strict=True)) if a != b]
        assert len(differing) == 1
        assert skills(TABLES, EXAMPLE, text).well_formed
        assert not skills(TABLES, EXAMPLE, text).correct
    assert len(set(corruptions(TABLES, EXAMPLE, 200, rng))) > 100
    lonely = Tables.draw(n_states=1, n_actions=1, n_contexts=1, n_problem=1, alpha=1.0, beta=1.0, seed=0)
    with pytest.raises(ConfigError, match=r"got one state and one action"):
        corruptions(lonely, Example((0, 0), (0,), (0, 0), (0,)), 1, rng)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_verify_score_is_the_share_of_ordered_pairs(answers: list[tuple[int, bool]]) -> None:
    right = [score for score, correct in answers if correct]
    wrong = [score for score, correct in answers if not correct]
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    found = verify_score([score for score, _ in answers], [correct for _, correct in answers])
    assert found == pytest.approx(sum(pairs) / len(pairs)) if pairs else math.isnan(found)


def test_verify_score_takes_infinities_but_no_nan() -> None:
    assert verify_score([-math.inf, -1.0], [False, True]) == 1.0
    with pytest.raises(ConfigError, match=r"scores: got"):
        verify_score([math.nan, 1.0], [False, True])
    with pytest.raises(ConfigError, match=r"scores: got \(1,\) for \(2,\) answers"):
        verify_score([1.0], [False, True])
