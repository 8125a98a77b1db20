"""A grid of values: every combination is a point with a name that a file system takes."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effml_shared.errors import ConfigError

__all__ = ["Point", "grid_points", "parse_grid"]

_LONGEST = 120  # characters of a point's name; file systems allow 255 bytes
_CLOSING = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Point:
    """One point of a grid: the name of its directory, and its values as they were written."""

    name: str
    values: dict[str, str]


def parse_grid(words: Sequence[str]) -> dict[str, list[str]]:
    """Read `FIELD=V1,V2` words: each value is what one would write in `FIELD=VALUE`.

    A comma separates values unless it stands within brackets, braces or quotes.

    >>> parse_grid(["lr=0.1,0.2", "seeds=[1,2],[3,4]", "corpus='a,b',c"])
    {'lr': ['0.1', '0.2'], 'seeds': ['[1,2]', '[3,4]'], 'corpus': ["'a,b'", 'c']}

    Raises:
        ConfigError: a word is something else, or a field or value stands there twice.
    """
    grid: dict[str, list[str]] = {}
    for word in words:
        field, equals, text = word.partition("=")
        if not equals or not field:
            raise ConfigError(f"--grid: got {word!r}, expected FIELD=VALUE,VALUE")
        if field in grid:
            raise ConfigError(f"--grid: got {field} twice, expected all of its values in one word")
        values = [value.strip() for value in _split(field, text)]
        if "" in values:
            raise ConfigError(f"--grid {field}: got {text!r} with an empty value, expected VALUE,VALUE")
        again = [value for place, value in enumerate(values) if value in values[:place]]
        if again:
            raise ConfigError(f"--grid {field}: got {again[0]} twice, expected each value once")
        grid[field] = values
    return grid


def _split(field: str, text: str) -> list[str]:
    """Split at commas outside of brackets and quotes; a quote within a word, as in YAML, is a character."""
    values, start, place, open_until = [], 0, 0, list[str]()
    before = ","  # the last character that is not a space
    while place < len(text):
        character = text[place]
        if character in "'\"" and before in ",[{:":
            end = re.compile(r"'(?:[^']|'')*'" if character == "'" else r'"(?:[^"\\]|\\.)*"').match(text, place)
            if end is None:
                raise ConfigError(f"--grid {field}: got {text!r}, expected a closing {character}")
            place = end.end() - 1
        elif character in _CLOSING:
            open_until.append(_CLOSING[character])
        elif character in _CLOSING.values():
            if not open_until or open_until.pop() != character:
                raise ConfigError(f"--grid {field}: got {text!r}, expected brackets that match")
        elif character == "," and not open_until:
            values.append(text[start:place])
            start = place + 1
        before = before if character == " " else character
        place += 1
    if open_until:
        raise ConfigError(f"--grid {field}: got {text!r}, expected a closing {open_until[-1]}")
    return [*values, text[start:]]


def grid_points(grid: Mapping[str, Sequence[str]]) -> list[Point]:
    """Return every combination of a grid's values, the last field changing fastest.

    >>> [point.name for point in grid_points({"lr": ["0.1", "0.2"], "model.width": ["64"]})]
    ['lr=0.1,model.width=64', 'lr=0.2,model.width=64']
    """
    combinations = itertools.product(*grid.values())
    return [_point(dict(zip(grid, values, strict=True))) for values in combinations]


def _point(values: dict[str, str]) -> Point:
    exact = ",".join(f"{field}={value}" for field, value in values.items())
    name = re.sub(r"[^\w.,=+\[\]-]", "-", exact, flags=re.ASCII)
    if name != exact or len(name) > _LONGEST:  # two such names may agree where their values do not
        name = f"{name[:_LONGEST]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return Point(name, values)
