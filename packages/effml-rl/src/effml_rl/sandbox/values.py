"""Carry plain values out of the sandbox as JSON: exact built-in types only.

A subclass may lie about equality (`__eq__` that always says yes), so nothing but None, bool, int, float, str and
lists, tuples, dicts and sets of these passes; the receiver builds new objects from text and never unpickles.
Containers other than lists are tagged: `{"tuple": [...]}`, `{"dict": [[key, value], ...]}`, `{"set": [...]}`.

This file runs on both sides of the pipe: it imports nothing but the standard library.
"""

from __future__ import annotations

from typing import Any

__all__ = ["NotPlain", "decode", "encode"]


class NotPlain(ValueError):
    """A value is not made of exact built-in types only."""


def encode(value: Any) -> Any:
    """Return what `json.dumps` writes for a plain value.

    Raises:
        NotPlain: the value, or something in it, is of any other type.
        RecursionError: it nests too deeply, or holds itself.

    >>> encode((1, {"a": {2.5}}))
    {'tuple': [1, {'dict': [['a', {'set': [2.5]}]]}]}
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(item) for item in value]
    if kind is tuple:
        return {"tuple": [encode(item) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind in (set, frozenset):
        return {"set": [encode(item) for item in value]}
    raise NotPlain(f"a value of type {kind.__name__} is not plain data")


def decode(data: Any) -> Any:
    """Return the value of parsed JSON that anybody may have written.

    Raises:
        NotPlain: it is not what `encode` gives.
        RecursionError: it nests too deeply.

    >>> decode(encode((1, {"a": {2.5}})))
    (1, {'a': {2.5}})
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(item) for item in data]
    try:
        ((tag, items),) = data.items()
        if tag == "tuple":
            return tuple(decode(item) for item in items)
        if tag == "dict":
            return {decode(key): decode(item) for key, item in items}
        if tag == "set":
            return {decode(item) for item in items}
    except (TypeError, ValueError) as error:
        raise NotPlain("what came out of the sandbox is not a value that went in") from error
    raise NotPlain(f"got tag {tag!r}, expected tuple, dict or set")
