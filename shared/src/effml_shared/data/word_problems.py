"""Arithmetic word problems whose answers are exact by construction: a start, a few operations, and a story around them.

    value_0 = start,   value_{i+1} = value_i op_i operand_i,   op_i in + - * /;   the answer is the last value

Integers, or fractions where asked for, never floats. Operations and operands are drawn among those that the story
allows: no total falls below the story's lowest (nobody gives away apples that are not there), products stay below
10,000, and divisions come out even unless fractions are wanted.

Problem i of a split follows from the seed, the split and i alone: more problems begin with the same ones. Training and
test problems share no arithmetic, whatever the seeds: a hash of start and steps assigns one in eight to the test. The
third split, "ood", has more operations and other stories.

Cost: tens of microseconds per problem, eight times as much in the test; no state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TypeVar

from effml_shared.checks import check_choice, check_count
from effml_shared.data.word_problem_templates import TEMPLATES, Template
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed

__all__ = ["SPLITS", "WordProblem", "WordProblemGenerator"]

_Choice = TypeVar("_Choice")
SPLITS = ("train", "test", "ood")
_NAMES = ("Ada", "Ben", "Chloe", "Dev", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jun", "Kofi", "Lena")
_LARGEST_PRODUCT = 10_000
_TEST_SHARE = 8  # one arithmetic in so many is for the test
_EXHAUSTED = 1000  # draws; a world in which so many fail has hardly any problem of that split
_OPERATIONS = {
    "+": lambda value, operand: value + operand,
    "-": lambda value, operand: value - operand,
    "*": lambda value, operand: value * operand,
    "/": lambda value, operand: value / operand,
}


@dataclass(frozen=True)
class WordProblem:
    """A question, and the arithmetic behind it.

    >>> problem = WordProblem("How much is half of seven?", 7, (("/", 2),))
    >>> problem.values, problem.answer
    ((7, Fraction(7, 2)), Fraction(7, 2))
    """

    question: str
    start: int
    steps: tuple[tuple[str, int], ...]  # operation and operand

    @cached_property
    def values(self) -> tuple[int | Fraction, ...]:
        """The start and the running total after each step; integers wherever they are whole."""
        totals = [Fraction(self.start)]
        for operation, operand in self.steps:
            totals.append(_OPERATIONS[operation](totals[-1], operand))
        return tuple(int(total) if total.denominator == 1 else total for total in totals)

    @property
    def answer(self) -> int | Fraction:
        """What the question asks for."""
        return self.values[-1]


@dataclass(frozen=True)
class WordProblemGenerator:
    """Draw problems.

    Raises:
        ConfigError: a range is empty or reversed, or a story is unknown.

    >>> generator = WordProblemGenerator(seed=1, ops=(2, 2), numbers=(1, 20))
    >>> problem = generator.problems(1)[0]
    >>> print(problem.question)
    Ada collects cards and owns 6 cards. Ada shares them equally among 2 people and is one of them. Ada shares them \
