"""Reading what a model wrote: any text at all, as far as it goes."""

from __future__ import annotations

from effml_rl.solution_tree.attempt import Attempt, cut
from hypothesis import given
from hypothesis import strategies as st

WORDS = ["S", "A", "P", ":", "<pad>", "<unk>", "0", "1", "19", "20", "-1", "01", "٣", "x"]


def test_answers_are_read_as_far_as_they_are_whole() -> None:
    for text, states, actions, well_formed in (
        ("S 1 <pad>", (1,), (), True),
        ("S 1 A 2 S 3 <pad>", (1, 3), (2,), True),
        ("S 1 A 2 S 3 <pad> A 2 S", (1, 3), (2,), True),
        ("S 1 A 2 S 3", (1, 3), (2,), False),
        ("S 1 A 2 S", (1,), (), False),
        ("S 1 A 2 S <pad>", (1,), (), False),
        ("S 1 A 20 S 3 <pad>", (1,), (), False),
        ("S 1 A 2 P 3 A 4 S 5 <pad>", (1,), (), False),
        ("S 1 A 2 S 3 A 4 A 5 <pad>", (1, 3), (2,), False),
        ("S 20 <pad>", (), (), False),
        ("<bos> S 1 <pad>", (), (), False),
        ("S", (), (), False),
        ("<pad>", (), (), False),
        ("", (), (), False),
    ):
        assert Attempt.read(text, 20) == Attempt(states, actions, well_formed), text


def test_only_the_vocabularys_own_numbers_count() -> None:
    for number in ("01", "+1", "-1", "٣", "²", "1.0", "9" * 5000):
        assert Attempt.read(f"S {number} <pad>", 20).states == ()


def test_cut_keeps_the_first_end() -> None:
    assert cut("S 1 <pad> <pad> A") == ["S", "1", "<pad>"]
    assert cut("S  1\n") == ["S", "1"]


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_well_formed_answers_are_exactly_those_that_can_be_written_back(words: list[str]) -> None:
    attempt = Attempt.read(" ".join(words), 20)
    assert len(attempt.states) == len(attempt.actions) + bool(attempt.states)
    written = [f"S {attempt.states[0]}"] if attempt.states else []
    written += [f"A {a} S {s}" for a, s in zip(attempt.actions, attempt.states[1:], strict=True)]
    prefix = " ".join(written).split()
    assert cut(" ".join(words))[: len(prefix)] == prefix
    assert attempt.well_formed == (bool(written) and cut(" ".join(words)) == [*prefix, "<pad>"])
