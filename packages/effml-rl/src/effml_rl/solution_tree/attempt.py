"""What a model wrote as an answer to a solution-tree problem, read as far as it can be read.

    S s0  A a0 S s1  ...  A a S s  <pad>          a well-formed answer; whatever follows its first <pad> is cut off

Reading stops at the first step that is not whole: steps before it count, and the format has failed.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Attempt", "cut"]

END = "<pad>"


@dataclass(frozen=True)
class Attempt:
    """The whole steps of an answer.

    >>> Attempt.read("S 9 A 7 S 2 <pad> <pad>", 20)
    Attempt(states=(9, 2), actions=(7,), well_formed=True)
    >>> Attempt.read("S 9 A 7 S 2 A 5 S", 20)
    Attempt(states=(9, 2), actions=(7,), well_formed=False)
    """

    states: tuple[int, ...]  # one more than actions; none if not even the first can be read
    actions: tuple[int, ...]
    well_formed: bool  # the whole text follows the grammar, its end included

    @classmethod
    def read(cls, text: str, n_integers: int) -> Attempt:
        """Read a completion; numbers from `n_integers` on are no words of the task."""
        words = cut(text)
        numbers = [_number(word, n_integers) for word in words]
        if len(words) < 2 or words[0] != "S" or numbers[1] is None:
            return cls((), (), False)
        states, actions, at = [numbers[1]], [], 2
        while words[at : at + 3 : 2] == ["A", "S"] and at + 3 < len(words):
            action, state = numbers[at + 1], numbers[at + 3]
            if action is None or state is None:
                break
            actions.append(action)
            states.append(state)
            at += 4
        return cls(tuple(states), tuple(actions), words[at:] == [END])


def cut(text: str) -> list[str]:
    """Return the words of a completion up to and including its first `<pad>`."""
    words = text.split()
    return words[: words.index(END) + 1] if END in words else words


def _number(word: str, n_integers: int) -> int | None:
    """Return the integer that a word of the vocabulary stands for: no signs, no leading zeros, no other scripts."""
    if not (word.isascii() and word.isdigit() and len(word) < 10):
        return None
    return int(word) if str(int(word)) == word and int(word) < n_integers else None
