"""Where a stop string ends a text that is still being written.

The text ends before the stop string that begins earliest. While a text grows, one that has been found may still be
overtaken by a longer one that began before it and is not complete yet: with "abc" and "b", "ab" is not decided. So the
end is certain only when no such beginning is left, and what is cut off does not depend on how many tokens were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from effml_eval.scoring.tokenizer_adapter import TokenizerAdapter

__all__ = ["StopStrings", "find_stop", "is_certain"]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the earliest stop string in a text begins; None: there is none.

    >>> find_stop("one two three", ["three", "two"])
    4
    """
    return min((place for place in (text.find(string) for string in stop) if place >= 0), default=None)


def is_certain(text: str, place: int, stop: Sequence[str]) -> bool:
    """Return whether no continuation of the text can make a stop string begin before `place`.

    >>> is_certain("ab", 1, ["abc", "b"]), is_certain("abx", 1, ["abc", "b"])
    (False, True)
    """
    starts = range(max(0, len(text) - max(map(len, stop)) + 1), place)
    return not any(string.startswith(text[start:]) for start in starts for string in stop)


class StopStrings:
    """Look for stop strings in the text of growing lists of tokens."""

    def __init__(self, tokenizer: TokenizerAdapter, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        # A character has at most four bytes and a token at least one, so this many hold whatever may still change.
        self.tail = 4 * max(map(len, self.stop), default=0) + 4

    def decided(self, ids: Sequence[int]) -> bool:
        """Return whether the text of these tokens holds its end for certain; cheap while nothing is found."""
        if not self.stop or find_stop(self.tokenizer.decode(ids[-self.tail :]), self.stop) is None:
            return False
        text = self.tokenizer.decode(ids)
        place = find_stop(text, self.stop)
        return place is not None and is_certain(text, place, self.stop)
