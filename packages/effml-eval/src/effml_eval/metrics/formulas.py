r"""Whether two formulas, in LaTeX or plain text, are the same: by their values at fixed points.

Two expressions that agree at a few random complex points are the same function, but for accidents of probability 0. So
each is read and evaluated in one pass at three points that a hash of the variable's name fixes: no computer algebra, no
`eval`, no time limit that would make scores depend on the machine. Complex points see that sqrt(x^2) is not x.

Understood: numbers, variables, + - * / ^, implicit products, \frac, \sqrt[n]{}, |x|, powers and roots, elementary
functions, pi, e, i, infinity, subscripts, per cent; tuples and intervals in brackets, sets in braces or as bare lists
(in any order), unions. Of `x = 5` the right side counts, and units in \text{} do not. What cannot be read (words,
matrices, inequalities, `1 1/2`) equals only the same text.

Cost: linear in the text, which is at most 500 characters. The method is our own: a randomised identity test.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from effml_shared.seeding import derive_seed

from effml_eval.metrics.equivalence import exact_equal, numeric_equal

__all__ = ["symbolic_equal"]

_LONGEST = 500  # characters
_DEEPEST = 40  # nested brackets, powers and functions
_POINTS = 3
_RELATIVE, _ABSOLUTE = 1e-6, 1e-12

Value = complex | tuple[str, tuple["Value", ...]]  # a number, or brackets and what is in them

_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda z: 1 / cmath.tan(z),
    "sec": lambda z: 1 / cmath.cos(z),
    "csc": lambda z: 1 / cmath.sin(z),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "ln": cmath.log,
    "log": cmath.log,
    "exp": cmath.exp,
    "abs": lambda z: complex(abs(z)),
    "sqrt": cmath.sqrt,
}
_CONSTANTS = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j, "infty": complex(math.inf)}
_SYNONYMS = {
    "cdot": "*",
    "times": "*",
    "div": "/",
    "cup": "∪",
    "lbrace": "\\{",
    "rbrace": "\\}",
    "infinity": "infty",
    "frac": "frac",
    "dfrac": "frac",
    "tfrac": "frac",
}
_GREEK = re.compile(
    "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|(?:var)?phi|chi|psi"
    "|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega"
)
_NOISE = re.compile(r"\\left|\\right|\\[,;!:> ]|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\^\s*\{?\s*\\circ\s*\}?|[$°~]|\\\$")
_SHORT_FRAC = re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])")
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|\\([A-Za-z]+)|([A-Za-z]+)|(\\[{}%]|\*\*|.))", re.DOTALL)
_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])")


def symbolic_equal(answer: Any, gold: Any) -> bool:
    r"""Say whether two formulas are the same text, number or function; what is no text counts as it is printed.

    >>> symbolic_equal(r"\frac{\sqrt{8}}{2}", r"\sqrt{2}"), symbolic_equal("(x+1)^2", "x^2 + 2x + 1")
    (True, True)
    >>> symbolic_equal(r"\sqrt{x^2}", "x"), symbolic_equal("[0, 1)", "(0, 1)"), symbolic_equal("3, 1", r"\{1, 3\}")
    (False, False, True)
    """
    if answer is None or gold is None:
        return False
    if exact_equal(answer, gold) or numeric_equal(answer, gold):
        return True
    left, right = _values(str(answer)), _values(str(gold))
    return left is not None and right is not None and all(_same(a, b) for a, b in zip(left, right, strict=True))


@lru_cache(maxsize=1024)
def _values(text: str) -> tuple[Value, ...] | None:
    """Return a formula's values at all points, None if it cannot be read or has no finite value."""
    if len(text) > _LONGEST:
        return None
    try:
        tokens = _tokens(text)
        return tuple(_Reader(tokens, point).read() for point in range(_POINTS))
    except (_UnreadableError, ArithmeticError, ValueError):
        return None


class _UnreadableError(Exception):
    """The text is no formula of the kind understood here."""


def _tokens(text: str) -> list[str]:
    """Split a formula; names of functions, constants and commands are one token, other letters one each."""
    text = _NOISE.sub(" ", text.replace("−", "-").replace("·", "*").replace("∞", r"\infty").replace("π", r"\pi"))
    text = _THOUSANDS.sub(lambda found: found[0].replace("{,}", "").replace(",", ""), text)
    text = _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text.strip().removesuffix("."))
    tokens = []
    for number, command, word, sign in _TOKEN.findall(text):
        if command:
            if not (
                command in _SYNONYMS or command in _FUNCTIONS or command in _CONSTANTS or _GREEK.fullmatch(command)
            ):
                raise _UnreadableError  # such as an inequality
            tokens.append(_SYNONYMS.get(command, command))
        elif word in _FUNCTIONS or word in _CONSTANTS or word in _SYNONYMS:
            tokens.append(_SYNONYMS.get(word, word))
        elif len(word) > 2:
            raise _UnreadableError  # a word: as a product of its letters, "east" would be "seat"
        elif word:
            tokens.extend(word)
        else:
            tokens.append({"**": "^", "\\%": "%"}.get(sign, number or sign))
    return [token for token in tokens if not token.isspace()]


