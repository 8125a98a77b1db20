"""The logits of one forward pass at the positions that were asked for, and what is computed from them.

Positions that are fixed or already revealed cost nothing, not even in the network's head where that can be avoided.
The rest is done in pieces that stay in a CPU's cache, in float32 or wider, without mask and padding: neither a float64
nor a probability tensor of (batch, seq, vocab) ever exists. Cost: one read of these logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from effml_shared.generation import draw, filter_logits
from effml_shared.tensors import widen
from torch import Tensor

from effml_diffusion.samplers.classifier_free_guidance import guided_logits

__all__ = ["Prediction", "draw_tokens"]

PIECE = {"cpu": 2**18}  # logits worked on at once: 1 MiB in float32
PIECE_ELSEWHERE = 2**26


class Prediction:
    """Logits (n, vocab) at flat positions index (n,); with `unconditional` ones of that shape, under guidance.

    The logits must be nobody else's: those of the ids `never` drawn are set to -inf in place.
    """

    def __init__(
        self,
        index: Tensor,
        logits: Tensor,
        never: Iterable[int],
        unconditional: Tensor | None = None,
        guidance: float = 0.0,
    ) -> None:
        for token in never:
            if token < logits.shape[-1]:  # a head may have no row for the mask
                logits[:, token] = -torch.inf
        self.index, self.logits, self.unconditional, self.guidance = index, logits, unconditional, guidance

    def at(self, rows: slice | Tensor) -> Tensor:
        """Return the logits of some of the n rows, (rows, vocab) in float32 or wider; not to be written to."""
        logits = widen(self.logits[rows])
        if self.unconditional is None:
            return logits
        return guided_logits(logits, widen(self.unconditional[rows]), self.guidance)

    def map(
        self, function: Callable[..., tuple[Tensor, ...]], *aligned: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return function(logits, *aligned), each result (n, ...), computed piece by piece.

        rows (n,): which of the rows, by default all; aligned: tensors (n, ...) that are cut like them.
        """
        total = len(self.index) if rows is None else len(rows)
        size = max(1, PIECE.get(self.logits.device.type, PIECE_ELSEWHERE) // self.logits.shape[-1])
        results = []
        for start in range(0, max(total, 1), size):
            piece = slice(start, start + size)
            results.append(function(self.at(piece if rows is None else rows[piece]), *(x[piece] for x in aligned)))
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def draw_tokens(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """Return one token per row of logits (n, vocab) by numbers uniform (n,) in [0, 1); at temperature 0 the likeliest.

    Among the top_k likeliest (0: all), then the fewest with a mass of top_p or more; summed in float64.

    >>> draw_tokens(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([0.9]), top_p=0.7).item()
    1
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes it overflow
    return draw(filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p), uniform)
