"""Loss spikes, and the turn of the gradient norm that comes before them, in a training's own numbers.

    loss            m_t = mean of the last n losses;  a spike where m_t - m_(t-1) > threshold  (n = 100, 0.008)
    gradient norm   the same mean over 50 steps;  a turn where it stops falling, after step 120
                    growth = mean of the last 50 norms over that of the 50 before

With equal windows m_t - m_(t-1) = (l_t - l_(t-n)) / n, so the threshold asks for a loss 0.8 above that of n steps ago:
meant for the nats of language models. Scale it for other losses.
State: the last 2 x 50 norms and n + 1 losses. Cost: a few additions per step on the host.

Source: the analysis code of arXiv 2506.20752; its windows and thresholds are what the authors used, not derived.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from effml_shared.checks import check_count, check_range
from effml_shared.loop import Hook, Loop

__all__ = ["SpikeDetector", "find_spikes", "find_turn"]

_log = logging.getLogger(__name__)


def find_spikes(losses: Sequence[float], *, window: int = 100, threshold: float = 0.008) -> list[int]:
    """Return the steps (1: the first loss) at which a spike begins; steps in a row are one spike.

    Args:
        losses: of every step. One that is not finite is a spike.

    >>> find_spikes([1.0] * 200 + [5.0] * 3 + [1.0] * 200)
    [201]
    """
    detector = SpikeDetector(window=window, threshold=threshold)
    return [step for step, loss in enumerate(losses, start=1) if detector.update(loss)]


def find_turn(norms: Iterable[float], *, window: int = 50, after: int = 120) -> int | None:
    """Return the first step beyond `after` at which the rolling mean of the gradient norm turns from falling to rising.

    >>> find_turn([1 / step for step in range(1, 301)] + [1.0] * 10)
    301
    """
    detector = SpikeDetector(norm_window=window, after=after)
    for norm in norms:
        detector.update(0.0, norm)
    return detector.turn


class SpikeDetector(Hook):
    """Watch loss and gradient norm, step by step.

    In the `Loop`, it logs spikes and adds `grad_norm_growth` and `grad_norm_variance` to the metrics once it has them;
    place it before the hooks that are to see these. Elsewhere call `update(loss, grad_norm)` once per step.

    Args:
        window: losses in a mean.
        threshold: of a spike: increase of the mean in one step.
        norm_window: gradient norms in a mean. Their variance is over twice as many.
        after: no turn is seen before this step.

    Attributes:
        spikes: steps at which a spike began.
        turn: step at which the mean gradient norm stopped falling; None: not yet.
    """

    def __init__(self, *, window: int = 100, threshold: float = 0.008, norm_window: int = 50, after: int = 120) -> None:
        check_count("window", window, 1)
        check_range("threshold", threshold, 0.0)
        check_count("norm_window", norm_window, 1)
        check_count("after", after, 0)
        self.window, self.threshold, self.norm_window, self.after = window, threshold, norm_window, after
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=2 * norm_window)
        self.step = 0
        self.spikes: list[int] = []
        self.turn: int | None = None
        self._above = self._fell = False

    def update(self, loss: float, grad_norm: float | None = None) -> bool:
        """Take in one step; say whether a spike begins at it."""
        self.step += 1
        if grad_norm is not None:
            self._see_norm(grad_norm)
        # A loss that is not finite is a spike of its own and stays out of the mean, which it would spoil for good.
        full, first = len(self._losses) == self.window, self._losses[0] if self._losses else loss
        above = not math.isfinite(loss) or (full and (loss - first) / self.window > self.threshold)
        if math.isfinite(loss):
            self._losses.append(loss)
        begins = above and not self._above
        self._above = above
        if begins:
            self.spikes.append(self.step)
        return begins

    def _see_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            return
        n = self.norm_window
        if len(self._norms) >= n:
            rise = norm - self._norms[-n]  # n times the step of the mean
            if rise > 0 and self._fell and self.turn is None and self.step > self.after:
                self.turn = self.step
            self._fell = rise < 0 if rise else self._fell
        self._norms.append(norm)

    @property
    def growth(self) -> float | None:
        """Mean of the last norms over the mean of as many before; None until there are enough."""
        norms, n = list(self._norms), self.norm_window
        before = sum(norms[:n])
        return sum(norms[n:]) / before if len(norms) == 2 * n and before > 0 else None

    @property
    def variance(self) -> float | None:
        """Variance of the gradient norm over two windows; None until there are enough."""
        norms = list(self._norms)
        if len(norms) < 2 * self.norm_window:
            return None
        mean = math.fsum(norms) / len(norms)
        return math.fsum((norm - mean) ** 2 for norm in norms) / len(norms)

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """Take in the step's `loss` and `grad_norm`."""
        turn = self.turn
        if self.update(metrics["loss"], metrics.get("grad_norm")):
            _log.warning("step %d: the loss begins to spike (%.4g)", loop.clock.step, metrics["loss"])
        if self.turn != turn:
            _log.info("step %d: the gradient norm stops falling", loop.clock.step)
        readings = {"grad_norm_growth": self.growth, "grad_norm_variance": self.variance}
        cast(dict[str, float], metrics).update({name: value for name, value in readings.items() if value is not None})

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next update depends on."""
        return {
            "step": self.step,
            "losses": list(self._losses),
            "norms": list(self._norms),
            "spikes": list(self.spikes),
            "turn": self.turn,
            "above": self._above,
            "fell": self._fell,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.step, self.spikes, self.turn = state["step"], list(state["spikes"]), state["turn"]
        self._losses = deque(state["losses"], maxlen=self.window)
        self._norms = deque(state["norms"], maxlen=2 * self.norm_window)
        self._above, self._fell = state["above"], state["fell"]
