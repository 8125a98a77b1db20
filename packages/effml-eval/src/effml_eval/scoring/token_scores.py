"""Log-probability and greediness of given tokens under a model's logits.

The softmax over the vocabulary is in float32 (or float64, if that is what the model computes in) and is taken for a few
tokens at a time, so that wide logits never exist for a whole batch. Cost: 3 passes over tokens x vocab numbers, and
2^24 of them in memory beside the logits.
"""

from __future__ import annotations

import torch
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.tensors import widen
from torch import Tensor

__all__ = ["score_tokens"]

_NUMBERS = 1 << 24  # logits widened at a time


def score_tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities in nats, float64 (n), and whether each target is the likeliest token, bool (n).

    A token is the likeliest if no other is more likely and none of a lower id as likely. Both results are on the CPU.

    Args:
        logits: (n, vocab), on any device.
        targets: (n) token ids, on the CPU.

    Raises:
        ConfigError: a target is no id of the model's.
        NonFiniteError: the logits hold NaN or plus infinity, or nothing but minus infinity.
    """
    vocab = logits.shape[-1]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        low, high = int(targets.min()), int(targets.max())
        raise ConfigError(f"token ids: got {low} to {high}, expected 0 to {vocab - 1} as the model has {vocab} logits")
    log_probs, greedy = [], []
    ids = torch.arange(vocab, device=logits.device)
    size = max(1, _NUMBERS // vocab)
    for rows, some_targets in zip(logits.split(size), targets.split(size), strict=True):
        wide, wanted = widen(rows), some_targets.to(logits.device)[:, None]
        chosen, total = wide.gather(1, wanted), wide.logsumexp(1)
        if not bool(total.isfinite().all()):
            raise NonFiniteError("logits: got NaN or infinity where tokens are scored, expected finite numbers")
        log_probs.append((chosen[:, 0] - total).double().cpu())
        greedy.append(~((wide > chosen) | ((wide == chosen) & (ids < wanted))).any(1).cpu())
    return torch.cat(log_probs), torch.cat(greedy)
