"""Linear layers whose three products take quantised operands: forward, gradient of the input, gradient of the weight.

    Y  = r(r(Xf Wf^T) + r(b))                 Xf = q(r(X); a_fwd, K), Wf = q(r(W); w_fwd, K)
    dX = r(q(r(G); g_dx, N) q(r(W); w_bwd, N))
    dW = r(q(r(G); g_dw, M)^T q(r(X); a_bwd, M)),  db = r(sum of r(G) over M)

q(.; format, axis of the blocks) quantises, r rounds to the scheme's `vector`. Products accumulate in float32 or wider.
Saved for the backward pass are X and W as they came, so memory is that of `nn.Linear`. Forward-only schemes take these
and G as they are. Cost beside the products: two quantised copies of each of X, W and G.

Under autocast nothing is cast down first: operands are quantised from the master weight and from the input as it came,
and only the output has autocast's dtype. Source: arXiv 2506.20752 and its code (microxcaling's linear layer).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_quant import kernels
from effml_quant.casting import fake_quantize
from effml_quant.precision.hadamard import hadamard_rotate
from effml_quant.precision.scheme import PrecisionScheme
from effml_quant.quantizer import Quantizer

__all__ = [
    "MXConv1D",
    "MXLinear",
    "autocasts",
    "check_weight",
    "keeps",
    "multiply",
    "mx_linear",
    "operands",
    "round_to",
    "without_autocast",
]


def mx_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: PrecisionScheme) -> Tensor:
    """Return x W^T + b in a precision scheme, with its backward pass.

    Args:
        x: (..., in), floating.
        weight: (out, in), of x's dtype unless autocast is on.
        bias: (out) or None.

    Returns:
        (..., out) in x's dtype, or autocast's.

    Raises:
        ConfigError: shapes or dtypes do not fit, or weights in float16 meet a `vector` of another range.

    >>> x, w = torch.tensor([[0.95, 0.1]]), torch.tensor([[1.0, 1.0]])
    >>> mx_linear(x, w, None, PrecisionScheme.mx("mxfp8_e4m3", vector=None)).item()  # 0.875 + 0.1015625
    0.9765625
    """
    check_operands(x, weight, scheme)
    if torch.compiler.is_compiling() and not _TRACEABLE:
        return _untraced(x, weight, bias, scheme)
    return _Linear.apply(x, weight, bias, scheme, _output_dtype(x, weight))


# The compiler of torch 2.11 makes zeros of this Function's weight gradients; 2.15 is the first checked to be right.
_TRACEABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


@torch._disable_dynamo  # torch.compiler.disable would import the compiler, for seconds, here
def _untraced(x: Tensor, weight: Tensor, bias: Tensor | None, scheme: PrecisionScheme) -> Tensor:
    return _Linear.apply(x, weight, bias, scheme, _output_dtype(x, weight))


class MXLinear(nn.Linear):
    """A linear layer in a precision scheme: `nn.Linear` with one attribute more, which may change between calls.

    Attributes:
        precision_scheme: None: exactly `nn.Linear`.
    """

    precision_scheme: PrecisionScheme | None = None
    plain_class: type[nn.Module] = nn.Linear

    def __init__(self, *args: Any, scheme: PrecisionScheme | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.precision_scheme = scheme

    def forward(self, input: Tensor) -> Tensor:
        scheme = self.precision_scheme
        return super().forward(input) if scheme is None else mx_linear(input, self.weight, self.bias, scheme)


class MXConv1D(nn.Module):
    """The same for the `Conv1D` of transformers (GPT-2), a linear layer that stores its weight as (in, out)."""

    precision_scheme: PrecisionScheme | None = None

    def forward(self, x: Tensor) -> Tensor:
        scheme = self.precision_scheme
        return super().forward(x) if scheme is None else mx_linear(x, self.weight.t(), self.bias, scheme)  # type: ignore


def check_operands(x: Tensor, weight: Tensor, scheme: PrecisionScheme) -> None:
    """Raise a `ConfigError` unless the tensors fit each other and the scheme."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ConfigError(f"input: got {getattr(x, 'dtype', type(x).__name__)}, expected a floating tensor")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ConfigError(f"input: got shape {tuple(x.shape)}, expected (..., {weight.shape[1]})")
    if x.dtype != weight.dtype and not autocasts(x):
        raise ConfigError(f"input: got {x.dtype}, expected the weight's {weight.dtype} outside of autocast")
    check_weight(weight, scheme)


def check_weight(weight: Tensor, scheme: PrecisionScheme) -> None:
    """Raise a `ConfigError` unless the scheme can hold the weight."""
    vector = scheme.quantizer("vector")
    if not weight.is_floating_point():
        raise ConfigError(f"weight: got {weight.dtype}, expected a floating dtype")
    if vector is not None and weight.dtype == torch.float16 and vector.format.exp_bits > 5:
        raise ConfigError(
            f"weight: got float16 with vector={vector.format.name!r}, whose range it lacks, expected vector=None"
        )


def _output_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    wide = torch.float64 in (x.dtype, weight.dtype)  # which autocast leaves alone
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) and not wide else x.dtype


