"""Tiles of attention on a GPU, forward and backward, through Triton: no logits or biases of a tile in memory.

    merge_tile: a program owns queries, loops over the tile's keys and updates (m, l, o) of its queries in place
    tile_cotangents: in one grid a program owns keys, loops over queries and adds to dK and dV; in a second grid a
        program owns queries, loops over keys and adds to dQ

What a program owns nobody else writes, so there are no atomics and two runs are equal bit by bit. ALiBi, padding,
documents and windows are computed from indices; rows are laid out as in `effml_arch.recurrent.attention_state`.
Operands are float32 (products in TF32 if `torch.backends.cuda.matmul` says so), bfloat16 or float16; state, sums and
cotangents are float32. Other inputs, float64 among them, are left to the plain version.

Cost per tile of Q query and K key rows: forward 4 Q K head_dim FLOPs, backward 14 (logits and <g, v> in both grids);
bytes: 2 K head_dim operands and Q (head_dim operands + 8 head_dim + 16) forward, keys again per block of queries.
Sources: the Recurrent Transformer, arXiv 2604.21215, for the tiles; FlashAttention-2, arXiv 2307.08691, for who owns
what. Unmeasured: no GPU was at hand when this was written. The numerics were checked with Triton's interpreter, which
tests marked `gpu` repeat on a device; compiled for compute capability 8.0 and 9.0, nothing to speak of is spilled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effml_arch.recurrent.attention_state import AttentionState, Geometry
from effml_arch.recurrent.pair_bias import PairBias
from effml_arch.recurrent.schedule import Tile

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU wheels of torch come without it
    triton = None

__all__ = ["merge_tile", "serves", "tile_cotangents"]

_OPERAND = 16384  # bytes of a block of rows, half as many without tensor cores: what fits registers and shared memory
_WIDEST = 256  # channels of a head


def serves(q: Tensor) -> bool:
    """Return whether the kernels take queries (.., rows, head_dim) like these, and keys and values of their type."""
    known = q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return triton is not None and q.is_cuda and type(q) is Tensor and known and q.shape[-1] <= _WIDEST


if triton is not None:

    @triton.jit
    def _logits(  # type: ignore[no-untyped-def]
        q,
        k,
        rows,  # of queries, counted from the first of all, heads of a group next to each other
        keys,
        end_row,
        end_key,
        query_slot,
        key_slot,
        valid_ptr,
        valid_stride,
        document_ptr,
        document_stride,
        pair,
        kv_heads,
        window,
        GROUP: tl.constexpr,
        ALIBI: tl.constexpr,  # query heads, 0 without
        PRECISION: tl.constexpr,
    ):
        """Return logits (rows, keys) with their bias, -inf where the key is hidden or either does not exist."""
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        batch = pair // kv_heads
        q_at = query_slot + rows // GROUP
        k_at = key_slot + keys
        distance = q_at[:, None] - k_at[None, :]
        if ALIBI > 0:
            head = pair % kv_heads * GROUP + rows % GROUP + 1
            slope = tl.exp2(-8.0 * head.to(tl.float32) / ALIBI)
            s -= slope[:, None] * distance.to(tl.float32)
        seen = (rows < end_row)[:, None] & (keys < end_key)[None, :] & (distance < window)
        if valid_ptr is not None:
            seen &= tl.load(valid_ptr + batch * valid_stride + k_at, mask=keys < end_key, other=0)[None, :] != 0
        if document_ptr is not None:
            own = tl.load(document_ptr + batch * document_stride + q_at, mask=rows < end_row, other=0)
            theirs = tl.load(document_ptr + batch * document_stride + k_at, mask=keys < end_key, other=0)
            seen &= own[:, None] == theirs[None, :]
        return tl.where(seen, s, float("-inf"))

    @triton.jit
    def _rows(ptr, index, end, row_stride, dim, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
        """Return rows (index, DIM) of a matrix with `dim` columns, 0 where there are none."""
        channel = tl.arange(0, DIM)
        inside = (index < end)[:, None] & (channel < dim)[None, :]
        return tl.load(ptr + index.to(tl.int64)[:, None] * row_stride + channel[None, :], mask=inside, other=0.0)

    @triton.jit
    def _add(ptr, index, end, row_stride, dim, x, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
        """Add x (index, DIM) to rows of a matrix with `dim` columns."""
        channel = tl.arange(0, DIM)
        inside = (index < end)[:, None] & (channel < dim)[None, :]
        at = ptr + index.to(tl.int64)[:, None] * row_stride + channel[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)

    _RUNNING = ["first_row", "end_row", "first_key", "end_key", "query_slot", "key_slot", "window"]

    @triton.jit(do_not_specialize=_RUNNING)
    def _merge_kernel(  # type: ignore[no-untyped-def]
        q_ptr,
        k_ptr,
        v_ptr,
        maximum_ptr,
        denominator_ptr,
        numerator_ptr,
        valid_ptr,
        document_ptr,
        q_pair,  # strides: of a sequence's key head, then of a row; of the state, rows lie without gaps
        q_row,
        k_pair,
        k_row,
        v_pair,
        v_row,
        state_pair,
        valid_stride,
        document_stride,
        dim,
        kv_heads,
        first_row,
        end_row,
        first_key,
        end_key,
        query_slot,
        key_slot,
        window,
        GROUP: tl.constexpr,
        ALIBI: tl.constexpr,
        PRECISION: tl.constexpr,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        pair = tl.program_id(1)
        far = pair.to(tl.int64)
        rows = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        q = _rows(q_ptr + far * q_pair, rows, end_row, q_row, dim, DIM)
        at = far * state_pair + rows
        m = tl.load(maximum_ptr + at, mask=rows < end_row, other=0.0)
        l = tl.load(denominator_ptr + at, mask=rows < end_row, other=1.0)  # noqa: E741
        o = _rows(numerator_ptr + far * state_pair * dim, rows, end_row, dim, dim, DIM)
        oldest = query_slot + (first_row + tl.program_id(0) * ROWS) // GROUP - window + 1 - key_slot
        start = tl.maximum(first_key, oldest)
        for key in range(start, end_key, KEYS):
            keys = key + tl.arange(0, KEYS)
            k = _rows(k_ptr + far * k_pair, keys, end_key, k_row, dim, DIM)
            v = _rows(v_ptr + far * v_pair, keys, end_key, v_row, dim, DIM)
            s = _logits(
                q,
                k,
                rows,
                keys,
                end_row,
                end_key,
                query_slot,
                key_slot,
                valid_ptr,
                valid_stride,
                document_ptr,
                document_stride,
                pair,
                kv_heads,
                window,
                GROUP,
                ALIBI,
                PRECISION,
            )
            larger = tl.maximum(m, tl.max(s, axis=1))
            decay = tl.exp2((m - larger) * 1.4426950408889634)
            p = tl.exp2((s - larger[:, None]) * 1.4426950408889634)
            l = l * decay + tl.sum(p, axis=1)  # noqa: E741
            o = o * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            m = larger
        tl.store(maximum_ptr + at, m, mask=rows < end_row)
        tl.store(denominator_ptr + at, l, mask=rows < end_row)
        channel = tl.arange(0, DIM)
        inside = (rows < end_row)[:, None] & (channel < dim)[None, :]
        tl.store(numerator_ptr + at[:, None] * dim + channel[None, :], o, mask=inside)

    @triton.jit(do_not_specialize=_RUNNING)
    def _cotangent_kernel(  # type: ignore[no-untyped-def]
        q_ptr,
        k_ptr,
        v_ptr,
        g_ptr,
        delta_ptr,
        lse_ptr,
        dq_ptr,
        dk_ptr,
        dv_ptr,
        valid_ptr,
        document_ptr,
        q_pair,
        q_row,
        k_pair,
        k_row,
        v_pair,
        v_row,
        g_pair,
        g_row,
        lse_pair,
        dq_pair,
        dk_pair,
        valid_stride,
        document_stride,
        dim,
        kv_heads,
        first_row,
        end_row,
        first_key,
        end_key,
        query_slot,
        key_slot,
        window,
        OF_KEYS: tl.constexpr,  # the program owns keys, else queries
        GROUP: tl.constexpr,
        ALIBI: tl.constexpr,
        PRECISION: tl.constexpr,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        pair = tl.program_id(1)
        far = pair.to(tl.int64)
        if OF_KEYS:
            own = first_key + tl.program_id(0) * KEYS
            start = first_row
            # The last of these keys is seen by queries less than a window later.
            stop = tl.minimum(end_row, (key_slot + own + KEYS - 1 + window - query_slot) * GROUP)
            dk = tl.zeros((KEYS, DIM), dtype=tl.float32)
            dv = tl.zeros((KEYS, DIM), dtype=tl.float32)
        else:
            own = first_row + tl.program_id(0) * ROWS
            start = tl.maximum(first_key, query_slot + own // GROUP - window + 1 - key_slot)
            stop = end_key
            dq = tl.zeros((ROWS, DIM), dtype=tl.float32)
        STEP: tl.constexpr = ROWS if OF_KEYS else KEYS
        rows = own + tl.arange(0, ROWS)
        keys = own + tl.arange(0, KEYS)
        for other in range(start, stop, STEP):
            if OF_KEYS:
                rows = other + tl.arange(0, ROWS)
            else:
                keys = other + tl.arange(0, KEYS)
            q = _rows(q_ptr + far * q_pair, rows, end_row, q_row, dim, DIM)
            k = _rows(k_ptr + far * k_pair, keys, end_key, k_row, dim, DIM)
            v = _rows(v_ptr + far * v_pair, keys, end_key, v_row, dim, DIM)
            g = _rows(g_ptr + far * g_pair, rows, end_row, g_row, dim, DIM).to(v.dtype)
            delta = tl.load(delta_ptr + far * g_pair + rows.to(tl.int64) * g_row, mask=rows < end_row, other=0.0)
            lse = tl.load(lse_ptr + far * lse_pair + rows, mask=rows < end_row, other=0.0)
            s = _logits(
                q,
                k,
                rows,
                keys,
                end_row,
                end_key,
                query_slot,
                key_slot,
                valid_ptr,
                valid_stride,
                document_ptr,
                document_stride,
                pair,
                kv_heads,
                window,
                GROUP,
                ALIBI,
                PRECISION,
            )
            p = tl.exp2((s - lse[:, None]) * 1.4426950408889634)
            ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) + delta[:, None])
            if OF_KEYS:
                dv += tl.dot(tl.trans(p).to(g.dtype), g, input_precision=PRECISION)
                dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision=PRECISION)
            else:
                dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        if OF_KEYS:
            _add(dk_ptr + far * dk_pair, keys, end_key, dim, dim, dk, DIM)
            _add(dv_ptr + far * dk_pair, keys, end_key, dim, dim, dv, DIM)
        else:
            _add(dq_ptr + far * dq_pair, rows, end_row, dim, dim, dq, DIM)


def merge_tile(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, tile: Tile, bias: PairBias, geometry: Geometry, past: bool
) -> None:
    """Do what `effml_arch.recurrent.attention_state.merge_tile` does; the state is float32 and without gaps."""
    q, k, v = _rows_in_memory(q), _rows_in_memory(k), _rows_in_memory(v)
    pairs, _, dim = q.shape
    options = _options(q, tile, bias, geometry, past)
    grid = (triton.cdiv((tile.q1 - tile.q0) * geometry.group, options["ROWS"]), pairs)
    _merge_kernel[grid](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        maximum_ptr=state.maximum,
        denominator_ptr=state.denominator,
        numerator_ptr=state.numerator,
        q_pair=q.stride(0),
        q_row=q.stride(1),
        k_pair=k.stride(0),
        k_row=k.stride(1),
        v_pair=v.stride(0),
        v_row=v.stride(1),
        state_pair=state.maximum.stride(0),
        dim=dim,
        kv_heads=pairs // geometry.batch,
        **options,
        **_launch(q, stages=2),
    )


def tile_cotangents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    tile: Tile,
    bias: PairBias,
    geometry: Geometry,
) -> None:
    """Add what the pairs of a tile contribute to dq (.., rows, dim) and to dk and dv (.., keys, dim).

    Args:
        q, k, v: (.., rows, dim) and (.., keys, dim), of one type.
        g: (.., rows, dim + 1), float32: the cotangents of attention and, last, minus their products with attention.
        lse: (.., rows, 1), float32.
        dq, dk, dv: float32 and without gaps.
        tile, bias, geometry: as in `merge_tile`; keys are never those of a cache.
    """
    q, k, v = _rows_in_memory(q), _rows_in_memory(k), _rows_in_memory(v)
    pairs, _, dim = q.shape
    options = _options(q, tile, bias, geometry, past=False)
    for of_keys in (True, False):
        owned, block = (tile.k1 - tile.k0, "KEYS") if of_keys else ((tile.q1 - tile.q0) * geometry.group, "ROWS")
        _cotangent_kernel[(triton.cdiv(owned, options[block]), pairs)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            g_ptr=g,
            delta_ptr=g[..., dim:],
            lse_ptr=lse,
            dq_ptr=dq,
            dk_ptr=dk,
            dv_ptr=dv,
            q_pair=q.stride(0),
            q_row=q.stride(1),
            k_pair=k.stride(0),
            k_row=k.stride(1),
            v_pair=v.stride(0),
            v_row=v.stride(1),
            g_pair=g.stride(0),
            g_row=g.stride(1),
            lse_pair=lse.stride(0),
            dq_pair=dq.stride(0),
            dk_pair=dk.stride(0),
            dim=dim,
            kv_heads=pairs // geometry.batch,
            OF_KEYS=of_keys,
            **options,
            **_launch(q, stages=1),
        )


def _rows_in_memory(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(q: Tensor, stages: int) -> dict[str, Any]:
    """Return how a device runs a program, in at most 96 KiB of shared memory."""
    warps = 4 if q.shape[-1] <= 64 else 8
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True} if q.is_cuda else {}


def _options(q: Tensor, tile: Tile, bias: PairBias, geometry: Geometry, past: bool) -> dict[str, Any]:
    """Return the arguments that both kernels share."""
    (_, _, dim), group, slots = q.shape, geometry.group, geometry.slot + tile.q1
    valid, documents = (None if t is None else _rows_in_memory(t) for t in (bias.key_valid, bias.doc_ids))
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    operand = _OPERAND if tf32 or q.itemsize < 4 else _OPERAND // 2
    wide = max(16, triton.next_power_of_2(dim))
    most = max(16, min(64, operand // (wide * q.element_size())))
    sizes = {"ROWS": (tile.q1 - tile.q0) * group, "KEYS": tile.k1 - tile.k0}
    return {
        "valid_ptr": valid,
        "valid_stride": 0 if valid is None else valid.stride(0) * (valid.shape[0] > 1),
        "document_ptr": documents,
        "document_stride": 0 if documents is None else documents.stride(0) * (documents.shape[0] > 1),
        "first_row": tile.q0 * group,
        "end_row": tile.q1 * group,
        "first_key": tile.k0,
        "end_key": tile.k1,
        "query_slot": geometry.slot,
        "key_slot": 0 if past else geometry.slot,
        "window": slots if bias.window is None else min(bias.window, slots),  # no distance is larger
        "GROUP": group,
        "ALIBI": bias.alibi_heads or 0,
        "PRECISION": "tf32" if tf32 else "ieee",
        "DIM": wide,
        **{name: min(most, max(16, triton.next_power_of_2(size))) for name, size in sizes.items()},
    }