equally among 3 people and is one of them. How many cards does Ada own in the end?
    >>> problem.values
    (6, 3, 1)
    """

    seed: int = 0
    ops: tuple[int, int] = (2, 4)  # fewest and most operations, all equally likely
    numbers: tuple[int, int] = (1, 99)  # the start, and what is added and subtracted
    factors: tuple[int, int] = (2, 9)  # what is multiplied and divided by
    fractions: bool = False  # divide where it does not come out even
    templates: Sequence[str | Template] = ("market", "cards", "savings")  # names in TEMPLATES, or stories of your own
    ood_ops: tuple[int, int] = (5, 6)
    ood_templates: Sequence[str | Template] = ("garden",)

    def __post_init__(self) -> None:
        for name, lowest in (("ops", 1), ("numbers", 1), ("factors", 2), ("ood_ops", 1)):
            span = getattr(self, name)
            if len(span) != 2 or not all(type(end) is int for end in span) or not lowest <= span[0] <= span[1]:
                raise ConfigError(f"{name}: got {span!r}, expected two integers, {lowest} <= fewest <= most")
            object.__setattr__(self, name, tuple(span))
        if not self.stories["train"] or not self.stories["ood"]:
            raise ConfigError("templates, ood_templates: got none, expected at least one story each")

    @cached_property
    def stories(self) -> dict[str, tuple[Template, ...]]:
        """The stories of each split."""
        usual, other = (tuple(map(_template, given)) for given in (self.templates, self.ood_templates))
        return {"train": usual, "test": usual, "ood": other}

    def problems(self, n: int, split: str = "train", *, start: int = 0) -> list[WordProblem]:
        """Return problems start, ..., start + n - 1 of a split: "train", "test" or "ood". One may come twice.

        Raises:
            ConfigError: the split is unknown, a number negative, or hardly any problem of the split exists.
        """
        check_choice("split", split, SPLITS)
        check_count("n", n, 0)
        check_count("start", start, 0)
        return [self._problem(split, i) for i in range(start, start + n)]

    def _problem(self, split: str, i: int) -> WordProblem:
        stream = random.Random(derive_seed(self.seed, "word problem", split, i))
        for _ in range(_EXHAUSTED):
            template = _pick(stream, self.stories[split])
            start = _pick(stream, range(self.numbers[0], self.numbers[1] + 1))
            steps = self._steps(stream, template, start, self.ood_ops if split == "ood" else self.ops)
            if steps is not None and (split == "ood" or (split == "test") == _is_test(start, steps)):
                return WordProblem(_tell(stream, template, start, steps), start, steps)
        raise ConfigError(
            f"numbers: got {self.numbers}, expected a wider range: no {split} problem in {_EXHAUSTED} draws"
        )

    def _steps(
        self, stream: random.Random, template: Template, start: int, ops: tuple[int, int]
    ) -> tuple[tuple[str, int], ...] | None:
        """Return operations that the story allows; None where there is none left before all are drawn."""
        value, steps = Fraction(start), []
        for _ in range(_pick(stream, range(ops[0], ops[1] + 1))):
            choices = {
                op: operands for op in template.phrases if (operands := self._operands(op, value, template.lowest))
            }
            if not choices:
                return None
            operation = _pick(stream, list(choices))
            operand = _pick(stream, choices[operation])
            value = _OPERATIONS[operation](value, operand)
            steps.append((operation, operand))
        return tuple(steps)

    def _operands(self, operation: str, value: Fraction, lowest: int) -> Sequence[int]:
        low, high = self.numbers if operation in "+-" else self.factors
        if operation in "+-":
            return range(low, high + 1 if operation == "+" else min(high, int(value - lowest)) + 1)
        if not value:
            return []
        return [factor for factor in range(low, high + 1) if self._sensible(operation, value, factor, lowest)]

    def _sensible(self, operation: str, value: Fraction, factor: int, lowest: int) -> bool:
        total = _OPERATIONS[operation](value, factor)
        even = operation == "*" or self.fractions or total.denominator == 1
        return even and lowest <= total <= _LARGEST_PRODUCT


def _template(given: str | Template) -> Template:
    if isinstance(given, Template):
        return given
    check_choice("templates", given, TEMPLATES)
    return TEMPLATES[given]


def _tell(stream: random.Random, template: Template, start: int, steps: Sequence[tuple[str, int]]) -> str:
    name = _pick(stream, _NAMES)
    told = [
        (template.opening, start),
        *((_pick(stream, template.phrases[op]), n) for op, n in steps),
        (template.question, 0),
    ]
    return " ".join(template.fill(sentence, name, n) for sentence, n in told)


def _is_test(start: int, steps: Sequence[tuple[str, int]]) -> bool:
    digest = hashlib.sha256(repr((start, tuple(steps))).encode()).digest()
    return digest[0] % _TEST_SHARE == 0


def _pick(stream: random.Random, choices: Sequence[_Choice]) -> _Choice:
    """Return one of the choices by a draw whose values Python promises never to change."""
    return choices[int(stream.random() * len(choices))]