def autocasts(x: Tensor) -> bool:
    """Say whether autocast is on where x is."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # which knows every device but that one


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products have the dtype of their operands."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def round_to(x: Tensor, q: Quantizer | None) -> Tensor:
    """Round to an element-wise format, at no cost where the dtype is that format already."""
    return x if keeps(x, q) else fake_quantize(x, q)  # type: ignore[arg-type]


def keeps(x: Tensor, q: Quantizer | None) -> bool:
    """Say whether rounding x to an element-wise format cannot change it."""
    return q is None or (q.format.name == "bfloat16" and x.dtype == torch.bfloat16)


def operands(a: Tensor, qa: Quantizer | None, b: Tensor, qb: Quantizer | None) -> tuple[Tensor, Tensor]:
    """Return q(a) and q(b) in the dtype in which `multiply` loses nothing of them.

    The one place where that is chosen. Values of MX formats are exact in bfloat16 (magnitudes near 2^-127 aside), so a
    GPU multiplies them there and accumulates in float32: exact up to the order of summation.
    """
    dtype = torch.float32
    if torch.float64 in (a.dtype, b.dtype):
        dtype = torch.float64
    elif a.is_cuda and _is_narrow(a, qa) and _is_narrow(b, qb):
        dtype = torch.bfloat16
    return _operand(a, qa, dtype), _operand(b, qb, dtype)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, (..., m, k) times (..., k, n) with equal leading axes, in float32, or float64 for such."""
    if a.dtype != torch.bfloat16:
        return torch.matmul(a, b)
    if a.ndim == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    y = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return y.reshape(*a.shape[:-1], b.shape[-1])


def _is_narrow(x: Tensor, q: Quantizer | None) -> bool:
    """Say whether what `q` makes of x is exact in bfloat16."""
    if q is None:
        return x.dtype == torch.bfloat16
    return q.scale_kind in ("e8m0", "none") and q.format.man_bits <= 7


def _operand(x: Tensor, q: Quantizer | None, dtype: torch.dtype) -> Tensor:
    """Return q(x) in `dtype`, quantised where nothing is lost: float16 cannot hold all of it, nor bfloat16 NVFP4."""
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and dtype != torch.bfloat16):
        x = x.float()
    return (x if q is None else fake_quantize(x, q)).to(dtype)


class _Linear(torch.autograd.Function):
    """The products of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scheme: PrecisionScheme, dtype: torch.dtype
    ) -> Tensor:
        ctx.scheme, ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = scheme, x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        vector = scheme.quantizer("vector")
        with without_autocast(x):
            xq, wq = operands(
                round_to(_tokens(x), vector),
                scheme.quantizer("a_fwd"),
                round_to(weight, vector),
                scheme.quantizer("w_fwd"),
            )
            y = round_to(multiply(xq, wq.t()), vector)
            if bias is not None:
                y = round_to(y + round_to(bias.to(y.dtype), vector), vector)
        y = y.to(dtype)
        # Not a view: FSDP2 and in-place users of the output want none, as from nn.Linear.
        return y if x.ndim == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        scheme: PrecisionScheme = ctx.scheme
        quantize = scheme.quantize_backward
        vector, g_dx, w_bwd, g_dw, a_bwd = (
            scheme.quantizer(role) if quantize else None for role in ("vector", "g_dx", "w_bwd", "g_dw", "a_bwd")
        )
        dx = dw = db = None
        with without_autocast(g):
            g = round_to(g, vector)
            by_token = scheme.dw_axis == "tokens" or g.ndim < 3
            rows = columns = None
            if weight is not None and x is not None and by_token and not scheme.hadamard and not g.is_cuda:
                rows, columns = _both_ways(_tokens(g), g_dx, g_dw)
            if weight is not None:
                g_rows = (_tokens(g), g_dx) if rows is None else (rows, None)
                gq, wq = operands(*g_rows, round_to(weight, vector), w_bwd)
                dx = round_to(multiply(gq, wq), vector).to(ctx.x_dtype).reshape(ctx.x_shape)
            if x is not None:
                x = round_to(x, vector)
                g_blocks, x_blocks = (_tokens(g), _tokens(x)) if by_token else (g, x)
                if quantize and scheme.hadamard:
                    g_blocks, x_blocks = hadamard_rotate(_wide(g_blocks)), hadamard_rotate(_wide(x_blocks))
                g_columns = (g_blocks, g_dw) if columns is None else (columns, None)
                gq, xq = operands(*g_columns, x_blocks, a_bwd)
                dw = round_to(multiply(_tokens(gq).t(), _tokens(xq)), vector).to(ctx.weight_dtype)
            if ctx.needs_input_grad[2]:
                db = round_to(_wide(_tokens(g)).sum(0), vector).to(ctx.bias_dtype)
        return dx, dw, db, None, None


def _both_ways(g: Tensor, rows: Quantizer | None, columns: Quantizer | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a matrix quantised along both axes in one pass over it, or nothing where there is no such pass."""
    done = None if rows is None or columns is None else kernels.cast_both(g, rows, columns)
    return (None, None) if done is None else done


def _tokens(x: Tensor) -> Tensor:
    """Return x (..., channels) as (tokens, channels)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
