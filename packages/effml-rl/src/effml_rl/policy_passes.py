"""Forward passes over rollouts: the policy's, the reference's and the critic's, with and without gradient.

Rows are a dict of tensors, one row per completion: `prompt_ids`, `prompt_mask`, `completion_ids`, `loss_mask` (the
tokens to learn from), `group` (rows,), the same for completions of one prompt, and more of shape (rows, 1) or
(rows, T). Before a pass, columns that no row of it needs are cut off. Attention is masked at the padding left of
prompts alone: what follows the last counted token of a completion changes nothing before it in a causal model, and what
a tool wrote inside one was seen by the policy. The policy reads a prompt once for all its completions where that pays.

All passes of a step must have equal numerics, or the ratio to the old policy starts away from 1: one dtype, one kernel,
training mode, and no dropout, which `without_dropout` switches off for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from effml_shared import distributed
from torch import Tensor, nn

from effml_rl.shared_prompts import shared_prompt_logps, worth_sharing
from effml_rl.token_logps import TokenLogps, token_logps

__all__ = [
    "Rows",
    "map_tokens",
    "ordered",
    "placeholder",
    "policy_logps",
    "select",
    "sequences",
    "trimmed",
    "without_dropout",
]

Rows = dict[str, Tensor]


def select(rows: Rows, index: Tensor) -> Rows:
    """Return the rows of an index (k,)."""
    return {name: tensor[index] for name, tensor in rows.items()}


def trimmed(rows: Rows) -> Rows:
    """Cut off the columns of padding left of all prompts, and those after the last counted token of all rows."""
    width = rows["loss_mask"].shape[1]
    start = int(rows["prompt_mask"].any(0).int().argmax())
    counted = rows["loss_mask"].any(0)
    end = int((counted * torch.arange(1, width + 1, device=counted.device)).amax().clamp(min=1))

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("prompt_"):
            return tensor[:, start:]
        return tensor[:, :end] if tensor.ndim == 2 and tensor.shape[1] == width else tensor

    return {name: cut(name, tensor) for name, tensor in rows.items()}


def ordered(rows: Rows) -> Tensor:
    """Return an order (rows,) for micro-batches: prompts with the longest completions first, a prompt's rows together.

    Rows of like length need little padding, and if memory runs out it does so at once.
    """
    lengths = rows["loss_mask"].sum(1)
    if "group" not in rows or not len(lengths):
        return lengths.argsort(descending=True, stable=True)
    _, group = rows["group"].unique(return_inverse=True)
    longest = torch.zeros(len(lengths), dtype=lengths.dtype, device=lengths.device)
    longest = longest.scatter_reduce(0, group, lengths, "amax")[group]
    return (longest * len(lengths) + group).argsort(descending=True, stable=True)


def placeholder(device: torch.device) -> Rows:
    """Return one row without meaning, for a rank that has none while others have: all must make the same passes."""
    ids, real = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
    return {"prompt_ids": ids, "prompt_mask": real, "completion_ids": ids, "loss_mask": ~real}


def sequences(rows: Rows) -> tuple[Tensor, Tensor, int]:
    """Return ids and attention mask (rows, P + T) as a model reads them, and P."""
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
    mask = torch.cat([rows["prompt_mask"], torch.ones_like(rows["loss_mask"])], dim=1)
    return ids, mask, rows["prompt_ids"].shape[1]


def policy_logps(
    model: nn.Module, rows: Rows, *, temperature: float, chunk: int = 1024, entropy: str = "none"
) -> TokenLogps:
    """Return log-probabilities and entropies (rows, T) of the completions' tokens, see `token_logps`."""
    if "group" in rows and worth_sharing(model, rows):
        return shared_prompt_logps(model, rows, temperature=temperature, chunk=chunk, entropy=entropy)
    return token_logps(model, *sequences(rows), temperature=temperature, chunk=chunk, entropy=entropy)


@torch.no_grad()
def map_tokens(function: Callable[[Rows], Tensor], rows: Rows, micro_batch: int | None) -> Tensor:
    """Apply a function of rows to (rows, T) in micro-batches, of equal number on every rank; 0 where trimmed off."""
    mask = rows["loss_mask"]
    size = micro_batch or max(len(mask), 1)
    order = ordered(rows)
    (passes,) = distributed.reduce_max(math.ceil(len(mask) / size))
    result = torch.zeros(mask.shape, device=mask.device)
    for i in range(int(passes)):
        index = order[i * size : (i + 1) * size]
        values = function(trimmed(select(rows, index)) if len(index) else placeholder(mask.device))
        if len(index):
            result = result.to(values.dtype)
            result[index, : values.shape[1]] = values
    return result


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, of modules and of float attributes that are named after it."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
