"""Find the answer in what a model wrote: named, versioned functions from text to an answer, or None.

A stored result names the extractor and its version (`boxed@1`), so that numbers made by different rules are never
compared unawares: whoever changes what a rule finds raises its version. No answer is None, never a placeholder string,
which could win a majority vote. Every scan is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from effml_shared.checks import check_choice
from effml_shared.data import answers
from effml_shared.errors import ConfigError

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "answer_is",
    "choice_letter",
    "extractor",
    "last_number",
    "regex_extractor",
]


@dataclass(frozen=True)
class Extractor:
    """A rule that finds an answer; `str` of it is what results record.

    Attributes:
        name: of the rule.
        version: raised by whatever changes its answers.
        find: the rule.
    """

    name: str
    version: int
    find: Callable[[str], str | None]

    def __call__(self, text: str) -> str | None:
        return self.find(text)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


_ANSWER = re.compile(r"\banswer(?:\s++is\b\s*+:?|\s*+:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
# "a" and "I" are words too, unless punctuation or the line's end follows
_LETTER = r"((?:[B-HJ]\b(?!['’])|[AIa-j](?=[*$\s]*+(?:[)\].,:;]|$))))"
_LETTERS = (
    re.compile(rf"(?i:{_ANSWER.pattern})[\s*$({{\[]*+{_LETTER}", re.MULTILINE),
    re.compile(r"[(\[]([A-J])[)\]]"),
    re.compile(r"^\s*+[*$]*+([A-J])[*$]*+(?:[.:)]|\s*+$)", re.MULTILINE),
)


def answer_is(text: str) -> str | None:
    """Return what follows the last "answer is" or "answer:" up to the end of the sentence or line.

    >>> answer_is("The answer is 3.5 apples. I am sure.")
    '3.5 apples'
    """
    for mark in reversed(list(_ANSWER.finditer(text))):
        end = _SENTENCE_END.search(text, mark.end())
        tail = text[mark.end() : end.start() if end else len(text)].strip(" \t*$")
        if tail:
            return tail
    return None


def last_number(text: str) -> str | None:
    """Return the last number, or fraction, without thousands separators, dollar sign or the sentence's period.

    >>> last_number("10 - 3 leaves 7, so she pays $1,250.")
    '1250'
    """
    number = answers.last_number(text.replace("−", "-"))
    return None if number is None else re.sub(r"[,$+]", "", number)


def choice_letter(text: str) -> str | None:
    """Return the letter A-J of a choice, upper case.

    The last "answer is X" or "answer: X"; else the last "(X)"; else the last line that is or begins with "X." or "X".

    >>> choice_letter("(A) is wrong, so the answer is (c)."), choice_letter("B. Paris"), choice_letter("A dog")
    ('C', 'B', None)
    """
    for pattern in _LETTERS:
        letters = pattern.findall(text)
        if letters:
            return str(letters[-1]).upper()
    return None


def regex_extractor(pattern: str, which: str = "last", *, version: int = 1) -> Extractor:
    """Make an extractor of group 1 (without groups, of the whole match) of a regular expression.

    Args:
        pattern: Python's `re`; its running time is the caller's affair.
        which: `"first"` or `"last"` match.
        version: of the rule.

    Raises:
        ConfigError: the pattern does not compile.

    >>> find = regex_extractor(r"#### (-?[0-9.,]+)")
    >>> find("#### 5 and #### 18"), str(find)
    ('18', 'regex:last:#### (-?[0-9.,]+)@1')
    """
    check_choice("which", which, ("first", "last"))
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern: got {pattern!r}, expected a regular expression ({error})") from None

    def find(text: str) -> str | None:
        matches = [compiled.search(text)] if which == "first" else [None, *compiled.finditer(text)]
        found = matches[-1]
        answer = None if found is None else found[1 if compiled.groups else 0]
        return None if answer is None else answer.strip()

    return Extractor(f"regex:{which}:{pattern}", version, find)


EXTRACTORS = {
    rule.name: rule
    for rule in (
        Extractor("boxed", 1, answers.boxed_answer),
        Extractor("answer_is", 1, answer_is),
        Extractor("last_number", 1, last_number),
        Extractor("choice_letter", 1, choice_letter),
    )
}


def extractor(name: str) -> Extractor:
    """Return an extractor by name: one of `EXTRACTORS`, or `regex:PATTERN`.

    >>> str(extractor("boxed"))
    'boxed@1'
    """
    if name.startswith("regex:"):
        return regex_extractor(name.removeprefix("regex:"))
    check_choice("extractor", name, EXTRACTORS)
    return EXTRACTORS[name]
