"""The stories that word problems are told in: an opening, phrases for each operation, and a question.

A story is data: one of your own is a `Template`, too. Its phrases say which operations it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effml_shared.errors import ConfigError

__all__ = ["TEMPLATES", "Template"]


@dataclass(frozen=True)
class Template:
    """A story: sentences with `{name}`, `{n}` and `{count}`, which is n with the thing's name.

    Raises:
        ConfigError: there is an operation other than + - * /, or none; or a sentence has another placeholder.

    >>> story = Template(("mile", "miles"), "{name} ran {count}.", {"+": ["Then {count}."]}, "How many {things}?")
    >>> story.fill(story.opening, "Ada", 1)
    'Ada ran 1 mile.'
    """

    thing: tuple[str, str]  # one and many
    opening: str
    phrases: Mapping[str, Sequence[str]]  # per operation, equally likely ways to tell it
    question: str
    lowest: int = 0  # that a running total may become

    def __post_init__(self) -> None:
        if not self.phrases or not set(self.phrases) <= set("+-*/") or not all(self.phrases.values()):
            raise ConfigError(f"phrases: got operations {list(self.phrases)}, expected some of + - * / with phrases")
        for sentence in (self.opening, *(said for phrases in self.phrases.values() for said in phrases), self.question):
            try:
                self.fill(sentence, "", 1)
            except (LookupError, ValueError):
                expected = "{name}, {n}, {count} and {things} as the only placeholders"
                raise ConfigError(f"template: got {sentence!r}, expected {expected}") from None

    def fill(self, sentence: str, name: str, n: int) -> str:
        """Return a sentence about n things of somebody."""
        return sentence.format(name=name, n=n, count=f"{n} {self.thing[n != 1]}", things=self.thing[1])


TEMPLATES: Mapping[str, Template] = {
    "market": Template(
        ("apple", "apples"),
        "{name} has {count}.",
        {
            "+": ("{name} buys another {count}.", "A friend gives {name} {count}."),
            "-": ("{name} eats {count}.", "{name} sells {count}."),
            "*": ("The next harvest leaves {name} with {n} times as many.",),
            "/": ("{name} packs them equally into {n} bags and keeps a single bag.",),
        },
        "How many {things} does {name} have now?",
    ),
    "cards": Template(
        ("card", "cards"),
        "{name} collects cards and owns {count}.",
        {
            "+": ("{name} wins {count}.", "{name} finds {count} in a drawer."),
            "-": ("{name} loses {count} in a game.", "{name} trades away {count}."),
            "*": ("A lucky trade leaves {name} with {n} times as many.",),
            "/": ("{name} shares them equally among {n} people and is one of them.",),
        },
        "How many {things} does {name} own in the end?",
    ),
    "savings": Template(
        ("dollar", "dollars"),
        "{name} starts the year with {count}.",
        {
            "+": ("{name} earns {count}.", "{name} receives {count} as a gift."),
            "-": ("{name} spends {count}.", "A repair costs {name} {count}."),
            "*": ("An investment multiplies the money by {n}.",),
            "/": ("{name} divides the money into {n} equal parts and keeps one part.",),
        },
        "How many {things} are left?",
    ),
    "garden": Template(
        ("plant", "plants"),
        "In {name}'s garden grow {count}.",
        {
            "+": ("{name} plants {count} more.", "The wind seeds {count} more."),
            "-": ("Frost takes {count}.", "{name} digs out {count}."),
            "*": ("By summer there are {n} times as many.",),
            "/": ("Only one in {n} survives the drought.",),
        },
        "How many {things} grow there now?",
    ),
    "miniature": Template(  # words of a small vocabulary: see `miniature`
        ("", ""), "Q has {n}", {"+": ("gets {n}",), "-": ("loses {n}",)}, "?", lowest=-20
    ),
}
