"""Read numbers from text exactly, and decide when two are equal.

Integers and fractions stay exact; what is written with a decimal point or an exponent is a float, and floats are equal
to within 1e-6 max(1, |target|). The comparison is made in rational arithmetic, so nothing overflows and nothing is
rounded away: a tolerance is a tolerance at 1e300 too.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

__all__ = ["Number", "numbers_equal", "parse_number"]

Number = int | float | Fraction

_LONGEST = 1000  # characters; Python converts longer integers in quadratic time, or not at all
_TOLERANCE = Fraction(1, 10**6)

# Possessive throughout (`*+`): a model may write anything, and no text may take long.
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)"
_RATIO = re.compile(rf"({_INTEGER})\s*+/\s*+({_INTEGER})")
_FRAC = re.compile(rf"\\[dt]?frac\s*+\{{\s*+(-?{_INTEGER})\s*+\}}\s*+\{{\s*+(-?{_INTEGER})\s*+\}}")
_FLOAT = re.compile(rf"(?:{_INTEGER}(?:\.[0-9]++(?:[eE][-+]?[0-9]++)?|[eE][-+]?[0-9]++)|\.[0-9]++)")
_WHOLE = re.compile(_INTEGER)
# A letter that touches the number is a variable; a word that stands apart is a unit.
_UNIT = re.compile(
    r"(?:\s*+(?:\\?%|\\?\$|°|\^\\circ|\^\{\\circ\}|\\(?:text|mathrm)\s*+\{[^{}]*+\}))?(?:\s++[A-Za-z][A-Za-z .]*+)?"
)


def parse_number(text: str) -> Number | None:
    """Return the number that the whole of a text is, None if it is not one.

    Dollar signs, thousands separators, a per cent sign and units behind the number are dropped.

    >>> parse_number("$1,000 dollars"), parse_number("14.5%"), parse_number("1/2"), parse_number("1 or 2")
    (1000, 14.5, Fraction(1, 2), None)
    """
    if len(text) > _LONGEST:
        return None
    text = text.replace("−", "-").replace(r"\!", "").replace("{,}", ",")
    text = text.strip().removeprefix("$").removesuffix("$").strip().rstrip(".,;").rstrip()
    sign = -1 if text.startswith("-") else 1
    text = text.removeprefix("-" if sign < 0 else "+").lstrip().removeprefix(r"\$").removeprefix("$").lstrip()
    for pattern in (_FRAC, _RATIO, _FLOAT, _WHOLE):
        if (found := pattern.match(text)) and _UNIT.fullmatch(text, found.end()):
            number = _value(pattern, found)
            return None if number is None else sign * number
    return None


def _value(pattern: re.Pattern[str], found: re.Match[str]) -> Number | None:
    if pattern in (_FRAC, _RATIO):
        above, below = (int(part.replace(",", "")) for part in found.groups())
        return Fraction(above, below) if below else None
    written = found[0].replace(",", "")
    if pattern is _WHOLE:
        return int(written)
    number = float(written)
    return number if math.isfinite(number) else None


def numbers_equal(answer: Number, target: Number) -> bool:
    """Say whether an answer is the target: exactly for integers and fractions, else to 1e-6 max(1, |target|).

    >>> numbers_equal(0.5, Fraction(1, 2)), numbers_equal(10**20 + 1, 10**20), numbers_equal(float("nan"), 1)
    (True, False, False)
    """
    if isinstance(answer, float) and not math.isfinite(answer):
        return False
    if isinstance(target, float) and not math.isfinite(target):
        return False
    difference = abs(Fraction(answer) - Fraction(target))
    if isinstance(answer, float) or isinstance(target, float):
        return difference <= _TOLERANCE * max(Fraction(1), abs(Fraction(target)))
    return difference == 0
