"""Generate texts of any length: insert masks into gaps and reveal masks, in any order, from what is given or nothing.

Time runs from 0 to 1 over a grid of N steps. With q and p the probabilities that what is absent appears, and what is
masked is revealed, within a step, every step asks the network once about the present state and then does both:

    reveal     vanilla: each mask with probability p
               adaptive: K ~ Binomial(masks, p) of them, those of the best score (margin, ...), for each row
    insert     masks into open gaps, by their expected number of missing tokens g: Poisson(q g) and others

The scores see the state alone, so with exact predictions, tokens drawn from them, and steps that go to 0, any order
gives the law of the data (arXiv 2509.01025); the likeliest tokens (temperature 0), top_p and top_k do not. What is
inserted in a step is not revealed in it. The last step reveals all that is masked and inserts nothing, which loses
the share 1 - a((N-1)/N) of the tokens; `insert_last` inserts there too, for a closing forward pass that reveals it.

The paper's code: window (5, 32), temperature 0, final "argmax", overflow "drop", and reveal "poisson", here with counts
clipped to what there is; such tau-leaping leaves up to twice as many masks for the last step.

Cost: N forward passes (N + 1 with `insert_last`) at the length of the longest row at that step, half of the final
length in the mean for linear schedules, the head at masks that compete, or are revealed where choosing them takes no
logits; beside them O(those x vocab) and a few operations on (batch, seq) per step. No loop over rows. The host waits
for the device at each step, since lengths are random.

Source: arXiv 2509.01025 and its code; `insert_last`, `subset`, binomial insertion and length guidance are our own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import torch
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.generation import evaluating
from torch import Tensor

from effml_diffusion.corruption import uniform
from effml_diffusion.flex.canvas import Canvas
from effml_diffusion.flex.flex_mdm import FlexMDM, FlexPrediction
from effml_diffusion.flex.insertion_counts import draw_missing, draw_new, keep_subset, poisson, scatter_masks, thin
from effml_diffusion.flex.length_guidance import LengthGuidance
from effml_diffusion.samplers.prediction import Prediction, draw_tokens
from effml_diffusion.samplers.ranking import best_per_row, flat_index
from effml_diffusion.samplers.scores import BLIND_SCORES, SCORES

__all__ = ["Event", "Flex", "FlexOutput"]


class Event(NamedTuple):
    """One thing that happened: within a step first all reveals, then all insertions, from left to right.

    A reveal's position is in the row as it was before the step's insertions, an insertion's in the row after them.
    """

    step: int
    event: str  # reveal | insert
    row: int
    position: int
    token: int


class FlexOutput(NamedTuple):
    """Generated texts."""

    ids: Tensor  # (batch, seq) int64, pads beyond each row's length
    lengths: Tensor  # (batch,) int64
    n_forwards: int  # passes of the batch through the network
    n_truncated: Tensor  # (batch,) int64: masks that were drawn but did not fit
    trace: list[Event] | None = None


Score = Callable[[Tensor], Tensor]
Callback = Callable[[int, Canvas], None]


@dataclass(frozen=True)
class Flex:
    """Generate with a `FlexMDM`.

    Attributes:
        steps: N, at least 2, or 1 with `insert_last`.
        mode: adaptive | vanilla, which masks are revealed.
        score: margin | top_prob | neg_entropy | random | position, or a function of logits (n, vocab) to (n,), higher
            for what is to be revealed first; adaptive only.
        window: (factor, most): only the first min(factor K, most) masks of a row compete. None: all do. Adaptive only.
        temperature: of the law that tokens are drawn from; 0 takes the likeliest.
        top_p, top_k: draw among the fewest tokens with at least this mass, the k likeliest; 1 and 0: among all.
        final: sample | argmax, how the masks of the last forward pass become tokens; the paper's code has argmax.
        reveal: binomial | poisson, the number of masks revealed in a step.
        insertion: poisson | bernoulli | binomial; the last needs a network with `gap_logits`.
        insert_last: insert in the last step too, and reveal that in one more.
        overflow: subset | drop, what happens to masks inserted into a row if not all of them fit.
        guidance: what is wanted of the lengths.
        trace: record all events.
    """

    steps: int
    _: KW_ONLY
    mode: str = "adaptive"
    score: str | Score = "margin"
    window: tuple[float, int] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    final: str = "sample"
    reveal: str = "binomial"
    insertion: str = "poisson"
    insert_last: bool = False
    overflow: str = "subset"
    guidance: LengthGuidance = field(default_factory=LengthGuidance)
    trace: bool = False

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        if self.steps == 1 and not self.insert_last:
            raise ConfigError("steps: got 1, which inserts nothing; expected at least 2, or insert_last=True")
        check_choice("mode", self.mode, ("adaptive", "vanilla"))
        if not callable(self.score):
            check_choice("score", self.score, (*SCORES, *BLIND_SCORES))
        check_range("temperature", self.temperature, 0.0)
        check_count("top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}, expected a number in (0, 1]")
        if self.window is not None and not (len(self.window) == 2 and min(self.window) >= 1):
            raise ConfigError(f"window: got {self.window}, expected None or two numbers >= 1")
        check_choice("final", self.final, ("sample", "argmax"))
        check_choice("reveal", self.reveal, ("binomial", "poisson"))
        check_choice("insertion", self.insertion, ("poisson", "bernoulli", "binomial"))
        check_choice("overflow", self.overflow, ("subset", "drop"))

    @torch.no_grad()
    def __call__(
        self,
        flex: FlexMDM,
        init: Canvas | int,
        *,
        max_length: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> FlexOutput:
        """Generate one text per row of init: a `Canvas`, or a number of empty texts.

        Args:
            flex: the model and its interpolant.
            init: what is given; given masks are revealed like inserted ones.
            max_length: of a text, given tokens included; None: `flex.max_length`.
            generator: of all random numbers, on any device; None: the global one of the model's.
            callback: called after every step with its number and the canvas.

        Raises:
            ConfigError: a given text is longer than max_length or has pads, or the network lacks what insertion needs.
            NonFiniteError: the network's output is NaN or infinite.
        """
        most = flex.max_length if max_length is None else max_length
        check_count("max_length", most, 0)
        canvas = _start(flex, init, most)
        dropped = torch.zeros_like(canvas.lengths)
        events: list[Event] | None = [] if self.trace else None
        grid = torch.arange(self.steps + 1, dtype=torch.float64, device=canvas.ids.device) / self.steps
        reveal_share = flex.interpolant.unmask.hazard(grid[:-1], grid[1:])
        insert_share = flex.interpolant.insert.hazard(grid[:-1], grid[1:])
        if self.insert_last:
            insert_share[-1] = 1.0
        last_insertion = self.steps - 1 if self.insert_last else self.steps - 2
        with evaluating(flex.model):
            for step in range(last_insertion + 2):
                now, closing = grid[step].expand(len(dropped)), step > last_insertion
                eligible, count = canvas.masks(flex.mask_id), None
                if not closing:
                    eligible, count = self._candidates(eligible, reveal_share[step], generator)
                where = flat_index(eligible)
                prediction = flex.predict(canvas.ids, canvas.lengths, now, at=where)
                at_eligible = Prediction(where, prediction.logits, (flex.mask_id, flex.pad_id))
                chosen = eligible
                if count is not None:
                    chosen = best_per_row(self._scores(at_eligible, eligible), eligible, count)
                index, tokens = self._draw(at_eligible, chosen, closing and self.final == "argmax", generator)
                canvas = canvas.reveal(index, tokens)
                if events is not None:
                    events += _revealed(step, index, tokens, canvas.ids.shape[1])
                if not closing:
                    final = step == last_insertion
                    counts, lost = self._new_masks(prediction, canvas, insert_share[step], most, final, generator)
                    dropped += lost
                    ids = {"mask_id": flex.mask_id, "pad_id": flex.pad_id}
                    canvas = canvas.insert(counts, **ids, multiple=flex.length_multiple)
                    if events is not None:
                        events += _inserted(step, counts, flex.mask_id)
                if callback is not None:
                    callback(step, canvas)
        canvas = canvas.padded(flex.pad_id)
        return FlexOutput(canvas.ids, canvas.lengths, last_insertion + 2, dropped, events)

    def _candidates(
        self, masks: Tensor, share: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return among which masks (batch, seq) to choose where a share of them is due, and how many (batch,).

        The number is None where all of them are to be revealed, since choosing took no logits.
        """
        if self.mode == "vanilla":
            once = share if self.reveal == "binomial" else share * torch.exp(-share)  # exactly one Poisson event
            return masks & (uniform(tuple(masks.shape), masks.device, generator) < once), None
        total = masks.sum(1)
        if self.reveal == "binomial":
            count = thin(total, share, generator)
        else:
            count = torch.minimum(poisson(total * share, generator), total)
        eligible = masks & (count > 0)[:, None]
        if self.window is not None:
            width = torch.minimum((self.window[0] * count).long(), total).clamp(max=int(self.window[1]))
            eligible = eligible & (masks.cumsum(1) <= width[:, None])
            count = torch.minimum(count, width)
        if self.score == "random":
            return best_per_row(uniform(tuple(masks.shape), masks.device, generator), eligible, count), None
        if self.score == "position":
            return eligible & (eligible.cumsum(1) <= count[:, None]), None
        return eligible, count

    def _scores(self, at_eligible: Prediction, eligible: Tensor) -> Tensor:
        """Return (batch, seq) scores, read at eligible positions."""
        score = self.score if callable(self.score) else SCORES[self.score]
        (values,) = at_eligible.map(lambda logits: (score(logits),))
        result = torch.zeros(eligible.shape, dtype=torch.float64, device=eligible.device)
        result.view(-1).index_copy_(0, at_eligible.index, values.double())
        return result

    def _draw(
        self, at_eligible: Prediction, chosen: Tensor, greedy: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return flat positions (n,) and tokens (n,) of those eligible masks that are chosen, (batch, seq) bool."""

        def tokens(logits: Tensor, number: Tensor) -> tuple[Tensor, ...]:
            temperature = 0.0 if greedy else self.temperature
            drawn = draw_tokens(logits, number, temperature=temperature, top_p=self.top_p, top_k=self.top_k)
            return (torch.where(logits.amax(-1).isfinite(), drawn, -1),)

        rows = flat_index(chosen.flatten()[at_eligible.index])
        numbers = uniform((len(rows),), rows.device, generator)
        (drawn,) = at_eligible.map(tokens, numbers, rows=rows)
        if (drawn < 0).any():
            raise NonFiniteError("logits: got NaN, or no finite one, where a token was drawn: look at the model")
        return at_eligible.index[rows], drawn

    def _new_masks(
        self,
        prediction: FlexPrediction,
        canvas: Canvas,
        share: Tensor,
        most: int,
        final: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Return how many masks to insert into every gap (batch, seq + 1), and how many more did not fit (batch,)."""
        gaps, open_gaps = prediction.gaps, canvas.open_gaps
        if not ((gaps >= 0) & gaps.isfinite() | ~open_gaps).all():
            raise NonFiniteError("gaps: got NaN, infinite or negative expected counts: look at the model")
        low, high = self.guidance.missing(canvas.lengths, most)
        expected = self.guidance.bend(gaps, canvas.lengths, open_gaps, most)
        if self.insertion == "binomial":
            if prediction.gap_logits is None:
                raise ConfigError(
                    "insertion: got 'binomial' for a network without gap_logits, expected a distribution head"
                )
            n = torch.arange(prediction.gap_logits.shape[-1], device=gaps.device)
            missing = draw_missing(prediction.gap_logits + self.guidance.tilt * n, open_gaps, generator)
            if self.guidance.bounded:
                missing = keep_subset(missing, high, generator)
                short = (low - missing.sum(1)).clamp(min=0)
                missing = missing + scatter_masks(short, expected, open_gaps, generator)
            counts = thin(missing, share, generator)
        else:
            counts = draw_new(share * expected, self.insertion, generator)
        fits = counts.sum(1) <= high
        kept = keep_subset(counts, high, generator) if self.overflow == "subset" else counts * fits[:, None]
        dropped = counts.sum(1) - kept.sum(1)
        if final:  # nothing comes later
            kept = kept + scatter_masks((low - kept.sum(1)).clamp(min=0), expected, open_gaps, generator)
        return kept, dropped


def _start(flex: FlexMDM, init: Canvas | int, most: int) -> Canvas:
    """Return the canvas to start from, on the model's device."""
    canvas = init if isinstance(init, Canvas) else Canvas.empty(init)
    canvas = canvas.to(flex.device or canvas.ids.device)
    longest = int(canvas.lengths.max())
    if longest > most:
        raise ConfigError(f"init: got a text of {longest} tokens, expected at most max_length, {most}")
    if ((canvas.ids == flex.pad_id) & canvas.real).any():
        raise ConfigError(f"init: got pad_id {flex.pad_id} within a text, expected it nowhere")
    return canvas.padded(flex.pad_id, flex.length_multiple)


def _revealed(step: int, index: Tensor, tokens: Tensor, width: int) -> list[Event]:
    pairs = zip(index.tolist(), tokens.tolist(), strict=True)
    return [Event(step, "reveal", place // width, place % width, token) for place, token in pairs]


def _inserted(step: int, counts: Tensor, mask_id: int) -> list[Event]:
    """Return the insertions of one step: the m-th new mask of gap i stands at i plus the new masks before it."""
    rows, gaps = counts.nonzero(as_tuple=True)
    first = (gaps + counts.cumsum(1)[rows, gaps] - counts[rows, gaps]).tolist()
    many = counts[rows, gaps].tolist()
    return [
        Event(step, "insert", row, start + i, mask_id)
        for row, start, count in zip(rows.tolist(), first, many, strict=True)
        for i in range(count)
    ]
