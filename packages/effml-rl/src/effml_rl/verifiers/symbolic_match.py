"""Verify mathematical answers by symbolic equality: fractions, roots, sets, intervals, expressions in LaTeX.

The comparison is Math-Verify's (extra `effml-rl[math]`), over sympy. It runs in the sandbox: parsing goes through
`eval`, simplification may take for ever, and Math-Verify's own time limit is an alarm signal, which works in a main
thread only. The time limit here is the sandbox's.

Cost: tens of milliseconds per answer; each server imports sympy once, which takes seconds. Answers that are numbers on
both sides take `NumericMatch`'s way and never reach the sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effml_shared.data.answers import extract_answer
from effml_shared.data.numbers import numbers_equal, parse_number
from effml_shared.errors import ConfigError, require

from effml_rl.sandbox import Program, PythonSandbox
from effml_rl.verifiers.verdict import Verdict, check_lengths

__all__ = ["SymbolicMatch"]

_COMPARE = """
import logging
from math_verify import parse, verify
logging.disable()
def read(text):
    return parse("$" + text.replace("$", "") + "$", parsing_timeout=None)
def compare(target, answer):
    target, answer = read(target), read(answer)
    if not target:
        return "no target"
    return bool(verify(target, answer, timeout_seconds=None)) if answer else None
"""

# The parser builds its tables while it reads: once per server instead of once per answer.
_WARM_UP = r"""
matrix = r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
for text in (r"x^2 + \frac{1}{2} x", r"\sqrt{2}", r"\{1, 2\}", "[0, 1)", "(1, 2)", matrix):
    compare(text, text)
    compare(text, "x + 1")
"""


class SymbolicMatch:
    """Correct iff the final answer and the target are the same mathematical object.

    Args:
        timeout: wall time of one comparison in seconds; beyond it the answer counts as wrong, status `timeout`.
        memory_mb: memory of one comparison, MiB.
        workers: comparisons at the same time; None: one per processor.

    Raises:
        MissingExtra: Math-Verify is not installed.
    """

    def __init__(self, timeout: float = 5.0, memory_mb: int = 512, workers: int | None = None) -> None:
        purpose = "to compare mathematical expressions"
        module = require("math_verify", extra="effml-rl[math]", purpose=purpose)
        sympy = require("sympy", extra="effml-rl[math]", purpose=purpose)
        paths = {str(Path(str(each.__file__)).resolve().parent.parent) for each in (module, sympy)}
        self.sandbox = PythonSandbox(timeout, memory_mb, workers, paths=sorted(paths), setup=_COMPARE + _WARM_UP)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> list[Verdict]:
        """Return one verdict per completion; targets are texts, in LaTeX or not, or numbers."""
        check_lengths(prompts, completions, targets)
        golds = [_target_text(target) for target in targets]
        answers = [extract_answer(completion) for completion in completions]
        verdicts: list[Verdict | None] = [_at_once(a, gold) for a, gold in zip(answers, golds, strict=True)]
        open_rows = [row for row, verdict in enumerate(verdicts) if verdict is None]
        programs = [Program(_COMPARE, calls=(f"compare({golds[i]!r}, {answers[i]!r})",)) for i in open_rows]
        for row, execution in zip(open_rows, self.sandbox.run_many(programs), strict=True):
            where = execution.isolation
            if execution.status != "completed":
                reward = None if execution.status == "sandbox_error" else 0.0
                verdicts[row] = Verdict(reward, execution.status, answers[row], execution.detail, where)
            elif execution.values == ("no target",):
                raise ConfigError(f"target: got {targets[row]!r}, expected a mathematical expression")
            elif execution.values == (None,):
                verdicts[row] = Verdict(0.0, "unparseable", answers[row], isolation=where)
            else:
                verdicts[row] = Verdict.of(execution.values == (True,), answers[row], isolation=where)
        return [verdict for verdict in verdicts if verdict is not None]

    def close(self) -> None:
        """End the sandbox's servers."""
        self.sandbox.close()


def _at_once(answer: str | None, gold: str) -> Verdict | None:
    """Judge what needs no algebra."""
    if answer is None:
        return Verdict(0.0, "unparseable")
    if answer.split() == gold.split():
        return Verdict.of(True, answer)
    number, target = parse_number(answer), parse_number(gold)
    return None if number is None or target is None else Verdict.of(numbers_equal(number, target), answer)


def _target_text(target: Any) -> str:
    text = str(target) if isinstance(target, int | float) else target
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"target: got {target!r}, expected a mathematical expression")
    marked = "boxed" in text or "####" in text
    return (extract_answer(text) if marked else None) or text.strip()
