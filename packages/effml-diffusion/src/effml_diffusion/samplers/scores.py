"""How sure a prediction is: functions from logits to one score per position, higher for what should be revealed first.

All but `prob` depend on the state alone, not on the token that is then drawn. Only such a score leaves the law of an
exact model unchanged when one token is revealed per step: keeping the best of *drawn* tokens (`prob`, as in LLaDA's
low-confidence remasking) prefers likely ones, even with a perfect model. Computed in float32 or wider from the logits
without temperature or truncation. Cost: a softmax, and one or two reads of it.

Sources: margin, arXiv 2502.06768; prob, arXiv 2502.09992; the others are folklore.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["BLIND_SCORES", "SCORES", "margin", "neg_entropy", "top_prob"]


def margin(logits: Tensor) -> Tensor:
    """Return the probability of the likeliest token less that of the second: (n, vocab) -> (n,).

    >>> round(margin(torch.tensor([[0.5, 0.3, 0.2]]).log()).item(), 6)
    0.2
    """
    probs = logits.softmax(-1)
    first, token = probs.max(-1, keepdim=True)
    second = probs.scatter_(-1, token, 0.0).amax(-1)  # half the time of topk(2)
    return first.squeeze(-1) - second


def top_prob(logits: Tensor) -> Tensor:
    """Return the probability of the likeliest token: (n, vocab) -> (n,)."""
    return logits.softmax(-1).amax(-1)


def neg_entropy(logits: Tensor) -> Tensor:
    """Return sum p log p in nats, 0 at most: (n, vocab) -> (n,)."""
    log_probs = logits.log_softmax(-1)
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 log 0 is 0
    return (log_probs.exp() * finite).sum(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"margin": margin, "top_prob": top_prob, "neg_entropy": neg_entropy}
"""Named scores that are read from logits; `prob` is that of a drawn token, and needs the token too."""

BLIND_SCORES = ("random", "position")
"""Named orders that need no logits: uniformly random, and left to right."""
