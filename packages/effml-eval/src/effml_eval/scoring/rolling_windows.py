"""The windows through which a model of limited length reads a document, predicting every token exactly once.

With at most L inputs and at least c tokens of context for every prediction but those of the first window, that window
predicts min(L, T) of the T tokens, and each later one L - c + 1 or what remains, as the last ones it sees. c = 1 is the
convention of EleutherAI's lm-evaluation-harness: cheapest, and pessimistic where a window begins. Larger c costs about
L / (L - c + 1) times as much and is closer to the model's own likelihood.
"""

from __future__ import annotations

from typing import NamedTuple

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError

__all__ = ["Window", "rolling_windows"]


class Window(NamedTuple):
    """Slots start to stop of the prefix token and the T tokens behind it: inputs, and after each of them its target."""

    start: int
    stop: int  # the inputs are slots start to stop - 1
    n_scored: int  # of the targets, the last that many are predicted here


def rolling_windows(n_tokens: int, max_length: int, context_len: int = 1) -> list[Window]:
    """Return the windows of a document, in order.

    Args:
        n_tokens: T, without the prefix token.
        max_length: L, the most inputs of a window.
        context_len: c, from 1 to L.

    Raises:
        ConfigError: an argument is out of range.

    >>> rolling_windows(10, max_length=4, context_len=2)
    [Window(start=0, stop=5, n_scored=4), Window(start=3, stop=8, n_scored=3), Window(start=6, stop=11, n_scored=3)]
    """
    check_count("n_tokens", n_tokens, 0)
    check_count("max_length", max_length, 1)
    if not 1 <= context_len <= max_length:
        raise ConfigError(f"context_len: got {context_len}, expected 1 to max_length={max_length}")
    done = min(max_length, n_tokens)
    windows = [Window(0, done + 1, done)] if done else []
    while done < n_tokens:
        n_scored = min(max_length - context_len + 1, n_tokens - done)
        done += n_scored
        windows.append(Window(done - max_length, done + 1, n_scored))
    return windows
