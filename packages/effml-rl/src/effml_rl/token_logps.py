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
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = ["TokenLogps", "chunked_token_logps", "token_logps"]

_UNLIKELY = -1e4  # below the likeliest: e to it is 0 in every precision, and 0 times it is 0, unlike 0 times -inf


class TokenLogps(NamedTuple):
    """Nats of the sampled tokens and of the distributions they came from."""

    logps: Tensor  # (batch, T), differentiable
    entropy: Tensor  # (batch, T), see `token_logps`


def token_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompt_len: int,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: str = "gradient",
) -> TokenLogps:
    """Return log-probabilities and entropies (batch, T) of the tokens from index prompt_len on.

    Args:
        model: called with ids, and with attention_mask, position_ids and logits_to_keep if it takes them; returns an
            object with `.logits`, of all positions or of the last ones. Bring it into the mode you need.
        input_ids: (batch, prompt_len + T), as `RolloutBatch.input_ids`; attention_mask: of that shape, 0 at padding.
        prompt_len: P, the padding included.
        temperature: that the sampler divided its logits by.
        chunk: tokens whose float32 logits are alive at a time.
        entropy: `"gradient"`: differentiable; `"value"`: without, at half the cost; `"none"`: NaN.

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
    completion, read = input_ids[:, prompt_len:], input_ids[:, :-1]  # the last token predicts nothing that is asked for
    counted = attention_mask[:, :-1].long()
    wanted: dict[str, Any] = {"logits_to_keep": completion.shape[1]}
    if not bool(counted.all()):  # without padding, attention needs no mask and can use its fastest kernels
        wanted |= {"attention_mask": attention_mask[:, :-1], "position_ids": (counted.cumsum(1) - 1).clamp(min=0)}
    arguments = _accepted(model, wanted)
    if "attention_mask" not in arguments and not bool(counted[:, :prompt_len].all()):
        raise ConfigError("model: got one without attention_mask for padded prompts, expected one that takes it")
    logits = getattr(model(read, **arguments), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < completion.shape[1]:
        raise ConfigError("model: got an output without logits (batch, seq, vocab) of all completion tokens")
    if logits.shape[1] > completion.shape[1]:
        logits = logits[:, -completion.shape[1] :]
    return chunked_token_logps(logits, None, completion, temperature=temperature, chunk=chunk, entropy=entropy)


def chunked_token_logps(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor] | None,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: str = "gradient",
) -> TokenLogps:
    """Return log-probabilities and entropies of ids (batch, T), the float32 logits of at most `chunk` tokens alive.

    hidden (batch, T, dim), each the state that emits the token of ids (batch, T) at its place. head: a module or
    function to logits (..., vocab), or its weight (vocab, dim); None: hidden are the logits. entropy: see above.
    """

    def piece(hidden: Tensor, head: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden if head is None else F.linear(hidden, head) if isinstance(head, Tensor) else head(hidden)
        logits = _scaled(logits, temperature)
        log_total = logits.logsumexp(-1)
        logps = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - log_total
        if entropy == "none":
            return logps, torch.full_like(logps, torch.nan)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
            finite = logits.masked_fill(logits == -torch.inf, 0.0)  # rows beyond the vocabulary: 0 times -inf is NaN
            return logps, log_total - ((logits - log_total.unsqueeze(-1)).exp() * finite).sum(-1)

    check_count("chunk", chunk, 1)
    check_choice("entropy", entropy, ("gradient", "value", "none"))
    if not temperature > 0:
        raise ConfigError(f"temperature: got {temperature}, expected a number > 0")
    if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
        raise ConfigError(f"ids: got shape {tuple(ids.shape)}, expected {tuple(hidden.shape[:2])} as of hidden")
    if head is None and entropy != "gradient":
        return TokenLogps(*_FromLogits.apply(hidden, ids, temperature, chunk, entropy == "value"))
    if ids.numel() <= chunk:
        return TokenLogps(*piece(hidden, head, ids))
    bands = []
    for row in _pieces(ids, chunk):
        parts = [
            checkpoint(piece, hidden[at], head, ids[at], use_reentrant=False, preserve_rng_state=False) for at in row
        ]
        bands.append([torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)])
    return TokenLogps(*(torch.cat(columns) for columns in zip(*bands, strict=True)))


class _FromLogits(torch.autograd.Function):
    """The same from logits, where the entropy needs no gradient: half the passes over the vocabulary, none repeated."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, chunk: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logps, totals, entropy = (
            torch.full(ids.shape, torch.nan, dtype=widen(logits[:0]).dtype, device=ids.device) for _ in range(3)
        )
        for at in (at for row in _pieces(ids, chunk) for at in row):
            scaled = _scaled(logits[at], temperature)
            top = scaled.amax(-1, keepdim=True)
            shifted = (scaled - top).clamp_(min=_UNLIKELY)
            masses = shifted.exp()
            mass = masses.sum(-1)
            logps[at] = (scaled.gather(-1, ids[at].unsqueeze(-1)) - top).squeeze(-1) - mass.log()
            totals[at] = top.squeeze(-1) + mass.log()
            if with_entropy:
                entropy[at] = mass.log() - masses.mul_(shifted).sum(-1) / mass
        ctx.save_for_backward(logits, ids, totals)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, ids, totals = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1) / ctx.temperature
        result = torch.empty_like(logits)
        for at in (at for row in _pieces(ids, ctx.chunk) for at in row):
            probs = (_scaled(logits[at], ctx.temperature) - totals[at].unsqueeze(-1)).exp_()
            result[at] = probs.mul_(-gradient[at]).scatter_add_(-1, ids[at].unsqueeze(-1), gradient[at])
        return result, None, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return widen(logits) if temperature == 1.0 else widen(logits) / temperature


def _pieces(ids: Tensor, chunk: int) -> list[list[tuple[slice, slice]]]:
    """Return where to cut (batch, T) along both axes: a slice of logits is a view, flattening would copy them."""
    batch, length = ids.shape
    rows = max(min(batch, chunk), 1)
    columns = max(chunk // rows, 1)
    return [
        [(slice(i, i + rows), slice(t, t + columns)) for t in range(0, length, columns)] for i in range(0, batch, rows)
    ]


def _accepted(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments that the module under DDP and torch.compile takes by name or by **kwargs."""
    inner: Any = model
    while isinstance(inner, nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    parameters = inspect.signature(inner.forward).parameters
    if "use_cache" in parameters:  # a cache would keep every layer's keys and values for nobody
        arguments = {**arguments, "use_cache": False}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}
