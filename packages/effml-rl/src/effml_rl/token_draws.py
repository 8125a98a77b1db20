"""Draw one token per row from logits, each row at its own temperature, with one uniform number each.

The token is the first whose cumulative probability exceeds the number: one pass over the vocabulary in float32, and one
sum in float64, in which the smallest probabilities are not lost. Filters leave the logits' whole distribution alone and
only keep tokens from being drawn, so that the log-probability of a token does not depend on them.

Cost: about six numbers read or written per logit; with top-k or top-p, two sorts more.
"""

from __future__ import annotations

import torch
from effml_shared.generation import filter_logits
from effml_shared.tensors import widen
from torch import Tensor

__all__ = ["draw_tokens"]


def draw_tokens(
    logits: Tensor, temperature: Tensor, uniform: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return ids (rows,) and their log-probabilities (rows,) under softmax(logits / temperature), unfiltered.

    Args:
        logits: (rows, vocab); statistics are in float32 or wider.
        temperature: (rows,); at 0 the likeliest token is taken, the first of several, with log-probability 0.
        uniform: (rows,) float64, of [0, 1 - 2^-52]: times any sum, less than that sum.
        top_k, top_p, min_p: see `effml_shared.generation.filter_logits`.

    The log-probability is NaN where a row's logits are.

    >>> logits = torch.tensor([[0.25, 0.25, 0.5]]).log().expand(3, 3)
    >>> ids, _ = draw_tokens(logits, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.3, 0.5, 0.0], dtype=torch.float64))
    >>> ids.tolist()
    [1, 2, 2]
    """
    temperature = temperature.to(widen(logits[:0]).dtype)[:, None]
    cold = temperature == 0
    logps = (widen(logits) / temperature.masked_fill(cold, 1.0)).log_softmax(-1)
    filtered = top_k > 0 or top_p < 1 or min_p > 0
    allowed = filter_logits(logps, top_k=top_k, top_p=top_p, min_p=min_p) if filtered else logps
    cumulative = allowed.exp().cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    ids = ids % logits.shape[-1]  # it is beyond the last where the logits are NaN
    if bool(cold.any()):
        ids = torch.where(cold, logits.argmax(-1, keepdim=True), ids)
    drawn = logps.gather(-1, ids)
    return ids.squeeze(1), torch.where(cold, drawn * 0, drawn).squeeze(1)  # NaN stays what it is
