"""Solution formats of word problems: how a solution is written, told from others, and what answer it holds.

    python_function   def simple_math_problem(): ...        its value is the answer
    inline_code       <llm-code> ... </llm-code>            the value of its last statement is
    equation          a + b = c lines, then #### c
    prose             sentences, then \\boxed{c}

A text's label is decided by its structure alone, by the first format that is there, right answer or not. Programs are
cut out here and run elsewhere: nothing that a model wrote is executed in this process. All scans are linear in the
text, whatever a model writes.

Source: arXiv 2504.07912, whose corpora have the first two and the last. The rules are our own: the published ones call
"definitely" code because of its first letters, and let a failing program's text count as its answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import dedent

from effml_shared.checks import check_choice
from effml_shared.data.answers import extract_answer
from effml_shared.data.numbers import Number, parse_number
from effml_shared.data.word_problems import WordProblem
from effml_shared.errors import ConfigError

__all__ = ["FORMATS", "Answer", "FormatSpec", "SolutionProgram", "built_in_formats", "find_format"]

_FUNCTION = re.compile(r"^([ \t]*)def simple_math_problem[ \t]*\(", re.MULTILINE)
_IMPORT = re.compile(r"(?:import[ \t]+[A-Za-z_][\w.]*+[ \t]*+(?:$|[,#;]|as\b)|from[ \t]+[\w.]++[ \t]+import\b)")
_TERM = r"[-+]?[0-9][0-9,.]*+"
_EQUATION = re.compile(rf"\s*+{_TERM}(?:\s*+[-+*/]\s*+{_TERM})++\s*+=\s*+{_TERM}(?:/[0-9]++)?\s*+")


@dataclass(frozen=True)
class SolutionProgram:
    """Python source found in a solution, to be run where that is safe."""

    code: str
    call: str | None = None  # expression whose value is the answer; None: the last statement is that expression


Answer = Number | SolutionProgram


@dataclass(frozen=True)
class FormatSpec:
    """One way to write solutions."""

    name: str
    render: Callable[[WordProblem], str]  # a right solution
    detect: Callable[[str], bool]  # is a text of this format, going by its structure
    answer: Callable[[str], Answer | None]  # what a text of this format answers; None: nothing that could be an answer


def find_format(text: str, formats: Sequence[FormatSpec]) -> FormatSpec | None:
    """Return the first format that a text is of, None where it is of none.

    >>> formats = built_in_formats("python_function", "prose")
    >>> find_format("definitely 18", formats).name, find_format("no idea", formats)
    ('prose', None)
    """
    return next((spec for spec in formats if spec.detect(text)), None)


def built_in_formats(*names: str) -> tuple[FormatSpec, ...]:
    """Return built-in formats in the order in which they must be tried, whatever the order of their names.

    Raises:
        ConfigError: a name is unknown, or there is none.
    """
    if not names:
        raise ConfigError(f"formats: got none, expected some of {', '.join(FORMATS)}")
    for name in names:
        check_choice("formats", name, FORMATS)
    return tuple(spec for name, spec in FORMATS.items() if name in names)


def _render_function(problem: WordProblem) -> str:
    question = problem.question.replace("\\", "\\\\").replace('"', '\\"')
    steps = "".join(f"    value = {line}\n" for line in _code_steps(problem))
    head = f'def simple_math_problem():\n    """{question}"""\n    value = {problem.start}\n'
    return f"{head}{steps}    result = value\n    return result"


def _program_of_function(text: str) -> SolutionProgram | None:
    matches = list(_FUNCTION.finditer(text))
    if not matches:
        return None
    found = matches[-1]
    first, *rest = text[found.start() :].split("\n")
    body = [first, *_while_inside(rest, len(found[1]))]
    above = _imports_and_functions(text[: found.start()].split("\n"))
    return SolutionProgram("\n".join([*above, dedent("\n".join(body))]), "simple_math_problem()")


def _while_inside(lines: Sequence[str], indent: int) -> list[str]:
    """Return the first lines that are blank or indented by more than `indent`."""
    kept = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip(" \t")) <= indent:
            break
        kept.append(line)
    return kept


def _imports_and_functions(lines: Sequence[str]) -> list[str]:
    """Return what stands at the left margin: imports, and functions with their bodies."""
    kept, inside = [], False
    for line in lines:
        inside = line.startswith("def ") or (inside and (not line.strip() or line[0] in " \t"))
        if inside or _IMPORT.match(line):
            kept.append(line)
    return kept


def _render_code(problem: WordProblem) -> str:
    lines = [f"value = {problem.start}", *(f"value = {line}" for line in _code_steps(problem)), "value"]
    code, answer = "\n".join(lines), problem.answer
    head = f"Let's solve this problem with Python code.\n<llm-code>\n{code}\n</llm-code>\n"
    return f"{head}<llm-code-output>\n{answer}\n</llm-code-output>\nThus the answer is \\boxed{{{answer}}}."


def _code_steps(problem: WordProblem) -> list[str]:
    """Return one expression per step; a division that comes out even stays among the integers."""
    steps = []
    for (operation, operand), total in zip(problem.steps, problem.values[1:], strict=True):
        symbol = "//" if operation == "/" and isinstance(total, int) else operation
        steps.append(f"value {symbol} {operand}")
    return steps


def _program_of_code(text: str) -> SolutionProgram | None:
    _, opened, rest = text.partition("<llm-code>")
    code, closed, _ = rest.partition("</llm-code>")
    return SolutionProgram(dedent(code).strip("\n")) if opened and closed else None


def _equations(problem: WordProblem) -> list[str]:
    pairs = zip(problem.values, problem.steps, problem.values[1:], strict=False)
    return [f"{before} {operation} {operand} = {after}" for before, (operation, operand), after in pairs]


def _render_equations(problem: WordProblem) -> str:
    return "\n".join([*_equations(problem), f"#### {problem.answer}"])


def _are_equations(text: str) -> bool:
    *lines, last = [line for line in text.split("\n") if line.strip()] or [""]
    return bool(lines) and last.lstrip().startswith("####") and all(map(_EQUATION.fullmatch, lines))


def _render_prose(problem: WordProblem) -> str:
    verbs = {"+": "Adding", "-": "Subtracting", "*": "Multiplying by", "/": "Dividing by"}
    told = [
        f"{verbs[operation]} {operand} gives {equation}."
        for (operation, operand), equation in zip(problem.steps, _equations(problem), strict=True)
    ]
    return " ".join([f"We start with {problem.start}.", *told, f"The answer is \\boxed{{{problem.answer}}}."])


def _number_in(text: str) -> Number | None:
    found = extract_answer(text)
    return None if found is None else parse_number(found)


FORMATS: Mapping[str, FormatSpec] = {
    spec.name: spec
    for spec in (
        FormatSpec("inline_code", _render_code, lambda text: _program_of_code(text) is not None, _program_of_code),
        FormatSpec(
            "python_function", _render_function, lambda text: _FUNCTION.search(text) is not None, _program_of_function
        ),
        FormatSpec("equation", _render_equations, _are_equations, _number_in),
        FormatSpec("prose", _render_prose, lambda text: _number_in(text) is not None, _number_in),
    )
}
