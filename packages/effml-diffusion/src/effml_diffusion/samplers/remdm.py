"""ReMDM: ancestral sampling that masks some committed tokens again, so that errors can be corrected.

In a step from t to s < t, with alpha the share of clean tokens and sigma at most min(1, (1 - alpha_s) / alpha_t),

    committed   masked again with probability sigma, else kept
    masked      revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), token drawn from the model

which leaves alpha_s of the tokens clean whatever sigma is; 0 is the ancestral step. Strategies for sigma:

    cap      min(eta, sigma_max)                                        rescale   eta sigma_max
    conf     sigma_max times the softmax, over the row's committed tokens, of minus the probability that each had when
             it was committed; masks are revealed as if sigma were 0
    loop     ancestral down to t_on, with alpha rising to alpha_on; there, until t_off, tokens are replaced at equal
             shares, sigma = eta; then ancestral to the end

State: for `conf`, one probability per position. Cost: one forward pass for every step that reveals something, read only
where it does; sizes are random, so the host waits for one number per step. Source: arXiv 2503.00307 and its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError

from effml_diffusion.samplers.decoding import Decoding, Sampler
from effml_diffusion.schedules import Schedule

__all__ = ["ReMDM", "largest_sigma", "reveal_probability"]

DEFAULT_ETA = {"cap": 0.008, "rescale": 0.015, "conf": 0.0, "loop": 0.02}  # those of the paper's scripts


def largest_sigma(alpha_t: float, alpha_s: float) -> float:
    """Return the largest probability of masking a committed token again that the share alpha_s allows.

    >>> largest_sigma(0.5, 0.6)
    0.8
    """
    return 1.0 if alpha_t == 0 else min(1.0, (1 - alpha_s) / alpha_t)


def reveal_probability(alpha_t: float, alpha_s: float, sigma: float) -> float:
    """Return the probability of revealing a mask that keeps the share of clean tokens at alpha_s.

    Raises:
        ConfigError: sigma is negative or above `largest_sigma`.

    >>> round(reveal_probability(0.5, 0.6, 0.2), 12)
    0.4
    """
    limit = largest_sigma(alpha_t, alpha_s)
    if not 0 <= sigma <= limit + 1e-12:
        raise ConfigError(f"sigma: got {sigma}, expected a probability of at most {limit}")
    return 1.0 if alpha_t == 1 else (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)


@dataclass(frozen=True)
class ReMDM(Sampler):
    """Reveal and mask again in `steps` steps of equal time, from t = 1 to eps.

    Attributes:
        steps: of the grid.
        strategy: `"cap"`, `"rescale"`, `"conf"` or `"loop"`, see above.
        eta: its strength, a probability; None: that of the paper's scripts for 1024 steps. `conf` has none.
        final: what becomes of masks left at the end: `"argmax"`, the likeliest token, or `"sample"`.
        eps: the last time.
        t_on, t_off, alpha_on: where `loop` starts and ends, and its share of clean tokens.
    """

    steps: int = 1024
    strategy: str = "cap"
    eta: float | None = None
    final: str = "argmax"
    eps: float = 1e-5
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps, 1)
        check_choice("strategy", self.strategy, DEFAULT_ETA)
        check_choice("final", self.final, ("argmax", "sample"))
        if self.eta is not None and (self.strategy == "conf" or not 0 <= self.eta <= 1):
            expected = "none with strategy 'conf'" if self.strategy == "conf" else "a probability"
            raise ConfigError(f"eta: got {self.eta}, expected {expected}")
        if not 0 <= self.eps < 1:
            raise ConfigError(f"eps: got {self.eps}, expected a time in [0, 1)")
        if not 0 < self.t_off < self.t_on < 1 or not 0 < self.alpha_on < 1:
            got = f"t_off={self.t_off}, t_on={self.t_on}, alpha_on={self.alpha_on}"
            raise ConfigError(f"t_on: got {got}, expected 0 < t_off < t_on < 1 and 0 < alpha_on < 1")

    def decode(self, state: Decoding) -> None:
        times = torch.linspace(1, self.eps, self.steps + 1, dtype=torch.float64).tolist()
        committed_with = torch.zeros(state.ids.shape, device=state.ids.device)  # probability of the token
        for t, s in pairwise(times):
            schedule = state.diffusion.schedule
            alpha_t, alpha_s = self.clean_share(schedule, t), self.clean_share(schedule, s)
            sigma = self.sigma(alpha_t, alpha_s, t)
            uniform, number, committed = state.noise.draw(), state.noise.draw(), state.committed
            reveal = state.masked & (uniform < reveal_probability(alpha_t, alpha_s, sigma))
            if self.strategy == "conf":
                weight = committed_with.neg().masked_fill(~committed, -torch.inf).softmax(1)
                remask = uniform < weight * largest_sigma(alpha_t, alpha_s)  # nan in a row of masks: False
            else:
                remask = committed & (uniform < sigma)
            if size := int(reveal.sum()):
                now = torch.full(
                    (len(state.ids),), schedule.inverse(alpha_t), dtype=torch.float64, device=reveal.device
                )
                prediction = state.predict(reveal, size, now)
                tokens, log_probs = state.draw(prediction, number)
                committed_with.view(-1).index_copy_(0, prediction.index, log_probs.exp().to(committed_with.dtype))
            state.remask(remask)  # what was committed before this step
            if size:
                state.reveal(prediction.index, tokens)
                state.end_step()
        state.fill(greedy=self.final == "argmax")

    def clean_share(self, schedule: Schedule, t: float) -> float:
        """Return the share of clean tokens at t: that of the schedule, or of the loop."""
        if self.strategy != "loop":
            return schedule.alpha(t)
        if t > self.t_on:
            return self.alpha_on * (1 - t) / (1 - self.t_on)
        return self.alpha_on if t > self.t_off else 1 - t * (1 - self.alpha_on) / self.t_off

    def sigma(self, alpha_t: float, alpha_s: float, t: float) -> float:
        """Return the probability of masking any committed token again; 0 for `conf`, which has one for each."""
        eta = DEFAULT_ETA[self.strategy] if self.eta is None else self.eta
        limit = largest_sigma(alpha_t, alpha_s)
        if self.strategy == "loop":
            return min(eta, limit) if self.t_off < t <= self.t_on else 0.0
        return eta * limit if self.strategy == "rescale" else min(eta, limit)
