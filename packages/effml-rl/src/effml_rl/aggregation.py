"""From losses of tokens to one loss: a sum and a count, so that micro-batches and ranks change nothing.

Each reduction is sum / count with both taken over the *whole* optimizer step: `effml_shared.steps.GradientStep` does
that from the pair returned here. In another loop divide every micro-batch's sum by `count_terms` of all of them.

    reduction            sum                          count
    token_mean           of tokens                    tokens             DAPO, arXiv 2503.14476: all tokens equal
    seq_mean_token_mean  of rows' means over tokens   rows with tokens   GRPO, arXiv 2402.03300
    seq_mean_token_sum   of tokens                    rows with tokens   the sequence-level policy gradient
    dr_grpo              of tokens / max_len          rows               arXiv 2503.20783: no bias from lengths

Dividing a micro-batch's loss by its own tokens, and again by the number of micro-batches, is not `token_mean`: tokens
of short completions would count more. An empty micro-batch adds (0, 0). Cost: O(batch x T).
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.tensors import masked_mean, widen
from torch import Tensor

from effml_rl.token_shapes import check_tokens

__all__ = ["aggregate", "count_terms"]

REDUCTIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "dr_grpo")


def aggregate(
    values: Tensor, mask: Tensor, reduction: str = "token_mean", *, max_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum of a reduction over values (batch, T), and its count: the loss is sum / count.

    Args:
        values: (batch, T); where the mask is False they may hold anything, NaN included.
        mask: (batch, T) bool.
        reduction: see the module.
        max_len: tokens a completion may have, the same throughout training; of `"dr_grpo"` alone.

    Raises:
        ConfigError: unknown reduction, shapes that differ, max_len missing or not asked for.

    >>> total, count = aggregate(torch.tensor([[1.0, 3.0], [2.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
    >>> total.item(), count.item()
    (6.0, 3)
    """
    check_tokens(mask, values=values)
    count = count_terms(mask, reduction)
    if (max_len is None) != (reduction != "dr_grpo"):
        raise ConfigError(f"max_len: got {max_len} with reduction {reduction!r}, it is dr_grpo's and needed there")
    if reduction == "seq_mean_token_mean":
        return masked_mean(values, mask, dim=1).sum(), count
    total = torch.where(mask, widen(values), 0.0).sum()
    if max_len is not None:
        check_count("max_len", max_len, 1)
        total = total / max_len
    return total, count


def count_terms(mask: Tensor, reduction: str = "token_mean") -> Tensor:
    """Return the count of `aggregate`, from the mask (batch, T) alone: add it up over a step before the first pass."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_tokens(mask)
    if reduction == "token_mean":
        return mask.sum()
    if reduction == "dr_grpo":
        return torch.tensor(len(mask), device=mask.device)
    return mask.any(1).sum()
