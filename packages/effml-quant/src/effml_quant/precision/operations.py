"""Rounding where there is no module: activations, softmax, attention and residual sums called as functions.

A torch function mode sees the calls that a model's own code makes, and rounds what they return; nothing of torch is
patched, and no call outside of the model's forward pass is touched. Every module whose class got `Watched` in front
enters the mode unless a module around it has done so already; a checkpointed module thus enters it again when it is
recomputed (a checkpointed plain function cannot: checkpoint modules). The gradients at both ends of an operation are
rounded to `vector` as well, unless the backward pass is exact.

What counts as what:
    activation  the functions of `ACTIVATIONS`, and modules of `transformers.activations`
    softmax     `softmax` of any tensor, and that inside of `scaled_dot_product_attention`
    attention   `scaled_dot_product_attention`, and `matmul` of two tensors of four axes (batch, heads, ., .)
    residual    the sum of two floating tensors of one shape with two or three axes, neither of them a parameter: rotary
                positions have four axes; a three-term polynomial inside of an activation is counted in

Attention with a `softmax` or `attention` format is computed in its plain form: its memory is quadratic in the length.
Cost of the mode itself: a Python call per operation. Source: arXiv 2506.20752, and microxcaling's vector operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from effml_quant.precision.linear import autocasts, keeps, multiply, operands, round_to, without_autocast
from effml_quant.precision.scheme import PrecisionScheme
from effml_quant.quantizer import Quantizer

__all__ = ["ACTIVATIONS", "PrecisionMode", "Watched", "attend", "rounded", "watches"]

ACTIVATIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.gelu, F.silu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.softplus, F.hardswish, F.glu),
        *(torch.relu, torch.tanh, torch.sigmoid, torch.Tensor.relu, torch.Tensor.tanh, torch.Tensor.sigmoid),
        *(F.logsigmoid, F.hardtanh, F.hardsigmoid),
    }
)
_SOFTMAX = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax})
_MATMUL = frozenset({torch.matmul, torch.Tensor.matmul})
_ADD = frozenset({torch.add, torch.Tensor.add, torch.Tensor.add_})  # what the operators + and += call


def rounded(x: Tensor, scheme: PrecisionScheme, role: str | None) -> Tensor:
    """Round x to a role's format (None: leave it) and, in the backward pass, its gradient to `vector`."""
    forward = None if role is None else scheme.quantizer(role)
    backward = scheme.quantizer("vector") if scheme.quantize_backward else None
    if not isinstance(x, Tensor) or not x.is_floating_point() or (keeps(x, forward) and keeps(x, backward)):
        return x
    return _Rounded.apply(x, forward, backward)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Quantizer | None, backward: Quantizer | None) -> Tensor:
        ctx.backward_quantizer = backward
        return round_to(x, forward)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return round_to(g, ctx.backward_quantizer), None, None


