"""Checks of arguments at public boundaries, each with a one-line error: what was got, what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from effml_shared.errors import ConfigError

__all__ = ["check_choice", "check_count", "check_range"]


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise a `ConfigError` naming the argument unless low <= value < high.

    >>> check_range("eps", -1.0, 0.0)
    Traceback (most recent call last):
    ...
    effml_shared.errors.ConfigError: eps: got -1.0, expected a number in [0.0, inf)
    """
    try:
        inside = low <= value < high
    except TypeError:  # no number
        inside = False
    if not inside:
        raise ConfigError(f"{name}: got {value!r}, expected a number in [{low}, {high})")


def check_count(name: str, value: Any, low: int) -> None:
    """Raise a `ConfigError` naming the argument unless `value` is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}: got {value!r}, expected an integer of at least {low}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a `ConfigError` naming the argument unless `value` is one of `choices`."""
    choices = list(choices)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
