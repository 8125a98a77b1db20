"""Word problems in a vocabulary of about ninety words, for models that learn them in a minute on a CPU.

    question         Q has 5 gets 4 loses 2 ?
    word_function    DEF x = 5 ; x = x + 4 ; x = x - 2 ; RET x           run as a program
    word_code        <code> 5 + 4 - 2 </code> <out> 7 </out>             the code's value counts, not what it says
    word_prose       so 5 then + 4 = 9 then - 2 = 7 ans 7                the last number counts

The first two need copying only, prose needs arithmetic: formats of different accuracy, as pretraining mixtures of
arXiv 2504.07912 have them. The programs are sums and differences of integers, which are added up here; nothing else can
be said in them, so nothing is executed. The miniature is our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effml_shared.data.solution_formats import FormatSpec
from effml_shared.data.word_problems import WordProblem, WordProblemGenerator
from effml_shared.errors import ConfigError

__all__ = ["MINIATURE_FORMATS", "MiniatureTokenizer", "miniature_problems"]

_SPECIAL = ("<unk>", "<pad>", "<eos>")
_WORDS = (
    *("Q", "has", "gets", "loses", "?", "DEF", "RET", "x", "=", ";", "+", "-"),
    *("<code>", "</code>", "<out>", "</out>", "so", "then", "ans"),
)
_INTEGERS = range(-20, 50)
_INTEGER = re.compile(r"-?[0-9]{1,9}")  # no text may take long


class MiniatureTokenizer:
    """Use white-space separated words as ids; every integer from -20 to 49 is one word.

    >>> tokenizer = MiniatureTokenizer()
    >>> tokenizer.encode("Q has 5 gets 4 ?").tolist(), tokenizer.vocab_size
    ([3, 4, 47, 5, 46, 7], 92)
    >>> tokenizer.decode([47, 2, 1, 1]), tokenizer.decode([0, 47])
    ('5', '<unk> 5')
    """

    unk_id, pad_id, eos_id = 0, 1, 2
    name = "miniature word problems 1"

    def __init__(self) -> None:
        self.words = (*_SPECIAL, *_WORDS, *map(str, _INTEGERS))
        self.vocab_size = len(self.words)
        self._ids = {word: index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of `text`, (words,); `<unk>` where a word is not known."""
        return np.array([self._ids.get(word, self.unk_id) for word in text.split()], np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the words of `ids` without padding and end; `<unk>` outside the vocabulary."""
        kept = [i for i in np.asarray(ids).tolist() if i not in (self.pad_id, self.eos_id)]
        return " ".join(self.words[i] if 0 <= i < self.vocab_size else "<unk>" for i in kept)


def miniature_problems(
    seed: int = 0,
    *,
    ops: tuple[int, int] = (2, 2),
    numbers: tuple[int, int] = (1, 9),
    ood_ops: tuple[int, int] = (3, 3),
) -> WordProblemGenerator:
    """Return a generator of questions in these words.

    Raises:
        ConfigError: a total could be larger than any word.
    """
    most = numbers[-1] * (1 + max(*ops, *ood_ops))
    if most > _INTEGERS[-1]:
        raise ConfigError(f"ops, numbers: got totals of up to {most}, expected at most {_INTEGERS[-1]}")
    story = ("miniature",)
    return WordProblemGenerator(seed, ops=ops, numbers=numbers, templates=story, ood_ops=ood_ops, ood_templates=story)


def _render_function(problem: WordProblem) -> str:
    steps = "".join(f"x = x {operation} {operand} ; " for operation, operand in problem.steps)
    return f"DEF x = {problem.start} ; {steps}RET x"


def _run_function(text: str) -> int | None:
    """Return what the program after the last DEF returns, None where it is broken."""
    words = text.split()
    if "DEF" not in words:
        return None
    variables: dict[str, int] = {}
    statement: list[str] = []
    for word in words[len(words) - words[::-1].index("DEF") :]:
        if statement[:1] == ["RET"]:
            return _sum([word], variables)
        if word != ";":
            statement.append(word)
            continue
        value = _sum(statement[2:], variables) if statement[:2] == ["x", "="] else None
        if value is None:
            return None
        variables["x"], statement = value, []
    return None


def _render_code(problem: WordProblem) -> str:
    terms = " ".join(f"{operation} {operand}" for operation, operand in problem.steps)
    return f"<code> {problem.start} {terms} </code> <out> {problem.answer} </out>"


def _code(text: str) -> list[str] | None:
    """Return the words of the first complete block of code."""
    words = text.split()
    if "<code>" not in words:
        return None
    inside = words[words.index("<code>") + 1 :]
    return inside[: inside.index("</code>")] if "</code>" in inside else None


def _run_code(text: str) -> int | None:
    code = _code(text)
    return None if code is None else _sum(code, {})


def _sum(words: Sequence[str], variables: dict[str, int]) -> int | None:
    """Return the value of `term`, `term + term`, `term - term + term` and so on; None if it is nothing of the kind."""
    terms = [variables[w] if w in variables else int(w) if _INTEGER.fullmatch(w) else None for w in words[::2]]
    signs = [{"+": 1, "-": -1}.get(word) for word in words[1::2]]
    if not words or len(words) % 2 == 0 or None in terms or None in signs:
        return None
    return sum(
        sign * term for sign, term in zip([1, *signs], terms, strict=True) if sign is not None and term is not None
    )


def _render_prose(problem: WordProblem) -> str:
    steps = zip(problem.steps, problem.values[1:], strict=True)
    told = "".join(f"then {operation} {operand} = {total} " for (operation, operand), total in steps)
    return f"so {problem.start} {told}ans {problem.answer}"


def _last_integer(text: str) -> int | None:
    words = text.split()
    marked = [after for before, after in pairwise(words) if before == "ans" and _INTEGER.fullmatch(after)]
    found = marked or [word for word in words if _INTEGER.fullmatch(word)]
    return int(found[-1]) if found else None


MINIATURE_FORMATS: tuple[FormatSpec, ...] = (  # in the order in which they are tried
    FormatSpec("word_code", _render_code, lambda text: _code(text) is not None, _run_code),
    FormatSpec("word_function", _render_function, lambda text: "DEF" in text.split(), _run_function),
    FormatSpec("word_prose", _render_prose, lambda text: _last_integer(text) is not None, _last_integer),
)