class _Product(torch.autograd.Function):
    """a b over leading axes, its three products quantised along their own sums like those of a linear layer."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scheme: PrecisionScheme) -> Tensor:
        ctx.scheme = scheme
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        vector = scheme.quantizer("vector")
        along, across = (scheme.quantizer("attention", axis=axis) for axis in (-1, -2))
        with without_autocast(a):
            y = multiply(*operands(round_to(a, vector), along, round_to(b, vector), across))
            return round_to(y, vector).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        scheme: PrecisionScheme = ctx.scheme
        vector = along = across = along_g = across_g = None
        if scheme.quantize_backward:
            vector = scheme.quantizer("vector")
            along, across = (scheme.quantizer("attention", axis=axis) for axis in (-1, -2))
            along_g, across_g = (scheme.quantizer("attention", axis=axis, gradient=True) for axis in (-1, -2))
        da = db = None
        with without_autocast(g):
            g = round_to(g, vector)
            if b is not None:
                gq, bq = operands(g, along_g, round_to(b, vector), along)
                da = round_to(multiply(gq, bq.mT), vector).to(g.dtype)
            if a is not None:
                aq, gq = operands(round_to(a, vector), across, g, across_g)
                db = round_to(multiply(aq.mT, gq), vector).to(g.dtype)
        return da, db, None


def _product(a: Tensor, b: Tensor, scheme: PrecisionScheme) -> Tensor:
    """Return a b in the scheme's `attention` format; leading axes broadcast, and autocast casts as it does."""
    if autocasts(a) and a.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(a.device.type)
        a, b = a.to(dtype), b.to(dtype)
    if scheme.attention is None or a.dtype != b.dtype:
        return torch.matmul(a, b)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return _Product.apply(a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]), scheme)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    scheme: PrecisionScheme,
) -> Tensor:
    """Return `scaled_dot_product_attention` in its plain form, products and probabilities in the scheme's formats.

    Shapes as there: query (..., queries, channels), key and value (..., keys, channels).
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = _product(query, key.mT, scheme) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_bool else scores + attn_mask
    blind = (scores == -math.inf).all(-1, keepdim=True)  # a query that sees nothing yields 0
    weights = rounded(scores.masked_fill(blind, 0.0), scheme, None).softmax(-1).masked_fill(blind, 0.0)
    weights = rounded(weights, scheme, "softmax")
    weights = F.dropout(weights, dropout_p) if dropout_p else weights
    return _product(weights.to(value.dtype), value, scheme).to(query.dtype)


def watches(scheme: PrecisionScheme | None) -> bool:
    """Say whether a scheme rounds anything that only the mode sees."""
    roles = ("activation", "softmax", "residual", "attention")
    return scheme is not None and any(scheme.quantizer(role) is not None for role in roles)


class PrecisionMode(TorchFunctionMode):
    """Round what the functions of the module docstring return, while it is entered."""

    def __init__(self, scheme: PrecisionScheme) -> None:
        super().__init__()
        self.scheme = scheme

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, scheme = dict(kwargs or {}), self.scheme
        if func in ACTIVATIONS and scheme.quantizer("activation") is not None:
            return _between(func, args, kwargs, scheme, "activation")
        if func in _SOFTMAX and scheme.softmax is not None:
            return _between(func, args, kwargs, scheme, "softmax")
        if func is F.scaled_dot_product_attention and (scheme.softmax is not None or scheme.attention is not None):
            return attend(*args, **kwargs, scheme=scheme)
        if func in _MATMUL and scheme.attention is not None and _are_heads(args):
            return _product(args[0], args[1], scheme)
        if func in _ADD and scheme.residual is not None and _is_residual(args):
            return rounded(func(*args, **kwargs), scheme, "residual")
        return func(*args, **kwargs)


def _between(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], scheme: PrecisionScheme, role: str
) -> Tensor:
    """Call a function of one tensor between the roundings of its gradients and of its output."""
    in_place = kwargs.get("inplace") or any(arg is True for arg in args[1:])
    if args and not in_place:
        args = (rounded(args[0], scheme, None), *args[1:])
    return rounded(func(*args, **kwargs), scheme, role)


def _are_heads(args: tuple[Any, ...]) -> bool:
    return len(args) == 2 and all(isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point() for x in args)


def _is_residual(args: tuple[Any, ...]) -> bool:
    a, b = args[:2] if len(args) > 1 else (None, None)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or isinstance(a, nn.Parameter):
        return False
    same = a.shape == b.shape and a.is_floating_point() and b.is_floating_point()
    return same and a.ndim in (2, 3) and not isinstance(b, nn.Parameter)


class Watched(nn.Module):
    """What a module's class is given in front: its own forward pass, inside of a `PrecisionMode`.

    Attributes:
        precision_scheme: None: exactly the module it was.
    """

    precision_scheme: PrecisionScheme | None = None

    @staticmethod
    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward method, with the signature that others inspect, that enters the mode."""

        @functools.wraps(forward)
        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            scheme = self.precision_scheme
            if scheme is None or not watches(scheme):
                return forward(self, *args, **kwargs)
            is_activation = type(self).__module__ == "transformers.activations"
            if is_activation and args:
                args = (rounded(args[0], scheme, None), *args[1:])
            if any(isinstance(mode, PrecisionMode) for mode in _get_current_function_mode_stack()):
                out = forward(self, *args, **kwargs)
            else:
                with PrecisionMode(scheme):
                    out = forward(self, *args, **kwargs)
            return rounded(out, scheme, "activation") if is_activation else out

        return watched
