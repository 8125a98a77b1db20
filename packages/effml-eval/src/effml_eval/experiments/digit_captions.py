"""Captions of handwritten digits: a small grammar, every sentence of which can be numbered.

    caption = subject [", " remark]*        remarks on stroke, slant and width, in this order, each made or left out

A subject names the digit in one of several ways; a remark says what is remarkable, in one of several ways. So an image
has `phrasings(facts)` captions, numbered from 0, and a caption says some of what is true of its image and nothing else.
What is said has the columns of `handwritten_digits.FACTS`. The vocabulary is that of the grammar, a few dozen words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from effml_shared.checks import check_range
from torch import Tensor

from effml_eval.experiments.handwritten_digits import FACTS

__all__ = ["VOCABULARY", "bags_of_words", "caption", "draw_captions", "phrasings"]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUBJECTS = (
    "a handwritten {name}",
    "the digit {numeral}",
    "the number {name}",
    "{numeral}",
    "a scan of the numeral {numeral}",
    "somebody wrote {name}",
)
REMARKS = {
    "thin": ("thin strokes", "drawn with a fine pen"),
    "thick": ("thick strokes", "in bold"),
    "leaning left": ("leaning left", "slanted to the left"),
    "upright": ("upright", "standing straight"),
    "leaning right": ("leaning right", "slanted to the right"),
    "narrow": ("narrow", "slim"),
    "wide": ("wide", "broad"),
}
_KINDS = (("thin", "thick"), ("leaning left", "upright", "leaning right"), ("narrow", "wide"))  # of one, at most one


def _choices(facts: Sequence[bool]) -> tuple[int, list[tuple[str, tuple[str, ...]]]]:
    """Return the digit, and for every kind of remark that can be made its fact with the ways to say it."""
    true = {name for name, holds in zip(FACTS, facts, strict=True) if holds}
    (digit,) = (number for number in range(10) if str(number) in true)
    return digit, [(fact, REMARKS[fact]) for kind in _KINDS for fact in kind if fact in true]


def phrasings(facts: Sequence[bool]) -> int:
    """Return how many captions an image of these facts has."""
    return len(SUBJECTS) * math.prod(1 + len(ways) for _, ways in _choices(facts)[1])


def caption(facts: Sequence[bool], number: int) -> tuple[str, list[bool]]:
    """Return caption `number` of an image, and which facts it says.

    Raises:
        ConfigError: the number is not from 0 to below `phrasings`.

    >>> facts = [name in ("7", "thin", "upright") for name in FACTS]
    >>> caption(facts, 0)[0], caption(facts, 25)[0], phrasings(facts)
    ('a handwritten seven', 'the digit 7, thin strokes, upright', 54)
    """
    digit, remarks = _choices(facts)
    check_range("number", number, 0, phrasings(facts))
    number, subject = divmod(number, len(SUBJECTS))
    parts, said = [SUBJECTS[subject].format(name=NAMES[digit], numeral=digit)], {str(digit)}
    for fact, ways in reversed(remarks):
        number, way = divmod(number, 1 + len(ways))
        if way:
            parts.insert(1, ways[way - 1])
            said.add(fact)
    return ", ".join(parts), [name in said for name in FACTS]


def draw_captions(facts: Tensor, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Draw one of the captions of every image, all equally likely: the captions, and what they say (N, facts) bool."""
    draws = torch.rand(len(facts), dtype=torch.float64, generator=generator).tolist()
    rows = facts.tolist()
    drawn = [caption(row, int(draw * phrasings(row))) for row, draw in zip(rows, draws, strict=True)]
    said = torch.tensor([row for _, row in drawn], dtype=torch.bool).reshape(len(rows), len(FACTS))
    return [text for text, _ in drawn], said


def _words(text: str) -> list[str]:
    return text.replace(",", "").split()


VOCABULARY = tuple(
    sorted(
        {word for subject in SUBJECTS for word in _words(subject) if "{" not in word}
        | {word for ways in REMARKS.values() for way in ways for word in _words(way)}
        | {*NAMES, *map(str, range(10))}
    )
)
"""Every word a caption can hold."""


def bags_of_words(captions: Sequence[str]) -> Tensor:
    """Return how often each word of the vocabulary stands in every caption, (N, words) float32."""
    places = {word: column for column, word in enumerate(VOCABULARY)}
    bags = torch.zeros(len(captions), len(VOCABULARY))
    for bag, text in zip(bags, captions, strict=True):
        for word in _words(text):
            bag[places[word]] += 1
    return bags
