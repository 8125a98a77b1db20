"""Papers, and the BibTeX that cites them.

A paper is known by its arXiv id, which also dates it. What is not known for certain, such as an author, stays out of
the entry.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from effml_shared.errors import ConfigError

__all__ = ["Paper", "bibtex"]

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "{": r"\textbraceleft{}",  # BibTeX counts braces, even those behind a backslash
    "}": r"\textbraceright{}",
    **{mark: f"\\{mark}" for mark in "&%$#_"},
}


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv.

    Attributes:
        title: as printed.
        arxiv: id without version, such as `"2409.11321"`.
        authors: all of them, in order, each as `"Given Family"` or `"Family, Given"`; empty if not known for certain.

    Raises:
        ConfigError: the id is none.
    """

    title: str
    arxiv: str
    authors: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{2}(0[1-9]|1[0-2])\.\d{4,5}", self.arxiv):
            raise ConfigError(f"arxiv: got {self.arxiv!r}, expected an id such as 2409.11321")

    @property
    def year(self) -> int:
        """The year of its first version, which the id begins with."""
        return 2000 + int(self.arxiv[:2])

    @property
    def url(self) -> str:
        """Where it can be read."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def key(self) -> str:
        """Name of the BibTeX entry: family name, year, first word of the title that says something.

        >>> Paper("The Gradient of Things", "2401.00001", ["Sof\u00eda Mart\u00ednez"]).key
        'martinez2024gradient'
        """
        family = ""
        if self.authors:
            name = self.authors[0]
            family = name.split(",")[0] if "," in name else name.split()[-1]
        words = [word for word in _ascii(self.title).split() if word not in ("a", "an", "the", "on")]
        return f"{_ascii(family).replace(' ', '')}{self.year}{words[0] if words else ''}"


def bibtex(paper: Paper) -> str:
    r"""Return the BibTeX entry of a paper.

    >>> print(bibtex(Paper("Adam & Eve: 100% \"Free\"", "2401.00001")))
    @misc{2024adam,
      title = {{Adam \& Eve: 100\% ``Free''}},
      year = {2024},
      eprint = {2401.00001},
      archivePrefix = {arXiv},
      url = {https://arxiv.org/abs/2401.00001},
    }
    """
    fields = {
        "title": f"{{{_escape(paper.title)}}}",  # the second pair of braces keeps capitals
        "author": " and ".join(map(_escape, paper.authors)),
        "year": str(paper.year),
        "eprint": paper.arxiv,
        "archivePrefix": "arXiv",
        "url": paper.url,
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@misc{{{paper.key},", *lines, "}"])


def _escape(text: str) -> str:
    text = "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))
    return re.sub(r'"([^"]*)"', r"``\1''", text)


def _ascii(text: str) -> str:
    """Return lower-case words of ASCII letters and digits; accents are dropped, other marks part words."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z0-9]+", plain))
