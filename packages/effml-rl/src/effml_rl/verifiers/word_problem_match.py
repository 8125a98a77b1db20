"""Verify solutions of word problems that come in several formats: tell the format, then judge by what that format says.

A program's value is its solution's answer, whatever is written around it. The format is told by structure alone, right
answer or not, so that shares of formats and their accuracies can be measured apart: accuracy = sum of share x accuracy.

Source: arXiv 2504.07912; how its rules differ, `effml_shared.data.solution_formats` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effml_shared.data.answers import extract_answer
from effml_shared.data.numbers import Number, numbers_equal, parse_number
from effml_shared.data.solution_formats import FormatSpec, SolutionProgram, built_in_formats, find_format
from effml_shared.errors import ConfigError

from effml_rl.sandbox import Program, PythonSandbox
from effml_rl.verifiers.answer_match import target_number
from effml_rl.verifiers.program_match import ProgramMatch
from effml_rl.verifiers.verdict import Verdict, check_lengths

__all__ = ["OTHER", "WordProblemMatch"]

OTHER = "other"  # the label of a text that is of no format
_PUBLISHED = built_in_formats("inline_code", "python_function", "prose")
_WITHOUT_VALUE = ("runtime_error", "syntax_error", "unparseable")


class WordProblemMatch:
    """Correct iff a solution's answer, read or computed, equals the target.

    Args:
        sandbox: where programs run; None: no solution may be a program.
        formats: tried in this order; by default inline_code, python_function and prose.
        fallback: let the text of a solution whose program fails answer instead, as the published verifier does; one
            that takes too long or too much memory is wrong all the same.

    >>> with PythonSandbox(workers=1) as sandbox:
    ...     verifier = WordProblemMatch(sandbox)
    ...     texts = ["<llm-code>\\n9 * 2\\n</llm-code> so 96", "definitely 18", "no idea"]
    ...     verifier.labels(texts), [verdict.status for verdict in verifier([""] * 3, texts, [18] * 3)]
    (['inline_code', 'prose', 'other'], ['correct', 'correct', 'unparseable'])
    """

    def __init__(
        self,
        sandbox: PythonSandbox | None = None,
        formats: Sequence[FormatSpec] = _PUBLISHED,
        *,
        fallback: bool = False,
    ) -> None:
        if not formats:
            raise ConfigError("formats: got none, expected at least one")
        self.sandbox, self.formats, self.fallback = sandbox, tuple(formats), fallback

    def labels(self, completions: Sequence[str]) -> list[str]:
        """Return the name of each completion's format, `OTHER` where it is of none."""
        found = [find_format(completion, self.formats) for completion in completions]
        return [OTHER if spec is None else spec.name for spec in found]

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> list[Verdict]:
        """Return one verdict per completion; targets are numbers, or texts whose final answer is one.

        Raises:
            ConfigError: a solution is a program and there is no sandbox.
        """
        check_lengths(prompts, completions, targets)
        golds = [target_number(target) for target in targets]
        answers = [self._answer(completion) for completion in completions]
        verdicts = [
            _judged(None if isinstance(answer, SolutionProgram) else answer, gold)
            for answer, gold in zip(answers, golds, strict=True)
        ]
        rows = [row for row, answer in enumerate(answers) if isinstance(answer, SolutionProgram)]
        for row, verdict in zip(rows, self._run([completions[i] for i in rows], [golds[i] for i in rows]), strict=True):
            failed = self.fallback and verdict.status in _WITHOUT_VALUE
            verdicts[row] = _judged(_last_answer(completions[row]), golds[row]) if failed else verdict
        return verdicts

    def _answer(self, completion: str) -> Number | SolutionProgram | None:
        spec = find_format(completion, self.formats)
        return None if spec is None else spec.answer(completion)

    def _run(self, completions: Sequence[str], golds: Sequence[Number]) -> list[Verdict]:
        if not completions:
            return []
        if self.sandbox is None:
            raise ConfigError("sandbox: got none and a solution that is a program, expected a PythonSandbox")
        return ProgramMatch(self.sandbox, self._program)([""] * len(completions), completions, golds)

    def _program(self, completion: str) -> Program | None:
        found = self._answer(completion)
        if not isinstance(found, SolutionProgram):
            return None
        return Program(found.code, () if found.call is None else (found.call,), last_expression=found.call is None)


def _judged(answer: Number | None, gold: Number) -> Verdict:
    return Verdict(0.0, "unparseable") if answer is None else Verdict.of(numbers_equal(answer, gold), answer)


def _last_answer(text: str) -> Number | None:
    found = extract_answer(text)
    return None if found is None else parse_number(found)
