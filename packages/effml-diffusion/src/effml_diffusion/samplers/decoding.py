"""What all samplers of fixed length share: the state of a batch that is being unmasked, and the call that runs one.

A position is fixed (given, never changed), masked, or committed (generated so far, open to remasking). The state is
(batch, seq) ids and booleans on the device of the model; every operation acts on all rows at once. How many masks a row
starts with is read once; from there samplers know the sizes of what they gather, and the host waits for the device
only where the law itself makes a size random.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.generation import evaluating
from effml_shared.tensors import gather_log_probs
from torch import Tensor

from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers.classifier_free_guidance import conditional_and_unconditional
from effml_diffusion.samplers.noise import Noise
from effml_diffusion.samplers.prediction import Prediction, draw_tokens
from effml_diffusion.samplers.ranking import flat_index

__all__ = ["Callback", "Decoding", "SampleOutput", "Sampler"]


class SampleOutput(NamedTuple):
    """What a sampler returns."""

    ids: Tensor  # (batch, seq): no mask left but fixed ones
    n_forwards: int  # passes of the batch through the network; guidance counts two per step
    history: Tensor | None = None  # (steps + 1, batch, seq): the ids at the start and after every forward pass


class Decoding:
    """A batch on its way from masks to tokens; what a callback sees."""

    def __init__(
        self,
        sampler: Sampler,
        diffusion: MaskedDiffusion,
        ids: Tensor,
        fixed: Tensor,
        padding: Tensor,
        attention_mask: Tensor | None,
        noise: Noise,
        callback: Callback | None,
    ) -> None:
        self.sampler, self.diffusion, self.noise, self.callback = sampler, diffusion, noise, callback
        self.ids = ids.clone(memory_format=torch.contiguous_format)  # (batch, seq)
        self.fixed, self.attention_mask = fixed, attention_mask
        self.padding = padding  # (batch, seq): part of fixed, and no condition for guidance
        self.masked = ((self.ids == diffusion.mask_id) & ~fixed).contiguous()  # (batch, seq): still to be revealed
        self.masks = self.masked.sum(1).cpu()  # (batch,): how many at the start, known to the host
        self.n_forwards = self.step = 0
        self.broken = torch.zeros((), dtype=torch.bool, device=ids.device)
        self.snapshots = [self.ids.clone()] if sampler.history else []

    @property
    def committed(self) -> Tensor:
        """(batch, seq) bool: generated, neither masked nor fixed."""
        return ~(self.masked | self.fixed)

    def predict(self, where: Tensor, size: int | None = None, t: Tensor | None = None) -> Prediction:
        """Run the network on the state and read it where (batch, seq) bool holds, at `size` positions if known.

        t (batch,) is the diffusion time, for networks that are told it; by default that at which the share of masks
        among what is not fixed is the expected one.
        """
        diffusion, weight = self.diffusion, self.sampler.guidance
        if diffusion.time_conditioning == "none":
            t = None
        elif t is None:
            level = self.masked.sum(1) / (~self.fixed).sum(1).clamp(min=1)
            t = diffusion.schedule.inverse(1 - level.double())
        index, unconditional = flat_index(where, size), None
        if weight == 0:
            logits = diffusion.logits(self.ids, self.attention_mask, t, at=index)
        else:
            logits, unconditional = conditional_and_unconditional(
                diffusion,
                self.ids,
                self.attention_mask,
                t,
                at=index,
                condition=self.fixed & ~self.padding,
                batched=self.sampler.guidance_batched,
            )
        self.n_forwards += 1 if weight == 0 else 2
        never = [token for token in (diffusion.mask_id, diffusion.pad_id) if token is not None]
        return Prediction(index, logits, never, unconditional, weight)

    def draw(
        self, prediction: Prediction, uniform: Tensor, *, rows: Tensor | None = None, greedy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw tokens at some rows (n,) of a prediction (None: all), by numbers uniform (batch, seq) of its positions.

        Returns them and their log-probabilities under the model itself, without temperature and truncation, float32
        or wider. `greedy`: take the likeliest.
        """
        how = self.sampler
        temperature = 0.0 if greedy else how.temperature

        def pair(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
            tokens = draw_tokens(logits, numbers, temperature=temperature, top_p=how.top_p, top_k=how.top_k)
            return tokens, gather_log_probs(logits, tokens)

        index = prediction.index if rows is None else prediction.index[rows]
        tokens, log_probs = prediction.map(pair, uniform.flatten()[index], rows=rows)
        self.broken |= log_probs.isnan().any()
        return tokens, log_probs

    def reveal(self, index: Tensor, tokens: Tensor) -> None:
        """Commit tokens (n,) at flat positions (n,)."""
        self.ids.view(-1).index_copy_(0, index, tokens.to(self.ids.dtype))
        self.masked.view(-1).index_fill_(0, index, False)

    def remask(self, where: Tensor) -> None:
        """Turn committed positions, where (batch, seq) holds, back into masks."""
        where = where & self.committed
        self.ids.masked_fill_(where, self.diffusion.mask_id)
        self.masked |= where

    def fill(self, *, greedy: bool) -> None:
        """Reveal every mask that is left, with one forward pass if there is any."""
        size = int(self.masked.sum())
        if size:
            prediction = self.predict(self.masked, size)
            tokens, _ = self.draw(prediction, self.noise.draw(), greedy=greedy)
            self.reveal(prediction.index, tokens)
            self.end_step()

    def end_step(self) -> None:
        """Record the state and tell the callback."""
        if self.sampler.history:
            self.snapshots.append(self.ids.clone())
        if self.callback is not None:
            self.callback(self.step, self)
        self.step += 1


Callback = Callable[[int, Decoding], None]
"""Called with the number of the step, from 0, and the state after it, which it must not change."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Unmask a batch: how tokens are drawn is common to all samplers, a subclass decides when and where.

    Attributes:
        temperature: of the law that tokens are drawn from; 0 takes the likeliest.
        top_p, top_k: draw among the fewest tokens with at least this mass, the k likeliest; 1 and 0: among all.
        guidance: weight of classifier-free guidance, the condition being the fixed tokens; 0: none.
        guidance_batched: run its two passes as one of twice the rows, else one after the other.
        history: keep the ids after every step.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: float = 0.0
    guidance_batched: bool = True
    history: bool = False

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0)
        check_count("top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}, expected a number in (0, 1]")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance: got {self.guidance}, expected a finite number")

    @torch.no_grad()
    def __call__(
        self,
        diffusion: MaskedDiffusion,
        init: Tensor,
        *,
        fixed: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> SampleOutput:
        """Replace the masks in init (batch, seq) by tokens; the caller's tensors stay as they are.

        Args:
            fixed: (batch, seq) bool, True where nothing may ever change; by default, whatever is not a mask.
            attention_mask: (batch, seq), 0 at padding, which is always fixed, as is the padding id.
            generator: of all random numbers; seeds: one per row, so that a row depends on its own alone.
            callback: called after every step with its number and the `Decoding`.

        Raises:
            ConfigError: shapes or types disagree, or there is no mask to replace.
            NonFiniteError: the model's logits are NaN or all -inf where a token was drawn.
        """
        if init.ndim != 2 or init.is_floating_point() or init.is_complex() or init.dtype == torch.bool:
            got = f"shape {tuple(init.shape)} of {init.dtype}"
            raise ConfigError(f"init: got {got}, expected token ids (batch, seq)")
        for name, given in (("fixed", fixed), ("attention_mask", attention_mask)):
            if given is not None and given.shape != init.shape:
                raise ConfigError(f"{name}: got shape {tuple(given.shape)}, expected {tuple(init.shape)}")
        if fixed is not None and fixed.dtype != torch.bool:
            raise ConfigError(f"fixed: got {fixed.dtype}, expected torch.bool")
        fixed = init != diffusion.mask_id if fixed is None else fixed
        padding = torch.zeros_like(fixed) if attention_mask is None else ~attention_mask.bool()
        padding = padding if diffusion.pad_id is None else padding | (init == diffusion.pad_id)
        noise = Noise((init.shape[0], init.shape[1]), init.device, generator, seeds)
        state = Decoding(self, diffusion, init, fixed | padding, padding, attention_mask, noise, callback)
        if not int(state.masks.sum()):
            raise ConfigError(f"init: got no mask (id {diffusion.mask_id}) to replace, expected at least one not fixed")
        with evaluating(diffusion.model):
            self.decode(state)
        if bool(state.broken):
            raise NonFiniteError("logits: got NaN, or -inf for all tokens, where a token was drawn: look at the model")
        return SampleOutput(state.ids, state.n_forwards, torch.stack(state.snapshots) if self.history else None)

    @abstractmethod
    def decode(self, state: Decoding) -> None:
        """Reveal every mask of the state."""
