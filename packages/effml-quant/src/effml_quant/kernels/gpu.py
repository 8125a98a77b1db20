"""Casts on a GPU in one pass over memory, through Triton, equal bit by bit to the plain version.

A program takes a tile of whole blocks: side by side in memory (`inner` = 1) or across it. What bounds it is memory:
a bfloat16 fake quantisation moves 4 bytes per element. Unmeasured: no GPU was at hand when this was written; the
numerics were checked with Triton's interpreter, and tests marked `gpu` repeat that on a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effml_quant.blocks import Blocks
from effml_quant.kernels.lines import Lines
from effml_quant.quantizer import Quantizer
from effml_quant.rounding import ROUNDINGS
from effml_quant.scales import block_scale, carry, tensor_scale

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU wheels of torch come without it
    triton = None

__all__ = ["cast", "cast_both", "codes_of", "is_available"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TILE = 4096  # elements of one program
_LONGEST = 8192  # elements of a block that one program reduces


def is_available() -> bool:
    """Say whether Triton is installed."""
    return triton is not None


if triton is not None:

    @triton.jit
    def _mix(x):  # type: ignore[no-untyped-def]
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _cast_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        out_ptr,
        encode_ptr,
        decode_ptr,
        stored_ptr,
        seed_ptr,
        length,
        inner,
        count,
        block,
        total,
        largest,
        bound,
        min_normal,
        per_spacing,
        MAN_BITS: tl.constexpr,
        FLOOR_BITS: tl.constexpr,
        EMAX: tl.constexpr,
        STEP: tl.constexpr,
        SCALE: tl.constexpr,  # 0: power of two, 1: from the largest, 2: given, multiply, 3: given, divide
        GIVEN_STRIDE: tl.constexpr,
        ROUNDING: tl.constexpr,
        OUTPUT: tl.constexpr,  # 0: value, 1: code, 2: two codes a byte
        STORE_SCALE: tl.constexpr,
        CODE_SHIFT: tl.constexpr,
        CODE_MAN_BITS: tl.constexpr,
        CODE_BITS: tl.constexpr,
        TOGETHER: tl.constexpr,  # blocks lie together: inner is 1
        BLOCKS: tl.constexpr,  # blocks of a tile
        SPAN: tl.constexpr,  # power of two, at least `block`
    ):
        # Tile (BLOCKS, SPAN) where blocks lie together, (SPAN, BLOCKS) where they lie across.
        pid = tl.program_id(0).to(tl.int64)
        one = tl.arange(0, BLOCKS)
        span = tl.arange(0, SPAN)
        if TOGETHER:
            index = pid * BLOCKS + one
            alive = index < total
            line = index // count
            first = index % count * block
            at = (line * length + first)[:, None] + span[None, :]
            inside = (span[None, :] < block) & ((first[:, None] + span[None, :]) < length) & alive[:, None]
        else:
            chunks = (inner + BLOCKS - 1) // BLOCKS
            line = pid // chunks
            lane = pid % chunks * BLOCKS + one
            first = line % count * block
            alive = lane < inner
            index = line * inner + lane
            at = ((line // count * length + first) + span)[:, None] * inner + lane[None, :]
            inside = (span[:, None] < block) & ((first + span[:, None]) < length) & alive[None, :]
        AXIS: tl.constexpr = 1 if TOGETHER else 0

        wide = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = wide.to(tl.int32, bitcast=True)
        a_bits = u & 0x7FFFFFFF
        x = a_bits.to(tl.float32, bitcast=True)
        if SCALE >= 2:
            decode = tl.load(decode_ptr + index * GIVEN_STRIDE, mask=alive, other=1.0)
            encode = decode
            if SCALE == 2:
                encode = tl.load(encode_ptr + index * GIVEN_STRIDE, mask=alive, other=1.0)
        else:
            top = tl.max(a_bits, axis=AXIS)  # of bits: NaN is the largest
            bad = top >= 0x7F800000
            amax = top.to(tl.float32, bitcast=True)
            if SCALE == 0:
                subnormal = top < 0x00800000
                scaled = (amax * 16777216.0).to(tl.int32, bitcast=True)
                a = tl.where(subnormal, scaled, tl.where(bad, 0x3F800000, top))
                e = ((a + STEP) >> 23) - tl.where(subnormal, 24, 0) - 127 - EMAX
                e = tl.where(top == 0, -127, tl.minimum(tl.maximum(e, -127), 127))
                decode = tl.where(e > -127, (e + 127) << 23, 1 << 22).to(tl.float32, bitcast=True)
                encode = tl.where(e < 127, (127 - e) << 23, 1 << 22).to(tl.float32, bitcast=True)
                if STORE_SCALE:
                    tl.store(stored_ptr + index, tl.where(bad, 255, e + 127).to(tl.uint8), mask=alive)
            else:
                decode = tl.div_rn(amax, largest)
                decode = tl.where(decode == 0.0, 1.0, decode)
                encode = decode
                if STORE_SCALE:
                    tl.store(stored_ptr + index, tl.where(bad, float("nan"), decode), mask=alive)
            decode = tl.where(bad, float("nan"), decode)
        encode = tl.expand_dims(encode, AXIS)
        decode = tl.expand_dims(decode, AXIS)

        if SCALE == 1 or SCALE == 3:
            z = tl.div_rn(x, decode + tl.zeros_like(x))
        else:
            z = x * encode
        power = tl.maximum(z.to(tl.int32, bitcast=True) & 0x7F800000, FLOOR_BITS)
        if ROUNDING == 0:
            magic = (power + ((23 - MAN_BITS) << 23)).to(tl.float32, bitcast=True)
            p = (z + magic) - magic
        else:
            inverse = (((127 + MAN_BITS) << 23) + ((127 << 23) - power)).to(tl.float32, bitcast=True)
            spacing = (power - (MAN_BITS << 23)).to(tl.float32, bitcast=True)
            t = z * inverse
            low = tl.floor(t)
            if ROUNDING == 1:
                low += tl.where(t - low >= 0.5, 1.0, 0.0)
            if ROUNDING == 3:
                seed = tl.load(seed_ptr)
                h = _mix((at.to(tl.int32) ^ seed.to(tl.int32)).to(tl.uint32, bitcast=True))
                high = ((seed >> 32).to(tl.int32) ^ (at >> 32).to(tl.int32)).to(tl.uint32, bitcast=True)
                h = _mix(h ^ high)
                noise = (h >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
                low += tl.where(noise < t - low, 1.0, 0.0)
            p = low * spacing
        p = tl.where(p < largest, p, largest)
        if OUTPUT == 0:
            value = p * decode
            value = tl.where(value > bound, bound, value)
            bits = value.to(tl.int32, bitcast=True) | (u & -0x80000000)
            tl.store(out_ptr + at, bits.to(tl.float32, bitcast=True).to(out_ptr.dtype.element_ty), mask=inside)
        else:
            small = (p * per_spacing).to(tl.int32)
            negative = u < 0
            if CODE_SHIFT == 0:
                code = tl.where(negative, -small, small)
            else:
                normal = (p.to(tl.int32, bitcast=True) >> (23 - CODE_MAN_BITS)) - CODE_SHIFT
                code = tl.where(p >= min_normal, normal, small) | tl.where(negative, 1 << (CODE_BITS - 1), 0)
            code = tl.where(decode == decode, code, 0)
            if OUTPUT == 1:
                tl.store(out_ptr + at, code.to(tl.uint8), mask=inside)
            else:
                pairs = tl.reshape(code & 15, (BLOCKS, SPAN // 2, 2))
                even, odd = tl.split(pairs)
                half = tl.arange(0, SPAN // 2)
                where = (line * length + first)[:, None] // 2 + half[None, :]
                here = (2 * half[None, :] < block) & ((first[:, None] + 2 * half[None, :]) < length) & alive[:, None]
                tl.store(out_ptr + where, (even | (odd << 4)).to(tl.uint8), mask=here)


def _serves(x: Tensor, q: Quantizer) -> bool:
    if triton is None or type(x) not in (Tensor, torch.nn.Parameter) or x.dtype not in _DTYPES or not x.numel():
        return False
    if not isinstance(q.block, int | str) or q.format.lowest != -q.format.max or q.scale_kind == "none":
        return False
    if q.scale_kind == "float32" and q.recipe not in (None, "symmetric"):
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # a tensor of functorch or of a tracer has no memory of its own
        return False
    return True


def cast(
    x: Tensor,
    q: Quantizer,
    seed: Tensor | None = None,
    global_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Return what `plain_cast` returns, in `out` or fresh memory, or None if it must do this one."""
    if not _serves(x, q):
        return None
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch(x.detach().contiguous(), q, seed, global_scale, out, 0)
    return out


