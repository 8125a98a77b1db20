"""Log-probabilities and entropies of sampled tokens, without the float32 logits of a whole batch.

log p(y) = z_y - logsumexp(z) and H = logsumexp(z) - sum softmax(z) z, with z the logits over the *sampling* temperature
in float32 or wider: sampler, policy and reference must use the same. The float32 copies are made for `chunk` tokens at
a time, and again in the backward pass: memory O(chunk x vocabulary) beside the model's own logits, where a copy of
64 x 512 tokens over a vocabulary of 151,936 would take 19.9 GB. `chunked_token_logps` can start from the hidden states
and spares the model's logits too, for one more product with the head in the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["TokenLogps", "chunked_token_logps", "token_logps"]


class TokenLogps(NamedTuple):
    """Nats of the sampled tokens and of the distributions they came from, differentiable."""

    logps: Tensor  # (batch, T)
    entropy: Tensor  # (batch, T)


def token_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompt_len: int,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> TokenLogps:
    """Return log-probabilities and entropies (batch, T) of the tokens from index prompt_len on.

    Args:
        model: called with ids, and with attention_mask, position_ids and logits_to_keep if it takes them; returns an
            object with `.logits`, of all positions or of the last ones. Bring it into the mode you need.
        input_ids: (batch, prompt_len + T), as `RolloutBatch.input_ids`; attention_mask: of that shape, 0 at padding.
        prompt_len: P, the padding included.
        temperature: that the sampler divided its logits by.
        chunk: tokens whose float32 logits are alive at a time.

    Raises:
        ConfigError: an argument is out of range, or the model cannot be told of the padding, or returns no logits.
    """
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ConfigError(
            f"input_ids, attention_mask: got shapes {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}, "
            "expected (batch, prompt_len + T) for both"
        )
    if not 1 <= prompt_len < input_ids.shape[1]:
        raise ConfigError(f"prompt_len: got {prompt_len}, expected 1 to {input_ids.shape[1] - 1}")
    completion = input_ids[:, prompt_len:]
    kept = completion.shape[1] + 1
    counted = attention_mask.long()
    wanted = {
        "attention_mask": attention_mask,
        "position_ids": (counted.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": kept,
    }
    arguments = _accepted(model, wanted)
    if "attention_mask" not in arguments and not bool(counted[:, :prompt_len].all()):
        raise ConfigError("model: got one without attention_mask for padded prompts, expected one that takes it")
    logits = getattr(model(input_ids, **arguments), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < kept:
        raise ConfigError("model: got an output without logits (batch, seq, vocab) of all completion tokens")
    return chunked_token_logps(logits[:, -kept:-1], None, completion, temperature=temperature, chunk=chunk)


def chunked_token_logps(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor] | None,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> TokenLogps:
    """Return log-probabilities and entropies of ids (batch, T), the float32 logits of at most `chunk` tokens alive.

    hidden (batch, T, dim), each the state that emits the token of ids (batch, T) at its place. head: a module or
    function to logits (..., vocab), or its weight (vocab, dim); None: hidden are the logits.
    """

    def piece(hidden: Tensor, head: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden if head is None else F.linear(hidden, head) if isinstance(head, Tensor) else head(hidden)
        logits = widen(logits) if temperature == 1.0 else widen(logits) / temperature
        finite = logits.masked_fill(logits == -torch.inf, 0.0)  # rows beyond the vocabulary: 0 times -inf is NaN
        log_total = logits.logsumexp(-1)
        entropy = log_total - ((logits - log_total.unsqueeze(-1)).exp() * finite).sum(-1)
        return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - log_total, entropy

    check_count("chunk", chunk, 1)
    if not temperature > 0:
        raise ConfigError(f"temperature: got {temperature}, expected a number > 0")
    if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
        raise ConfigError(f"ids: got shape {tuple(ids.shape)}, expected {tuple(hidden.shape[:2])} as of hidden")
    if ids.numel() <= chunk:
        return TokenLogps(*piece(hidden, head, ids))
    rows = min(len(ids), chunk)  # cut along both axes: a slice of logits is a view, flattening would copy them
    bands = []
    for h, i in zip(hidden.split(rows), ids.split(rows), strict=True):
        parts = [
            checkpoint(piece, hs, head, ts, use_reentrant=False, preserve_rng_state=False)
            for hs, ts in zip(h.split(chunk // rows, dim=1), i.split(chunk // rows, dim=1), strict=True)
        ]
        bands.append([torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)])
    logps, entropy = (torch.cat(columns) for columns in zip(*bands, strict=True))
    return TokenLogps(logps, entropy)


def _accepted(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments that the module under DDP and torch.compile takes by name or by **kwargs."""
    inner: Any = model
    while isinstance(inner, nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    parameters = inspect.signature(inner.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}
