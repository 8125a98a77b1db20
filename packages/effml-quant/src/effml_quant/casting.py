"""Quantise: onto a format's grid and back in float (`fake_quantize`), or to codes and scales (`quantize_blocks`).

    a = max |x| per block;  scale from a;  z = |x| / scale;  p = min(round(z), largest);  result = sign(x) p scale

Both are the same arithmetic, so `fake_quantize(x) == quantize(x).dequantize()` bit for bit, but that an integer's zero
has no sign. float16 and bfloat16 are computed in float32, float64 in itself. This module is the plain version: any axis
and length, autograd, vmap and `torch.compile`. What is large and lies plainly in memory takes one pass over it in
`effml_quant.kernels`.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from effml_shared.errors import ConfigError, NonFiniteError
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from effml_quant import kernels
from effml_quant.blocks import Blocks
from effml_quant.formats import Format
from effml_quant.quantizer import Quantizer
from effml_quant.rounding import decode, encode, round_magnitude, uniform
from effml_quant.scales import BlockScale, block_scale, decode_factor, tensor_scale

__all__ = ["Codes", "Grid", "dequantize_blocks", "fake_quantize", "plain_cast", "quantize_blocks", "to_grid"]

_log = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Grid(NamedTuple):
    """A tensor on its grid, in the view of its `blocks`.

    Attributes:
        p: magnitudes in units of the scale, each a value of the format.
        negative: where the tensor is below zero (or -0).
        scale: of each block, shaped to broadcast over `p`.
        z: magnitudes before rounding.
    """

    p: Tensor
    negative: Tensor
    scale: BlockScale
    z: Tensor
    blocks: Blocks
    global_scale: Tensor | None


def check_input(x: Any, q: Quantizer) -> None:
    """Raise a `ConfigError` unless x is a dense floating tensor that q can cut; NonFiniteError if q says so."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or not _is_dense(x):
        got = f"{x.dtype} ({x.layout})" if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"x: got {got}, expected a dense float16, bfloat16, float32 or float64 tensor")
    Blocks.cut(tuple(x.shape), q.axis, q.block)
    if q.nonfinite == "raise" and not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).sum())
        raise NonFiniteError(f"x: got {bad} of {x.numel()} values NaN or infinite; nonfinite='nan_block' lets them by")


