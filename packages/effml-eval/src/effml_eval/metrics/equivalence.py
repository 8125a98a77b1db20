"""Whether an answer is the gold one: as text, as normalised text, as a number. (`formulas`: as a formula.)

An absent answer (None) equals nothing, not even another absent one. With several gold answers any will do. Numbers are
read and compared by `effml_shared.data.numbers`: exactly if both are integers or fractions, else to within
1e-6 max(1, |gold|). A per cent sign on one side only may be read either way, 50% as 50 or as 0.5: data sets disagree.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from effml_shared.data.numbers import Number, numbers_equal, parse_number
from effml_shared.errors import ConfigError

__all__ = ["exact_equal", "is_correct", "normalize_text", "normalized_equal", "numeric_equal"]

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PER_CENT = re.compile(r"%[\s.$]*$")


def is_correct(answer: Any, gold: Any, equal: Callable[[Any, Any], bool]) -> bool:
    """Say whether an answer equals the gold one, or any of a list, tuple or set of gold ones.

    Raises:
        ConfigError: there is no gold answer: a question without one must not count as wrong.

    >>> is_correct("4", ["four", "4"], exact_equal), is_correct(None, "4", exact_equal)
    (True, False)
    """
    golds = list(gold) if isinstance(gold, list | tuple | set | frozenset) else [gold]
    if not golds or any(each is None for each in golds):
        raise ConfigError(f"gold: got {gold!r}, expected a right answer, or several")
    return answer is not None and any(equal(answer, each) for each in golds)


def exact_equal(answer: Any, gold: Any) -> bool:
    """Say whether two texts are the same but for white space, or two other values the same.

    >>> exact_equal(" New  York", "New York"), exact_equal(None, None)
    (True, False)
    """
    if answer is None or gold is None:
        return False
    if isinstance(answer, str) and isinstance(gold, str):
        return answer.split() == gold.split()
    return bool(answer == gold)


def normalized_equal(answer: Any, gold: Any) -> bool:
    """Say whether two texts are the same after `normalize_text`; what is no text counts as it is printed.

    >>> normalized_equal("The Beatles!", "beatles")
    True
    """
    return answer is not None and gold is not None and normalize_text(str(answer)) == normalize_text(str(gold))


def normalize_text(text: str, *, casefold: bool = True, punctuation: bool = True, articles: bool = True) -> str:
    """Return a text with single blanks, and without case, ASCII punctuation and English articles unless told otherwise.

    >>> normalize_text(" The  Cat's  hat."), normalize_text("A. B", punctuation=False, articles=False)
    ('cats hat', 'a. b')
    """
    if casefold:
        text = text.casefold()
    if punctuation:
        text = text.translate(_PUNCTUATION)
    if articles:
        text = _ARTICLE.sub(" ", text)
    return " ".join(text.split())


def numeric_equal(answer: Any, gold: Any) -> bool:
    """Say whether two numbers, or texts that are numbers, are equal.

    >>> numeric_equal("1,000", 1000), numeric_equal(r"\\frac{1}{2}", "0.5"), numeric_equal("50%", "1/2")
    (True, True, True)
    """
    a, b = _number(answer), _number(gold)
    if a is None or b is None:
        return False
    if numbers_equal(a, b):
        return True
    a_percent, b_percent = _is_percent(answer), _is_percent(gold)
    if a_percent == b_percent:
        return False
    return numbers_equal(_hundredth(a), b) if a_percent else numbers_equal(a, _hundredth(b))


def _number(value: Any) -> Number | None:
    if isinstance(value, str):
        return parse_number(value)
    return value if isinstance(value, int | float | Fraction) and not isinstance(value, bool) else None


def _is_percent(value: Any) -> bool:
    return isinstance(value, str) and _PER_CENT.search(value) is not None


def _hundredth(number: Number) -> Number:
    return number / 100 if isinstance(number, float) else Fraction(number) / 100
