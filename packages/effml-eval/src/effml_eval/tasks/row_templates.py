"""Questions from rows by templates, for tasks that are described and not programmed.

A template is a text in which `{{field}}` stands for a field of the row (`{{a.b}}`: of the object `a`); everything else,
single braces included, stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from effml_shared.errors import ConfigError

from effml_eval.tasks.questions import ChoiceQuestion, Document, OpenQuestion, choice_question
from effml_eval.tasks.rows import Row, RowReader, get_field

__all__ = ["choice_reader", "document_reader", "fill", "gold_index", "open_reader"]

_FIELD = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")


def fill(template: str, row: Row) -> str:
    """Put the fields of a row into a template.

    >>> fill(r"Question: {{q}} Put it in \\boxed{}.", {"q": "1 + 1?"})
    'Question: 1 + 1? Put it in \\\\boxed{}.'

    Raises:
        ConfigError: the row lacks a field.
    """
    return _FIELD.sub(lambda found: str(get_field(row, found[1])), template)


def gold_index(gold: Any, choices: Sequence[str], labels: Sequence[Any] | None = None) -> int:
    """Return the index of the right choice, given as its label, or without labels as its index or text.

    >>> gold_index("B", ["yes", "no"], ["A", "B"]), gold_index("1", ["yes", "no"]), gold_index("no", ["yes", "no"])
    (1, 1, 1)

    Raises:
        ConfigError: it is none of them.
    """
    named = [str(label) for label in labels] if labels is not None else list(choices)
    text = str(gold).strip()
    is_index = isinstance(gold, int) or (re.fullmatch(r"\d+", text) is not None and text not in named)
    if labels is None and is_index:
        return int(text)
    if text not in named:
        raise ConfigError(f"gold: got {gold!r}, expected one of {', '.join(named)!r:.200}")
    return named.index(text)


def choice_reader(
    prompt: str,
    choices: str | Sequence[str],
    gold: str,
    *,
    labels: str | None = None,
    delimiter: str = " ",
    id: str | None = None,
    tags: Sequence[str] = (),
) -> RowReader[ChoiceQuestion]:
    """Make a reader of multiple-choice rows.

    Args:
        prompt: template of what all choices follow.
        choices: the field of their list, or a template of each.
        gold: field of the right one: label, index or text.
        labels: field of the choices' labels.
        delimiter: between prompt and choice.
        id: field of the question's id; None: its number.
        tags: fields that are kept, for clusters.
    """

    def read(row: Row, number: int) -> ChoiceQuestion:
        texts = get_field(row, choices) if isinstance(choices, str) else [fill(choice, row) for choice in choices]
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"choices: got {texts!r:.80}, expected a list of texts")
        right = gold_index(get_field(row, gold), texts, None if labels is None else get_field(row, labels))
        about = _tags(row, tags)
        return choice_question(_id(row, number, id), fill(prompt, row), texts, right, delimiter=delimiter, tags=about)

    return read


def open_reader(
    prompt: str,
    gold: str,
    *,
    solution: str | None = None,
    id: str | None = None,
    tags: Sequence[str] = (),
) -> RowReader[OpenQuestion]:
    """Make a reader of open questions.

    Args:
        prompt: template of what the model continues.
        gold: field of the right answer, or of a list of them.
        solution: template of what follows the prompt in an example.
        id: field of the question's id; None: its number.
        tags: fields that are kept, for clusters.
    """

    def read(row: Row, number: int) -> OpenQuestion:
        found = get_field(row, gold)
        return OpenQuestion(
            id=_id(row, number, id),
            tags=_tags(row, tags),
            prompt=fill(prompt, row),
            golds=tuple(str(each) for each in (found if isinstance(found, list) else [found])),
            solution=None if solution is None else fill(solution, row),
        )

    return read


def document_reader(text: str = "{{text}}", *, id: str | None = None, tags: Sequence[str] = ()) -> RowReader[Document]:
    """Make a reader of documents from a template."""
    return lambda row, number: Document(id=_id(row, number, id), tags=_tags(row, tags), text=fill(text, row))


def _id(row: Row, number: int, field: str | None) -> str:
    return str(number if field is None else get_field(row, field))


def _tags(row: Row, fields: Sequence[str]) -> dict[str, str]:
    return {field: str(get_field(row, field)) for field in fields}
