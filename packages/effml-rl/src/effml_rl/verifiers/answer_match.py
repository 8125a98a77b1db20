"""Verifiers that compare a completion's final answer with the target: as text, or as a number.

Nothing is executed and nothing is evaluated, so they run in the trainer's process; they are linear in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from effml_shared.data.answers import extract_answer
from effml_shared.data.numbers import Number, numbers_equal, parse_number
from effml_shared.errors import ConfigError

from effml_rl.verifiers.verdict import Verdict, check_lengths

__all__ = ["ExactMatch", "NumericMatch", "target_number"]


class ExactMatch:
    """Correct iff the answer is the target, character by character once runs of white space are one space.

    Args:
        extract: finds the answer in a completion, None where there is none; by default the whole completion is it.

    >>> ExactMatch()(["2+2="], [" 4 "], ["4"])[0].status
    'correct'
    """

    def __init__(self, extract: Callable[[str], str | None] = str) -> None:
        self.extract = extract

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> list[Verdict]:
        """Return one verdict per completion; targets are strings."""
        check_lengths(prompts, completions, targets)
        return [self._one(completion, target) for completion, target in zip(completions, targets, strict=True)]

    def _one(self, completion: str, target: Any) -> Verdict:
        if not isinstance(target, str):
            raise ConfigError(f"target: got {target!r}, expected a string")
        answer = self.extract(completion)
        if answer is None or not answer.strip():
            return Verdict(0.0, "unparseable")
        return Verdict.of(answer.split() == target.split(), answer)


class NumericMatch:
    """Correct iff the final answer is a number equal to the target: `numbers.numbers_equal`.

    Args:
        extract: finds the answer's text in a completion; by default the last boxed one, else the one after `####`,
            else the last number.

    >>> NumericMatch()([""], ["half of it, so #### 0.50"], ["1/2"])[0].status
    'correct'
    """

    def __init__(self, extract: Callable[[str], str | None] = extract_answer) -> None:
        self.extract = extract

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> list[Verdict]:
        """Return one verdict per completion; targets are numbers, or texts whose final answer is one."""
        check_lengths(prompts, completions, targets)
        return [self._one(completion, target) for completion, target in zip(completions, targets, strict=True)]

    def _one(self, completion: str, target: Any) -> Verdict:
        gold = target_number(target)
        text = self.extract(completion)
        answer = None if text is None else parse_number(text)
        if answer is None:
            return Verdict(0.0, "unparseable", detail="" if text is None else f"not a number: {text:.100}")
        return Verdict.of(numbers_equal(answer, gold), answer)


def target_number(target: Any) -> Number:
    """Return the number a target is or, as text, ends with.

    Raises:
        ConfigError: it is none; a data set without gold answers must not train anybody.

    >>> target_number("5 + 13 = 18\\n#### 18")
    18
    """
    if isinstance(target, int | float | Fraction) and not isinstance(target, bool) and target == target:
        return target
    text = extract_answer(target) if isinstance(target, str) else None
    number = None if text is None else parse_number(text)
    if number is None:
        raise ConfigError(f"target: got {target!r}, expected a number")
    return number
