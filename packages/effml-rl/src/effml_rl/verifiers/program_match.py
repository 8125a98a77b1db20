"""Verify programs by running them: one function's value against a number, or many calls against their values.

Every program runs in a `PythonSandbox`. Expected values never enter it; the comparison is made here, on plain data.
"""

from __future__ import annotations

import ast
import re
import reprlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from effml_shared.data.numbers import numbers_equal, parse_number
from effml_shared.errors import ConfigError

from effml_rl.sandbox import Execution, Program, PythonSandbox
from effml_rl.verifiers.answer_match import target_number
from effml_rl.verifiers.verdict import Verdict, check_lengths

__all__ = ["CallMatch", "ProgramMatch", "fenced_code", "values_equal"]

_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)


def fenced_code(text: str) -> str:
    """Return the last complete fenced block of a completion, the whole completion where there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


class ProgramMatch:
    """Correct iff the number that a completion's program computes equals the target.

    Args:
        sandbox: where programs run.
        program: makes a completion into a program with one value to ask for; None: the completion holds no program.

    >>> with PythonSandbox(workers=1) as sandbox:
    ...     verifier = ProgramMatch(sandbox, lambda text: Program(fenced_code(text), calls=("solve()",)))
    ...     verifier([""], ["def solve():\\n    return 36 / 2"], ["#### 18"])[0].status
    'correct'
    """

    def __init__(self, sandbox: PythonSandbox, program: Callable[[str], Program | None]) -> None:
        self.sandbox, self.program = sandbox, program

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> list[Verdict]:
        """Return one verdict per completion; targets are numbers, or texts whose final answer is one."""
        check_lengths(prompts, completions, targets)
        golds = [target_number(target) for target in targets]
        programs = [self.program(completion) for completion in completions]
        executions = iter(self.sandbox.run_many([program for program in programs if program is not None]))
        return [
            Verdict(0.0, "unparseable", detail="no program") if program is None else self._judge(next(executions), gold)
            for program, gold in zip(programs, golds, strict=True)
        ]

    def _judge(self, execution: Execution, gold: Any) -> Verdict:
        if execution.status != "completed":
            return _failed(execution)
        if len(execution.values) != 1:
            raise ConfigError("program: got one that is asked for no value or several, expected one")
        (value,) = execution.values
        number = parse_number(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float | Fraction):
            return Verdict(0.0, "unparseable", value, "the program's value is not a number", execution.isolation)
        return Verdict.of(numbers_equal(number, gold), value, isolation=execution.isolation)


class CallMatch:
    """Correct iff a completion's functions return what is expected for every call of the target.

    Args:
        sandbox: where programs run.
        code: finds the code in a completion.

    >>> with PythonSandbox(workers=1) as sandbox:
    ...     verifier = CallMatch(sandbox)
    ...     code = "def add(a, b):\\n    return a + b"
    ...     [v.status for v in verifier(["", ""], [code, code], [["assert add(1, 2) == 3"], [("add(1, 2)", 4)]])]
    ['correct', 'wrong']
    """

    def __init__(self, sandbox: PythonSandbox, code: Callable[[str], str] = fenced_code) -> None:
        self.sandbox, self.code = sandbox, code

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> list[Verdict]:
        """Return one verdict per completion.

        Args:
            targets: per completion, pairs `(expression, value)` or texts `assert expression == literal`.
        """
        check_lengths(prompts, completions, targets)
        pairs = [_pairs(target) for target in targets]
        programs = [
            Program(self.code(completion), calls=[expression for expression, _ in tests])
            for completion, tests in zip(completions, pairs, strict=True)
        ]
        executions = self.sandbox.run_many(programs)
        return [self._judge(execution, tests) for execution, tests in zip(executions, pairs, strict=True)]

    def _judge(self, execution: Execution, tests: list[tuple[str, Any]]) -> Verdict:
        if execution.status != "completed":
            return _failed(execution)
        if len(execution.values) != len(tests):
            return Verdict(0.0, "runtime_error", detail="not one value per call", isolation=execution.isolation)
        for value, (expression, expected) in zip(execution.values, tests, strict=True):
            if not values_equal(value, expected):
                detail = f"{expression:.200} gave {reprlib.repr(value)}"  # bounded in depth too
                return Verdict.of(False, execution.values, detail, execution.isolation)
        return Verdict.of(True, execution.values, isolation=execution.isolation)


def values_equal(value: Any, expected: Any) -> bool:
    """Compare plain data: numbers by `numbers_equal`, everything else exactly and of the same type.

    >>> values_equal([1, 0.1 + 0.2], [1, 0.3]), values_equal(True, 1), values_equal((1,), [1])
    (True, False, False)
    """
    numbers = (int, float)
    if type(value) in numbers and type(expected) in numbers:
        return value == expected or numbers_equal(value, expected)  # infinities are equal to themselves
    if type(value) is not type(expected):
        return False
    if isinstance(value, list | tuple):
        return len(value) == len(expected) and all(map(values_equal, value, expected))
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(values_equal(value[key], expected[key]) for key in value)
    return bool(value == expected)


def _failed(execution: Execution) -> Verdict:
    if execution.status == "completed":
        raise ValueError("got a program that completed, expected one that did not")
    reward = None if execution.status == "sandbox_error" else 0.0
    return Verdict(reward, execution.status, detail=execution.detail, isolation=execution.isolation)


def _pairs(target: Any) -> list[tuple[str, Any]]:
    if isinstance(target, str) or not isinstance(target, Sequence) or not target:
        raise ConfigError(f"target: got {target!r}, expected a sequence of calls with their values")
    return [_split_assert(test) if isinstance(test, str) else _pair(test) for test in target]


def _pair(test: Any) -> tuple[str, Any]:
    if not isinstance(test, Sequence) or len(test) != 2 or not isinstance(test[0], str):
        raise ConfigError(f"target: got {test!r}, expected (expression, value) or 'assert expression == literal'")
    return test[0], test[1]


def _split_assert(text: str) -> tuple[str, Any]:
    """Take the expected value out of an assertion, so that the program cannot read it."""
    try:
        (statement,) = ast.parse(text.strip()).body
        if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare):
            comparison = statement.test
            if len(comparison.ops) == 1 and isinstance(comparison.ops[0], ast.Eq):
                return ast.unparse(comparison.left), ast.literal_eval(comparison.comparators[0])
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"target: got {text!r}, expected 'assert expression == literal' ({error})") from error
    raise ConfigError(f"target: got {text!r}, expected 'assert expression == literal'")
