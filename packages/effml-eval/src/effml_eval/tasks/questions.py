"""What a benchmark asks, one record per question, in the words that a model will read.

A record is plain text and is made once, from a row of a file (`row_templates`, `standard_tasks`) or by hand. Whatever
kind it is, `shown` is the text of the question with its answer: what stands in a prompt as an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from effml_shared.errors import ConfigError

__all__ = ["ChoiceQuestion", "Document", "OpenQuestion", "Question", "choice_question"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What all kinds have.

    Attributes:
        id: unique in its task.
        tags: what else is known of it, such as the passage it is about; intervals can be clustered by a tag.
    """

    id: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The question and its answer, as an example in a prompt."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion(Question):
    """Choose among continuations.

    Attributes:
        pairs: context and continuation of each choice; most often the context is the same for all.
        choices: the text of each, whose length normalises its likelihood.
        gold: index of the right one.

    Raises:
        ConfigError: fewer than two choices, an empty one, or gold is no index of one.
    """

    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or len(self.pairs) != len(self.choices) or not all(self.choices):
            got = f"choices {list(self.choices)!r:.80} and {len(self.pairs)} pairs"
            raise ConfigError(f"question {self.id}: got {got}, expected two or more choices, none empty, a pair each")
        if isinstance(self.gold, bool) or not isinstance(self.gold, int) or not 0 <= self.gold < len(self.choices):
            expected = f"the index of one of {len(self.choices)} choices"
            raise ConfigError(f"question {self.id}: got gold {self.gold!r}, expected {expected}")

    @property
    def shown(self) -> str:
        return "".join(self.pairs[self.gold])


def choice_question(
    id: str,
    context: str,
    choices: Sequence[str],
    gold: int,
    *,
    delimiter: str = " ",
    tags: Mapping[str, str] | None = None,
) -> ChoiceQuestion:
    """Make a question whose choices all follow one context, joined to it by a delimiter.

    >>> choice_question("1", "Question: 1 + 1?\\nAnswer:", ["2", "3"], 0).shown
    'Question: 1 + 1?\\nAnswer: 2'
    """
    pairs = tuple((context, delimiter + choice) for choice in choices)
    return ChoiceQuestion(id=id, tags=tags or {}, pairs=pairs, choices=tuple(choices), gold=gold)


@dataclass(frozen=True, kw_only=True)
class OpenQuestion(Question):
    """Answer in one's own words.

    Attributes:
        prompt: what the model continues.
        golds: right answers, any of which will do.
        solution: what follows the prompt where the question is an example; None: a blank and the first right answer.

    Raises:
        ConfigError: there is no right answer, or an empty one.
    """

    prompt: str
    golds: tuple[str, ...]
    solution: str | None = None

    def __post_init__(self) -> None:
        if not self.golds or not all(isinstance(gold, str) and gold for gold in self.golds):
            raise ConfigError(f"question {self.id}: got golds {self.golds!r:.80}, expected one or more answers")

    @property
    def shown(self) -> str:
        return self.prompt + (f" {self.golds[0]}" if self.solution is None else self.solution)


@dataclass(frozen=True, kw_only=True)
class Document(Question):
    """Predict a text.

    Attributes:
        text: as it was written, before any cleaning: its bytes and words are what likelihoods are divided by.
    """

    text: str

    @property
    def shown(self) -> str:
        return self.text
