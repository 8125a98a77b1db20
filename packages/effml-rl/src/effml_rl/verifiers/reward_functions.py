"""Plain reward functions as verifiers and verifiers as plain reward functions.

The convention is that of TRL: `f(prompts, completions, **columns) -> list[float | None]`, one reward per completion,
None where the function has nothing to say. A function is given those of these that it has parameters for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from effml_shared.errors import ConfigError

from effml_rl.verifiers.verdict import Verdict, Verifier, check_lengths

__all__ = ["RewardFunction", "as_verifier", "reward_function"]


class RewardFunction:
    """Make a verifier of a plain function; its exceptions are the user's and pass through.

    Args:
        function: called with `prompts` and `completions`, by name if it has a parameter `completions`, else by
            position, and with the targets as keyword arguments.
        column: the name under which it gets the targets; used unless each target is a dict of columns by name.

    Raises:
        ConfigError: it is a class, or a built-in function whose parameters Python does not tell.

    >>> shorter = RewardFunction(lambda prompts, completions, target: [-float(len(c)) for c in completions])
    >>> shorter(["?"], ["four"], [None])[0].reward
    -4.0
    """

    def __init__(self, function: Callable[..., Sequence[float | None]], column: str = "target") -> None:
        self.function, self.column = function, column
        parameters = _parameters(function)
        self._by_name = "completions" in parameters
        every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._taken = None if every else set(parameters)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> list[Verdict]:
        """Return `scored` with the function's number, or `unscored` where it gave None.

        Raises:
            ConfigError: not one reward per completion, or one that is not a finite number.
        """
        check_lengths(prompts, completions, targets)
        given: dict[str, Any] = {"prompts": list(prompts), "completions": list(completions)}
        first = [] if self._by_name else list(given.values())
        named = {**(given if self._by_name else {}), **self._columns(targets)}
        named = {name: of for name, of in named.items() if self._taken is None or name in self._taken}
        returned: Any = self.function(*first, **named)
        if not isinstance(returned, Iterable):
            raise ConfigError(f"rewards: got {returned!r}, expected one per completion ({len(completions)})")
        rewards = list(returned)
        if len(rewards) != len(completions):
            raise ConfigError(f"rewards: got {len(rewards)}, expected one per completion ({len(completions)})")
        return [Verdict(None, "unscored") if reward is None else _scored(reward) for reward in rewards]

    def _columns(self, targets: Sequence[Any]) -> dict[str, list[Any]]:
        if targets and all(isinstance(target, dict) for target in targets):
            names = list(targets[0])
            if any(target.keys() != targets[0].keys() for target in targets):
                raise ConfigError(f"targets: got dicts of different keys, expected {names} in each")
            return {name: [target[name] for target in targets] for name in names}
        return {self.column: list(targets)}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return what a verifier or reward function is called with, by name."""
    name = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, type):
        raise ConfigError(f"verifier: got the class {name}, expected an instance of it")
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some built-in functions
        raise ConfigError(f"verifier: got {name}, expected a function whose parameters Python tells") from None


def _scored(reward: Any) -> Verdict:
    try:
        number = float(reward)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"rewards: got {reward!r:.60}, expected finite numbers, or None for an unscored completion")
    return Verdict(number, "scored")


def as_verifier(function: Any) -> Verifier:
    """Wrap a plain reward function, which is what has no parameter named `targets`."""
    return function if "targets" in _parameters(function) else RewardFunction(function)


def reward_function(verifier: Verifier, column: str = "target") -> Callable[..., list[float | None]]:
    """Make a plain reward function of a verifier, for trainers that take those.

    Args:
        column: the data set's column that holds the targets; other columns are ignored.
    """

    def rewards(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        if column not in columns:
            raise ConfigError(f"column: got {sorted(columns)}, expected {column!r} among them")
        return [verdict.reward for verdict in verifier(prompts, completions, columns[column])]

    return rewards
