"""Confidence sampling: in every step, reveal the masks that the model is surest of.

How many is set beforehand (`steps` with a convention of `counts`, or explicit numbers) or found in each row and step:
every mask whose score passes `threshold`, or the surest ones whose entropies sum to at most `entropy_bound` beyond the
largest of them, which bounds the error of drawing them independently; the best one in any case. With `block_length`,
only the leftmost block of masks that is not finished competes (semi-autoregressive decoding); all positions are seen.

Cost per step: one forward pass; the score at masks that compete; a draw at those that win. Orders that owe nothing to
the logits read them at the winners only. No loop over rows; the host waits for the device in adaptive modes only.

Sources: arXiv 2502.06768 (margin), 2502.09992 (prob, blocks), 2505.22618 (threshold), 2505.24857 (entropy bound).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.samplers.counts import RevealCounts, explicit_counts, reveal_counts
from effml_diffusion.samplers.decoding import Decoding, Sampler
from effml_diffusion.samplers.prediction import Prediction
from effml_diffusion.samplers.ranking import best_per_row, flat_index, ranks
from effml_diffusion.samplers.scores import BLIND_SCORES, SCORES, neg_entropy, top_prob

__all__ = ["Confidence"]


class _Step(NamedTuple):
    """A step before its forward pass; in adaptive modes, what is None depends on the logits."""

    competing: Tensor  # (batch, seq) bool: masks of the active blocks
    n_competing: int
    uniform: Tensor  # (batch, seq): what tokens are drawn by
    quota: Tensor | None = None  # (batch,): how many of them each row reveals
    n_winning: int | None = None  # the sum of that, known to the host


@dataclass(frozen=True)
class Confidence(Sampler):
    """Reveal in each step the masks with the best scores; give one of steps, counts, threshold and entropy_bound.

    Attributes:
        score: a name (`margin`, `top_prob`, `neg_entropy`, `prob`, `random`, `position`) or a function from logits
            (n, vocab), float32 or wider, to scores (n,), higher for earlier, called with some positions at a time.
            `prob` is the probability of the token drawn, and biases the law (see `scores`); at temperature 0 it is
            `top_prob`.
        steps: how many, spread over the masks of each row.
        counts: with steps, `"even"` or `"schedule"` (see `reveal_counts`); without, the number for each step.
        threshold: reveal every mask with a score above it.
        entropy_bound: in nats, the most that the entropies of masks revealed together, less the largest, sum to.
        block_length: of a block, in masks of the row from left to right; None: one block.
    """

    score: str | Callable[[Tensor], Tensor] = "margin"
    steps: int | None = None
    counts: str | Sequence[int] = "even"
    threshold: float | None = None
    entropy_bound: float | None = None
    block_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.score):
            check_choice("score", self.score, (*SCORES, "prob", *BLIND_SCORES))
        explicit = not isinstance(self.counts, str)
        given = [self.steps is not None, explicit, self.threshold is not None, self.entropy_bound is not None]
        if sum(given) != 1:
            names = ("steps", "counts", "threshold", "entropy_bound")
            got = ", ".join(name for name, there in zip(names, given, strict=True) if there) or "none"
            raise ConfigError(f"steps: got {got}, expected one of steps, counts (a sequence), threshold, entropy_bound")
        if not explicit:
            check_choice("counts", self.counts, ("even", "schedule"))
        if self.steps is not None:
            check_count("steps", self.steps, 1)
        if self.block_length is not None:
            check_count("block_length", self.block_length, 1)
            if explicit:
                raise ConfigError("block_length: got one with explicit counts, expected steps or an adaptive mode")
        if self.entropy_bound is not None:
            check_range("entropy_bound", self.entropy_bound, 0.0)
        if self.threshold is not None and self.score in BLIND_SCORES:
            raise ConfigError(f"threshold: got one for score {self.score!r}, expected a score that is read from logits")

    def decode(self, state: Decoding) -> None:
        order = self._order(state)
        for step in self._steps(state):
            if order is not None and step.quota is not None:  # the winners are known: only they need logits
                winning = best_per_row(order, step.competing, step.quota)
                prediction = state.predict(winning, step.n_winning)
                tokens, _ = state.draw(prediction, step.uniform)
                state.reveal(prediction.index, tokens)
            else:
                state.reveal(*self._compete(state, step, order))
            state.end_step()

    def _order(self, state: Decoding) -> Tensor | None:
        """Return the scores (batch, seq) of an order that needs no logits, else None."""
        if self.score == "random":  # one draw for all steps: what is left of a random order is in random order
            return state.noise.draw()
        if self.score == "position":
            return -torch.arange(state.ids.shape[1], device=state.ids.device).expand(state.ids.shape)
        return None

    def _steps(self, state: Decoding) -> Iterator[_Step]:
        """Yield the steps that have something to do."""
        width, beyond = self.block_length or state.ids.shape[1], state.ids.shape[1]
        block = (state.masked.cumsum(1) - 1) // width  # of the masks at the start: none ever leaves its block

        def competing() -> Tensor:
            active = block.masked_fill(~state.masked, beyond).amin(1, keepdim=True)
            return state.masked & (block == active)

        uniform = state.noise.draw()  # enough for all steps: a position draws once
        again = self.score == "prob" and self.temperature > 0  # unless there are candidates in every step
        if self.threshold is not None or self.entropy_bound is not None:
            while size := int((now := competing()).sum()):
                yield _Step(now, size, uniform)
                uniform = state.noise.draw() if again else uniform
            return
        plan = self._plan(state)
        quotas, sizes = plan.reveal.to(state.ids.device), [x.sum(1).tolist() for x in (plan.competing, plan.reveal)]
        for quota, n_competing, n_winning in zip(quotas, *sizes, strict=True):
            if n_winning:
                yield _Step(competing() & (quota > 0)[:, None], n_competing, uniform, quota, n_winning)
            uniform = state.noise.draw() if again else uniform  # also where only other batches have a step

    def _plan(self, state: Decoding) -> RevealCounts:
        if self.steps is None:
            return explicit_counts(state.masks, [int(n) for n in self.counts])
        schedule = state.diffusion.schedule if self.counts == "schedule" else None
        return reveal_counts(state.masks, self.steps, block_length=self.block_length, schedule=schedule)

    def _compete(self, state: Decoding, step: _Step, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read logits wherever masks compete; return the winners' flat positions and tokens, both (n,)."""
        prediction = state.predict(step.competing, step.n_competing)
        candidates: Tensor | None = None
        if order is not None:
            score = order
        elif self.score == "prob" and self.temperature > 0:
            candidates, log_probs = state.draw(prediction, step.uniform)
            score = _table(log_probs.exp(), prediction.index, step.competing)
        else:
            score = _table(self._score(state, prediction), prediction.index, step.competing)
        if step.quota is not None:
            winning = best_per_row(score, step.competing, step.quota)
        else:
            winning = self._adaptive(score, step.competing, prediction)
        rows = flat_index(winning.flatten()[prediction.index], step.n_winning)
        tokens = state.draw(prediction, step.uniform, rows=rows)[0] if candidates is None else candidates[rows]
        return prediction.index[rows], tokens

    def _score(self, state: Decoding, prediction: Prediction) -> Tensor:
        function = self.score if callable(self.score) else SCORES.get(self.score, top_prob)
        (found,) = prediction.map(lambda logits: (function(logits),))
        if found.shape != prediction.index.shape:
            got, expected = tuple(found.shape), tuple(prediction.index.shape)
            raise ConfigError(f"score: got shape {got} from the function, expected {expected}")
        state.broken |= found.isnan().any()
        return found

    def _adaptive(self, score: Tensor, competing: Tensor, prediction: Prediction) -> Tensor:
        """Return the winners (batch, seq) by threshold or entropy bound: at least one of every row that competes."""
        place = ranks(score, tier=competing.byte())
        if self.threshold is not None:
            return competing & ((score > self.threshold) | (place == 0))
        (entropy,) = prediction.map(lambda logits: (-neg_entropy(logits),))
        table = _table(entropy, prediction.index, competing).where(competing, 0.0)
        ordered = torch.empty_like(table).scatter_(1, place, table)
        fits = ordered.cumsum(1) - ordered.cummax(1).values <= (self.entropy_bound or 0.0)
        fits[:, 0] = True  # even if the entropy is NaN
        return competing & fits.gather(1, place)


def _table(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Return values (n,) at flat positions of a (batch, seq) table, -inf elsewhere."""
    return values.new_full((like.numel(),), -torch.inf).index_copy_(0, index, values).view(like.shape)
