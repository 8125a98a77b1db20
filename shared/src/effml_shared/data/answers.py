"""Find the final answer in a solution's text.

The last complete `\\boxed{...}`, else what follows the last `####` on its line, else the last number. Every scan is
linear in the text, whatever a model writes.
"""

from __future__ import annotations

import re

__all__ = ["boxed_answer", "extract_answer", "last_number"]

# A sign belongs to the number unless it stands between two operands.
_NUMBER = re.compile(
    r"(?<![\w.)])[-+]?\$?[0-9][0-9,]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?:\s?/\s?[0-9]+)?"
    r"|[0-9][0-9,]*(?:\.[0-9]+)?"
    r"|(?<![\w)])[-+]?\.[0-9]+"
)

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # a character behind a backslash is text


def extract_answer(text: str) -> str | None:
    """Return the final answer of a solution, None where there is none.

    >>> extract_answer(r"so 3 + 4 = 7, hence \\boxed{\\frac{7}{2}}.")
    '\\\\frac{7}{2}'
    >>> extract_answer("3 + 4 = 7\\n#### 7 apples")
    '7 apples'
    >>> extract_answer("She has 1,000 dollars.")
    '1,000'
    """
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    marked = text.rpartition("####")
    if marked[1]:
        line = marked[2].split("\n", 1)[0].strip()
        if line:
            return line
    return last_number(text)


def boxed_answer(text: str) -> str | None:
    """Return what the last complete `\\boxed{...}` holds; one that the text's end cuts off does not count."""
    # One pass: braces that are open, each with where its box begins (None: not a box's brace).
    found = None
    open_braces: list[int | None] = []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (found is None or start > found[0]):
                found = (start, token.start())
        elif token[0][0] != "\\":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.end())
    return None if found is None else text[slice(*found)].strip()


def last_number(text: str) -> str | None:
    """Return the last number of a text as it is written, without trailing punctuation."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None
