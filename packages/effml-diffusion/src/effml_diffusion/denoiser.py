"""Calling a denoising network: anybody's, and with its output head only at the positions that are asked for.

A denoiser is any callable `(ids, attention_mask=None, t=None, ...)` to logits (batch, seq, vocab), or to an object with
`.logits`; only arguments that have a value are passed, so a function of the ids alone will do.

The head is most of a small model: d x vocab per token, and logits that outweigh every activation. A loss needs them at
masked positions only, half of them on average. Where the network has a head that can be found (`get_output_embeddings`
as in transformers, else `lm_head`), a hook hands that module, within the call, just these rows of its input. So nothing
of the network is replaced, DDP and FSDP2 see an ordinary forward pass, and both the head's FLOPs and the memory of
the logits shrink to the share of rows. Elsewhere (compiled models, tied heads that are no module, plain callables) all
logits are computed and the rows taken from them: the same values. So they must be, by `dense=True`, where the network
reads its logits by position, or a checkpoint recomputes its head in the backward pass, when the hook is gone. A network
whose head sees further columns, to the right of the ids it was given, says how many: `extra_columns`.

Positions are flat indices of (batch, seq): one `index_select`, whose backward pass is one addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from effml_shared import distributed
from effml_shared.errors import ConfigError
from torch import Tensor, nn

__all__ = ["Denoiser", "call_denoiser", "call_denoiser_at", "head_at", "logits_of", "output_head", "rows_at"]

Denoiser = Callable[..., Any]
"""See the module's description."""


def call_denoiser(model: Denoiser, ids: Tensor, **inputs: Any) -> Tensor:
    """Return the logits (batch, seq, vocab) of ids (batch, seq); inputs that are None are left out.

    Raises:
        ConfigError: what the model returns is no logits, or of another batch and length.
    """
    return call_denoiser_at(model, ids, None, **inputs)


def call_denoiser_at(model: Denoiser, ids: Tensor, index: Tensor | None, **inputs: Any) -> Tensor:
    """Return the logits (n, vocab) at flat positions index (n,) of ids (batch, seq), and compute no others if possible.

    Without an index, all of them, (batch, seq, vocab).

    Raises:
        ConfigError: as `call_denoiser`, or the model did something with its head's output that needs every position.
    """
    with head_at(model, ids.shape, index) as rows:
        output = model(ids, **{name: value for name, value in inputs.items() if value is not None})
    return rows(logits_of(output))


@contextmanager
def head_at(model: Denoiser, shape: tuple[int, ...], index: Tensor | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """Show a network's head only flat positions index (n,) of ids of a shape (batch, seq), in one call within.

    Yields a function from the logits that this call returned to those at the positions, (n, vocab), or without an index
    to all of them, (batch, seq, vocab). It raises what `call_denoiser_at` does.
    """
    (batch, seq), head = shape, None if index is None else output_head(model)
    width, taken = seq + getattr(_inner(model), "extra_columns", 0), False

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal taken
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != (batch, width):
            return None  # such as an embedding that is also the head
        if index is None or distributed.is_sharded(hidden):
            return None
        taken = True
        wider = index if width == seq else index + index // seq * (width - seq)
        return (rows_at(hidden, wider)[None], *args[1:])

    def rows(logits: Tensor) -> Tensor:
        got = f"model: got logits of shape {tuple(logits.shape)}"
        if index is None or not taken:
            if logits.ndim != 3 or logits.shape[:2] != shape:
                raise ConfigError(f"{got}, expected ({batch}, {seq}, vocab)")
            return logits if index is None else rows_at(logits, index)
        if logits.shape[:-1] != (1, len(index)):
            raise ConfigError(f"{got} for {len(index)} rows of its head, expected dense=True")
        return logits[0]

    handle = None if head is None else head.register_forward_pre_hook(take)
    try:
        yield rows
    finally:
        if handle is not None:
            handle.remove()


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Return x (batch, seq, channels) at flat positions index (n,) of (batch, seq): (n, channels), a copy."""
    if x.is_contiguous():
        return x.flatten(0, 1).index_select(0, index)
    return x[index // x.shape[1], index % x.shape[1]]  # a flat view would first copy all of it


def output_head(model: Denoiser) -> nn.Module | None:
    """Return the module that computes a network's logits; None where there is none or hooks would not be seen."""
    if not isinstance(model, nn.Module) or torch.compiler.is_compiling():
        return None
    inner = _inner(model)
    getter = getattr(inner, "get_output_embeddings", None)
    head = getter() if callable(getter) else getattr(inner, "lm_head", None)
    path = next((f"{name}." for name, module in inner.named_modules() if module is head), None)
    if path is None:
        return None
    around = [module for name, module in inner.named_modules() if not name or path.startswith(f"{name}.")]
    return None if any(map(_is_compiled, [model, *around])) else head


def _is_compiled(module: nn.Module) -> bool:
    """Say whether compiled code runs this module: it may ignore a hook, or keep that of its first call for ever."""
    in_place = module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
    return in_place or "_orig_mod" in module._modules


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned.

    Raises:
        ConfigError: there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(f"model: got {type(output).__name__} from it, expected logits or an object with .logits")
    return logits


def _inner(model: Any) -> Any:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
