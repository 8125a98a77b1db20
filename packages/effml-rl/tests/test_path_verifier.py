"""Verdicts on solution-tree answers."""

from __future__ import annotations

import pytest
from effml_rl.solution_tree import SolutionTreeTask
from effml_rl.solution_tree.path_verifier import PathVerifier
from effml_shared.errors import ConfigError

GOLD = "S 9 A 7 S 2 <pad>"


def test_only_the_whole_answer_is_right() -> None:
    for text, reward, status in (
        (GOLD, 1.0, "correct"),
        (GOLD + " <pad> <pad>", 1.0, "correct"),
        (GOLD + " A 7", 1.0, "correct"),
        ("S 9 A 7 S 2", 0.0, "unparseable"),
        ("S 9 A 7 S 3 <pad>", 0.0, "wrong"),
        ("S 9 <pad>", 0.0, "wrong"),
        ("S 9 A 7 S 2 A 1 S 1 <pad>", 0.0, "wrong"),
        ("<bos> " + GOLD, 0.0, "unparseable"),
        ("", 0.0, "unparseable"),
    ):
        (verdict,) = PathVerifier(20)(["?"], [text], [GOLD])
        assert (verdict.reward, verdict.status) == (reward, status), text
    assert PathVerifier(20)(["?"], [GOLD + " <pad>"], [GOLD])[0].answer == GOLD
    assert PathVerifier(20)([], [], []) == []


def test_padded_ids_decode_to_right_answers() -> None:
    task = SolutionTreeTask()
    examples = task.sample(50, "test")
    texts = [task.tokenizer.decode(row) for row in examples.completions(task.tokenizer).numpy()]
    golds, prompts = [example.completion for example in examples], [example.prompt for example in examples]
    assert all(verdict.reward == 1 for verdict in task.verifier(prompts, texts, golds))
    others = golds[1:] + golds[:1]
    assert all(verdict.status == "wrong" for verdict in task.verifier(prompts, others, golds))


def test_as_many_of_each_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"verifier: got 1 prompts, 2 completions and 1 targets"):
        PathVerifier(20)(["?"], [GOLD, GOLD], [GOLD])
    with pytest.raises(ConfigError, match=r"n_integers: got 0"):
        PathVerifier(0)