def cast_both(x: Tensor, rows: Quantizer, columns: Quantizer) -> tuple[Tensor, Tensor] | None:
    """Return a matrix cast along its last and along its first axis; the second read is served by the cache."""
    along, across = cast(x, rows), cast(x, columns)
    return None if along is None or across is None else (along, across)


def codes_of(
    x: Tensor, q: Quantizer, seed: Tensor | None = None, global_scale: Tensor | None = None, *, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return codes (uint8 or int8; if `packed`, flat, two a byte), scales and the tensor's scale; or None."""
    if not _serves(x, q):
        return None
    lines, bits = Lines.of(tuple(x.shape), q), q.format.elem_bits
    if packed and (bits != 4 or lines.inner != 1 or lines.length % 2 or lines.block % 2):
        return None
    codes = torch.empty(x.numel() * (4 if packed else 8) // 8, dtype=torch.uint8, device=x.device)
    stored, total = _launch(x.detach().contiguous(), q, seed, global_scale, codes, 2 if packed else 1)
    if not packed:
        codes = codes.view(torch.int8 if q.format.is_integer else torch.uint8).view(x.shape)
    return codes, stored.reshape(Blocks.cut(tuple(x.shape), q.axis, q.block).scales), total


def _launch(
    x: Tensor, q: Quantizer, seed: Tensor | None, global_scale: Tensor | None, out: Tensor, output: int
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel over a contiguous tensor; return the stored scales, flat, and the tensor's scale."""
    fmt, lines = q.format, Lines.of(tuple(x.shape), q)
    kind, stored, spare = q.scale_kind, None, 2 if fmt.is_integer else 0
    encode = decode = x
    mode, stride = {"e8m0": 0, "float32": 1}.get(kind, 2), 1
    if q.block == "tensor" or kind == "e4m3" or lines.block > _LONGEST:
        amax = _amax(x, q, lines)
        if kind == "e4m3" and global_scale is None and q.recipe != "torchao":
            global_scale = tensor_scale(torch.where(amax.isfinite(), amax, 0.0).amax(), q)
        scale = block_scale(amax, q, global_scale)
        stored, decode = scale.stored, scale.decode.contiguous()
        mode = 3 if scale.encode is None else 2
        encode = decode if scale.encode is None else scale.encode.contiguous()
        stride = int(q.block != "tensor")
        if lines.block > _LONGEST:  # a row with one scale: runs of it, each with its copy
            runs = -(-lines.length // _TILE)
            lines = lines._replace(block=_TILE)
            encode, decode = (t.reshape(-1, 1).expand(-1, runs).contiguous() for t in (encode, decode))
    elif kind == "e8m0":
        stored = torch.empty(lines.blocks, dtype=torch.uint8, device=x.device)
    else:
        stored = torch.empty(lines.blocks, dtype=torch.float32, device=x.device)
    span = max(2, 1 << (lines.block - 1).bit_length())
    per_tile = max(1, _TILE // span)
    together = lines.inner == 1
    per_tile = per_tile if together else min(per_tile, 1 << (lines.inner - 1).bit_length())
    rows = lines.outer * -(-lines.length // lines.block)
    grid = -(-rows // per_tile) if together else rows * -(-lines.inner // per_tile)
    options: dict[str, Any] = {} if not x.is_cuda else {"enable_fp_fusion": False, "num_warps": 4}
    _cast_kernel[(grid,)](
        x,
        out,
        encode,
        decode,
        stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored,
        x if seed is None else seed,
        lines.length,
        lines.inner,
        -(-lines.length // lines.block),
        lines.block,
        rows,
        fmt.max,
        torch.finfo(out.dtype).max if out.is_floating_point() else math.inf,
        fmt.min_normal,
        1 / fmt.spacing,
        MAN_BITS=fmt.man_bits + spare,
        FLOOR_BITS=(fmt.emin + spare + 127) << 23,
        EMAX=fmt.emax,
        STEP=carry(q, 23),
        SCALE=mode,
        GIVEN_STRIDE=stride,
        ROUNDING=ROUNDINGS.index(q.rounding),
        OUTPUT=output,
        STORE_SCALE=output > 0 and mode < 2,
        CODE_SHIFT=0 if fmt.is_integer else (127 - fmt.bias) << fmt.man_bits,
        CODE_MAN_BITS=fmt.man_bits,
        CODE_BITS=fmt.elem_bits,
        TOGETHER=together,
        BLOCKS=per_tile,
        SPAN=span,
        **options,
    )
    return (stored.view(torch.float8_e8m0fnu) if kind == "e8m0" and mode == 0 else stored), global_scale


def _amax(x: Tensor, q: Quantizer, lines: Lines) -> Tensor:
    """Return the largest magnitude of each block, float32, flat."""
    if q.block == "tensor":
        return x.abs().amax().float().reshape(1)
    blocks = Blocks.cut(tuple(x.shape), q.axis, q.block)
    return blocks.split(x).abs().amax(blocks.dims).float().reshape(-1)