class _Reader:
    """Evaluates a formula at one point while reading it, by recursive descent."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens, self.point = tokens, point
        self.at = self.depth = 0

    def read(self) -> Value:
        items = self.items(())
        if self.peek() or not items:
            raise _UnreadableError
        return items[0] if len(items) == 1 else ("{}", tuple(items))

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> bool:
        found = self.peek() in wanted
        self.at += found
        return found

    def demand(self, *wanted: str) -> None:
        if not self.take(*wanted):
            raise _UnreadableError

    def items(self, closing: tuple[str, ...]) -> list[Value]:
        """Read values separated by commas or unions; of an equation, the right side."""
        items: list[Value] = []
        while self.peek() and self.peek() not in closing:
            items.append(self.sum())
            while self.take("="):
                items[-1] = self.sum()
            if not self.take(",", ";", "∪"):
                break
        return items

    def sum(self) -> Value:
        total = self.product()
        while self.peek() in ("+", "-"):  # the sign is the product's own
            total = _number(total) + _number(self.product())
        return total

    def product(self) -> Value:
        total = self.signed()
        while True:
            if self.take("*"):
                total = _number(total) * _number(self.signed())
            elif self.take("/"):
                total = _number(total) / _number(self.signed())
            elif self.starts_factor():
                before, digits = self.tokens[self.at - 1], self.peek()
                if before[-1].isdigit() and (digits[0].isdigit() or digits == "frac"):
                    raise _UnreadableError  # 1 1/2: a sum to some, a product to others
                total = _number(total) * _number(self.power())
            else:
                return total

    def starts_factor(self) -> bool:
        token = self.peek()
        return bool(token) and (token in ("(", "{", "\\{", "[") or token[0].isalnum() or token[0] == ".")

    def signed(self) -> Value:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take("-") or not self.take("+")
        value = self.power()
        return -_number(value) if negative else value

    def power(self) -> Value:
        self.depth += 1  # all nesting passes here
        if self.depth > _DEEPEST:
            raise _UnreadableError
        base = self.atom()
        if self.take("^"):
            base = _number(base) ** _number(self.signed())
        while self.take("%"):
            base = _number(base) / 100
        self.depth -= 1
        return base

    def atom(self) -> Value:
        token = self.peek()
        self.at += 1
        if not token:
            raise _UnreadableError
        if token[0].isdigit() or token[0] == ".":
            return complex(float(token))
        if token in ("(", "[", "{", "\\{"):
            return self.brackets(token)
        if token == "|":
            inner = _number(self.sum())
            self.demand("|")
            return complex(abs(inner))
        if token == "frac":
            above = _number(self.atom())
            return above / _number(self.atom())
        if token == "sqrt" and self.take("["):
            degree = _number(self.sum())
            self.demand("]")
            return _number(self.atom()) ** (1 / degree)
        if token in _FUNCTIONS:
            return self.function(token)
        if token in _CONSTANTS and self.peek() != "_":
            return _CONSTANTS[token]
        if token.isalpha() and token.isascii():
            return self.variable(token)
        raise _UnreadableError

    def brackets(self, opening: str) -> Value:
        closing = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "\\{": ("\\}",)}[opening]
        items = self.items(closing)
        end = self.peek()
        self.demand(*closing)
        if len(items) == 1 and opening != "\\{" and end == closing[0]:
            return items[0]
        if not items or opening == "{":
            raise _UnreadableError
        return ("{}" if opening == "\\{" else opening + end, tuple(items))

    def function(self, name: str) -> complex:
        """Apply a function to what is in brackets, or to the product up to the next sign or function."""
        base = exponent = None
        if self.take("_"):
            base = _number(self.atom())
        if self.take("^"):
            exponent = _number(self.atom() if self.peek() != "-" else self.signed())
        if name == "sqrt" or self.peek() in ("(", "{", "["):
            argument = _number(self.atom())
        else:
            argument = _number(self.signed())
            while self.starts_factor() and self.peek() not in _FUNCTIONS:
                argument *= _number(self.power())
        value = _FUNCTIONS[name](argument)
        if base is not None:
            value /= cmath.log(base)
        return value if exponent is None else value**exponent

    def variable(self, name: str) -> complex:
        if self.take("_"):
            if self.take("{"):
                start = self.at
                while self.peek() not in ("}", ""):
                    self.at += 1
                name += "_" + "".join(self.tokens[start : self.at])
                self.demand("}")
            else:
                name += "_" + self.peek()
                self.at += 1
        seed = derive_seed(self.point, "variable", name)
        return complex(seed % 10007 / 2500 - 2, seed // 10007 % 10007 / 2500 - 2)


def _number(value: Value) -> complex:
    if isinstance(value, tuple):
        raise _UnreadableError  # brackets with several items take part in no arithmetic
    if cmath.isnan(value):
        raise _UnreadableError
    return value


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, complex) and isinstance(b, complex):
        return a == b or (cmath.isfinite(b) and abs(a - b) <= max(_ABSOLUTE, _RELATIVE * abs(b)))
    if isinstance(a, tuple) and isinstance(b, tuple):
        (a_kind, a_items), (b_kind, b_items) = a, b
        if a_kind != b_kind or len(a_items) != len(b_items):
            return False
        if a_kind != "{}":
            return all(_same(x, y) for x, y in zip(a_items, b_items, strict=True))
        rest = list(b_items)
        for item in a_items:
            match = next((index for index, other in enumerate(rest) if _same(item, other)), None)
            if match is None:
                return False
            del rest[match]
        return True
    return False