def _is_dense(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or x.layout == torch.strided  # which a traced backward pass cannot be asked


def check_global_scale(global_scale: Any, q: Quantizer, device: torch.device) -> Tensor | None:
    """Return a user's scale of the tensor as a float32 scalar."""
    if global_scale is None:
        return None
    if q.scale_kind != "e4m3":
        raise ConfigError(f"global_scale: got one for {q.format.name}, expected None: only nvfp4 has it")
    if not isinstance(global_scale, Tensor | float | int):
        raise ConfigError(f"global_scale: got {global_scale!r}, expected a number or a tensor of one")
    value = torch.as_tensor(global_scale, dtype=torch.float32, device=device)
    if value.numel() != 1 or not (torch.compiler.is_compiling() or 0 < float(value) < float("inf")):
        raise ConfigError(f"global_scale: got {global_scale}, expected one positive finite number")
    return value.reshape(())


def draw_seed(q: Quantizer, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    """Return the seed of this call's stochastic rounding, drawn from the generator or the global one."""
    if q.rounding != "stochastic":
        return None
    if generator is None and torch.are_deterministic_algorithms_enabled():
        raise ConfigError("generator: got None under deterministic algorithms, expected a torch.Generator")
    if q.scale_kind == "e8m0" and q.scale_rule in ("floor", "even") and not torch.compiler.is_compiling():
        _say_biased(q.scale_rule)
    where = device if generator is None else generator.device
    return torch.randint(2**62, (), generator=generator, device=where).to(device)


@cache
def _say_biased(rule: str) -> None:
    """Say once that values above the largest one saturate, so that rounding up as often as due is not unbiased."""
    _log.warning("stochastic rounding is biased under scale_rule=%r, where values saturate; use 'rceil'", rule)


def to_grid(
    x: Tensor,
    q: Quantizer,
    *,
    seed: Tensor | None = None,
    global_scale: Tensor | None = None,
    noise: Tensor | None = None,
) -> Grid:
    """Scale and round. `seed` or `noise` (like x, in [0, 1)) is needed for stochastic rounding."""
    blocks = Blocks.cut(tuple(x.shape), q.axis, q.block)
    wide = x if x.dtype == torch.float64 else x.float()
    view = blocks.split(wide)
    magnitude = view.abs()
    minmax = None
    if view.numel() == 0:
        amax = view.new_zeros(blocks.broadcast)
        minmax = (amax, amax)
    elif q.scale_kind == "none":
        amax = view.new_ones([1] * view.ndim)
    else:
        amax = magnitude.amax(blocks.dims, keepdim=True)
        if q.recipe == "asymmetric":
            minmax = (view.amin(blocks.dims, keepdim=True), view.amax(blocks.dims, keepdim=True))
    if q.scale_kind == "e4m3" and global_scale is None and q.recipe != "torchao" and x.numel():
        global_scale = tensor_scale(torch.where(amax.isfinite(), amax, 0.0).amax(), q)
    scale = block_scale(amax, q, global_scale, minmax)
    z = magnitude / scale.decode if scale.encode is None else magnitude * scale.encode
    if q.rounding == "stochastic" and noise is None:
        if seed is None:
            raise ConfigError("seed: got None, expected one for stochastic rounding")
        noise = uniform(tuple(x.shape), seed, device=x.device)
    noise = None if noise is None else blocks.split(noise)
    negative = view.signbit()
    p = round_magnitude(z, q.format, q.rounding, noise)
    if scale.low is scale.high or (isinstance(scale.low, float) and scale.low == scale.high):
        p = p.clamp(max=scale.high)
    else:
        p = p.minimum(torch.where(negative, scale.low, scale.high))
    return Grid(p, negative, scale, z, blocks, global_scale)


class Codes(NamedTuple):
    """A quantised tensor, one code per element.

    Attributes:
        codes: shaped like the tensor, `Format.code_dtype` (uint8 for asymmetric integers).
        scales: one per block, shaped like the tensor with each cut axis counting blocks, as `BlockScale.stored`.
        zero_points: like scales, uint8; asymmetric integers only.
        global_scale: float32 scalar; NVFP4 only.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    global_scale: Tensor | None


def plain_cast(x: Tensor, q: Quantizer, seed: Tensor | None = None, global_scale: Tensor | None = None) -> Tensor:
    """Return x on its grid, in its dtype: the plain twin of every kernel."""
    if x.numel() == 0:
        return x.clone()
    if q.scale_kind == "none" and q.rounding == "rne" and x.dtype == torch.bfloat16:
        return x.clone()
    grid = to_grid(x, q, seed=seed, global_scale=global_scale)
    bound = torch.finfo(x.dtype).max
    value = (grid.p * grid.scale.decode).clamp(max=bound)
    value = torch.where(grid.negative, -value, value)
    if q.scale_kind == "none":  # no block to poison
        view = grid.blocks.split(x).to(value.dtype)
        value = torch.where(view.isfinite(), value, view)
    return grid.blocks.join(value).to(x.dtype)


def quantize_blocks(x: Tensor, q: Quantizer, seed: Tensor | None = None, global_scale: Tensor | None = None) -> Codes:
    """Return codes and scales of a tensor.

    Raises:
        ConfigError: the format has no scale, so that its values are their own codes (bfloat16).
    """
    if q.scale_kind == "none":
        raise ConfigError(f"format: got {q.format.name}, expected one with a scale; use x.to(torch.bfloat16)")
    if q.format.elem_bits > 8:
        raise ConfigError(f"format: got {q.format.name} of {q.format.elem_bits} bits, expected codes of at most 8")
    grid = to_grid(x, q, seed=seed, global_scale=global_scale)
    blocks, scale = grid.blocks, grid.scale
    zero_points = None
    if scale.zero_point is None:
        bad = ~scale.decode.isfinite()
        codes = encode(torch.where(bad, 0.0, grid.p), grid.negative & ~bad, q.format)
    else:
        codes = (torch.where(grid.negative, -grid.p, grid.p) + scale.zero_point).nan_to_num(0).to(torch.uint8)
        zero_points = scale.zero_point.reshape(blocks.scales).to(torch.uint8)
    codes = blocks.join(codes)
    if codes.dtype == torch.uint8 and q.format.code_dtype.is_floating_point:
        codes = codes.view(q.format.code_dtype)
    return Codes(codes, scale.stored.reshape(blocks.scales), zero_points, grid.global_scale)


def dequantize_blocks(codes: Codes, q: Quantizer, dtype: torch.dtype) -> Tensor:
    """Return the tensor that codes and scales mean, saturated to the range of dtype."""
    wide = torch.float64 if torch.float64 in (dtype, codes.scales.dtype) else torch.float32
    if codes.codes.numel() == 0:
        return torch.zeros(codes.codes.shape, dtype=dtype, device=codes.codes.device)
    blocks = Blocks.cut(tuple(codes.codes.shape), q.axis, q.block)
    raw = codes.codes
    if codes.zero_points is None:
        values = blocks.split(decode(raw, q.format))
    else:
        zero = codes.zero_points.reshape(blocks.broadcast).float()
        values = blocks.split(raw.float()) - zero
    factor = decode_factor(codes.scales, q, codes.global_scale).reshape(blocks.broadcast)
    bound = torch.finfo(dtype).max
    return blocks.join((values.to(wide) * factor).clamp(-bound, bound)).to(dtype)


@torch.library.custom_op("effml_quant::cast", mutates_args=())
def _opaque_cast(x: Tensor, spec: str, seed: Tensor | None, global_scale: Tensor | None) -> Tensor:
    """Cast inside a compiled graph on the CPU: the C kernel is many times faster than what the compiler makes."""
    q = Quantizer.from_spec(spec)
    out = kernels.cast(x, q, seed, global_scale)
    return plain_cast(x, q, seed, global_scale) if out is None else out


@_opaque_cast.register_fake
def _(x: Tensor, spec: str, seed: Tensor | None, global_scale: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_opaque_cast.register_vmap
def _(info: Any, in_dims: Any, *arguments: Any) -> Any:
    return torch.stack([_opaque_cast(*_sample(arguments, in_dims, i)) for i in range(info.batch_size)]), 0


def _sample(arguments: tuple[Any, ...], dims: tuple[int | None, ...], i: int) -> list[Any]:
    """Return the arguments of one of the calls that vmap makes at once."""
    return [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, dims, strict=True)]


def _cast(x: Tensor, q: Quantizer, seed: Tensor | None, global_scale: Tensor | None) -> Tensor:
    """Take the fastest way: a compiler for GPUs sees the plain version and fuses it with what surrounds it."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return _opaque_cast(x, q.spec, seed, global_scale)
    out = kernels.cast(x, q, seed, global_scale)
    return plain_cast(x, q, seed, global_scale) if out is None else out


class _FakeQuantize(torch.autograd.Function):
    """Forward: the cast. Backward: the identity, or nothing where the cast saturated."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        """Cast one sample after the other: blocks, seeds and tensor scales are each sample's own."""
        calls = (_sample(arguments, in_dims, i) for i in range(info.batch_size))
        outs, masks = zip(*(_FakeQuantize.apply(*call) for call in calls), strict=True)
        inside = None if masks[0] is None else torch.stack(masks)
        return (torch.stack(outs), inside), (0, None if inside is None else 0)

    @staticmethod
    def forward(x: Tensor, seed: Tensor | None, global_scale: Tensor | None, q: Quantizer, clipped: bool) -> Any:
        out = _cast(x, q, seed, global_scale)
        if not clipped:
            return out, None
        grid = to_grid(x, q, seed=seed, global_scale=global_scale)
        high = torch.where(grid.negative, grid.scale.low, grid.scale.high)
        return out, grid.blocks.join(grid.z <= high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.clipped = inputs[4]
        if ctx.clipped:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        if ctx.clipped:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None, None, None


def fake_quantize(
    x: Tensor,
    fmt: str | Format | Quantizer,
    *,
    generator: torch.Generator | None = None,
    global_scale: Tensor | float | None = None,
    pass_through: str = "all",
    out: Tensor | None = None,
    **fields: Any,
) -> Tensor:
    """Round a tensor to a format and return it in its own dtype; the gradient passes straight through.

    Args:
        x: any shape, float16, bfloat16, float32 or float64.
        fmt: a name such as `"mxfp4"`, a `Format`, or a `Quantizer`.
        generator: of stochastic rounding; None: torch's global one.
        global_scale: NVFP4's scale of the tensor; None: from the tensor (recipe `torchao`: none at all).
        pass_through: `"all"`, or `"clipped"`: no gradient where the value saturated.
        out: contiguous, like x; may be x itself. Fresh memory costs more than the cast; without gradient only.
        **fields: of `Quantizer`: axis, block_size, granularity, scale_rule, scale, rounding, nonfinite, recipe.

    Raises:
        ConfigError: an argument is unknown or does not fit the tensor.
        NonFiniteError: a value is NaN or infinite and `nonfinite="raise"`.

    >>> fake_quantize(torch.tensor([0.95, -0.3, 0.01]), "mxfp4").tolist()
    [0.75, -0.25, 0.0]
    """
    q = Quantizer.make(fmt, **fields)
    check_input(x, q)
    if pass_through not in ("all", "clipped"):
        raise ConfigError(f"pass_through: got {pass_through!r}, expected 'all' or 'clipped'")
    seed, total = draw_seed(q, generator, x.device), check_global_scale(global_scale, q, x.device)
    if out is not None:
        if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
            raise ConfigError(
                f"out: got {tuple(out.shape)} {out.dtype}, expected a contiguous {tuple(x.shape)} {x.dtype}"
            )
        if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
            raise ConfigError("out: got tensors that require gradients, expected torch.no_grad() around the call")
        done = kernels.cast(x, q, seed, total, out)
        return out if done is not None else out.copy_(plain_cast(x, q, seed, total))
    if pass_through == "all" and not _is_differentiated(x):
        done = kernels.cast(x, q, seed, total)
        if done is not None:  # which means a tensor with memory of its own, and none of functorch
            return done
    return _FakeQuantize.apply(x, seed, total, q, pass_through == "clipped")[0]


def _is_differentiated(x: Tensor) -> bool:
    return (torch.is_grad_enabled() and x.requires_grad) or unpack_dual(x).tangent is not None
