"""The sequential part of a recurrent layer in C, forward and backward; without a compiler, torch serves.

A position is some thirty products, norms and sums on `batch` rows: in float32, at batch 4 and width 64, about 6 us
forward and 10 us back, where as many calls of torch take 160 each way. `block.c` does a block of positions in one call,
and a tile of attention between blocks in another, with no logits in memory; what is parallel over positions stays with
torch. It is built at first use, once per type (float32, float64; see `effml_shared.native`), runs on one thread and
repeats bit by bit; with the eager path it agrees to rounding.

State: the layer's matrices and all keys and values once more, in panels as `block.c` reads them, and scratch. FLOPs are
those of `effml_arch.recurrent.tiled`, with heads filled up to a multiple of 16 channels (float64: 8).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from effml_shared.layers import ACTIVATIONS, LayerNorm, RMSNorm, alibi_bias
from effml_shared.native import library
from torch import Tensor, nn

from effml_arch.recurrent.attention_state import AttentionState, Geometry
from effml_arch.recurrent.folding import FoldedBlock
from effml_arch.recurrent.linearization import Linearization
from effml_arch.recurrent.pair_bias import PairBias
from effml_arch.recurrent.schedule import Tile

__all__ = ["NativeBackward", "NativeForward", "is_available", "serves"]

# On one thread this is faster than torch at any size measured (forward and backward of 64 positions: 3.5 times at batch
# 1 and width 64, 1.2 times at batch 64 and width 512). With more threads, torch serves above so many multiply-adds per
# position (about 0.1 ms here, less than its calls cost). In either case the sequence must be worth packing the weights:
# at most so many of them per position.
MAX_WORK, MAX_PACKED = 1 << 22, 1 << 19

_SOURCE = Path(__file__).with_name("block.c")
_PANEL, _CHUNK, _BATCH = 128, 128, 32  # bytes of a wide panel's row; keys and queries at once: as in block.c
_NORMS: dict[type[nn.Module], int] = {nn.Identity: 0, RMSNorm: 1, LayerNorm: 2}
_ACTIVATIONS = [ACTIVATIONS[name] for name in ("relu", "swiglu", "gelu", "gelu_tanh")]  # in the order of block.c


def _integers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


_LAYER = (
    *_integers("batch seq kv_heads group head_dim d_model d_ff slot window"),
    *_pointers("slopes q valid documents logits mixed narrow normed wide"),
)


class _Forward(ctypes.Structure):
    """As in block.c."""

    _fields_ = (
        *_LAYER,
        *_integers("source_norm mlp_norm key_norm activation gated"),
        *((name, ctypes.c_double) for name in ("source_eps", "mlp_eps", "key_eps", "write_mix")),
        *_pointers("out up down key_value up_bias down_bias x kept cos sin"),
        *_integers("cos_position cos_batch cos_head sin_position sin_batch sin_head"),
        *_pointers("maximum denominator numerator z heads keys values lse key_columns value_rows"),
    )


class _Backward(ctypes.Structure):
    """As in block.c."""

    _fields_ = (
        *_LAYER,
        *_integers("parts key_norm"),
        *_pointers("key_value down up out keys heads lse key_columns value_columns key_rows"),
        *_integers("first"),
        *_pointers("mlp_scale mlp_unit slope source_scale source_unit straight key_unit turned kept"),
        *_pointers("g dz dk dv dq d_logits q_rows g_rows sums"),
    )


class _Kernels:
    """The functions of block.c for one pass, their arguments, and the tensors that these point to."""

    def __init__(
        self, arguments: ctypes.Structure, block: FoldedBlock, x: Tensor, q: Tensor, bias: PairBias, geometry: Geometry
    ) -> None:
        self.arguments, self.bias, self.slot = arguments, bias, geometry.slot
        self.library = _library(x.dtype)
        self._alive: dict[str, Tensor] = {}
        (seq, batch, d_model), dim = x.shape, block.head_dim
        self._set(batch=batch, seq=seq, kv_heads=block.kv_dim // dim, group=geometry.group, head_dim=dim)
        self._set(d_model=d_model, d_ff=block.down.shape[1], slot=geometry.slot, window=bias.window or 0)
        self.point(q=q)
        if bias.alibi_heads is not None:
            self.point(slopes=alibi_bias(bias.alibi_heads, x.new_ones(1, 1, 1)))
        slots = (batch, geometry.slot + seq)  # another size is refused here, before addresses are made of it
        if bias.key_valid is not None:
            self.point(valid=bias.key_valid.bool().expand(slots))
        if bias.doc_ids is not None:
            self.point(documents=bias.doc_ids.long().expand(slots))
        row, wide = (batch, d_model + _PANEL), (batch, max(len(block.up), 2 * block.kv_dim) + _PANEL)
        self._scratch(x, logits=(_BATCH, _CHUNK), mixed=(_BATCH, dim + _PANEL), narrow=row, normed=row, wide=wide)

    def _set(self, **numbers: float) -> None:
        for name, number in numbers.items():
            setattr(self.arguments, name, number)

    def point(self, **tensors: Tensor | None) -> None:
        """Let arguments point to tensors."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self._alive[name] = tensor = tensor.contiguous()
                setattr(self.arguments, name, tensor.data_ptr())

    def _scratch(self, like: Tensor, **shapes: tuple[int, ...]) -> None:
        self.point(**{name: like.new_zeros(shape) for name, shape in shapes.items()})

    def _call(self, function: str, *numbers: int) -> None:
        getattr(self.library, function)(ctypes.byref(self.arguments), *map(ctypes.c_int64, numbers))

    def _pairs(self, function: str, tile: Tile) -> None:
        oldest = max(tile.k0, self.bias.oldest(self.slot + tile.q0) - self.slot)
        if oldest < tile.k1:
            self._call(function, tile.q0, tile.q1, oldest, tile.k1)


class NativeForward(_Kernels):
    """The forward pass, in the place of `merge_tile`, `FoldedBlock.finish` and `FoldedBlock.persist`.

    Args:
        x: the layer's input (seq, batch, d_model).
        tables: `FoldedBlock.key_tables`.
        kept: (seq, 2, batch, d_model), see `FoldedBlock.finish`.
        written: `z`, `heads`, `keys`, `values` and, if asked for, `lse`: as in `effml_arch.recurrent.tiled.Scan`.
    """

    def __init__(
        self,
        block: FoldedBlock,
        x: Tensor,
        q: Tensor,
        bias: PairBias,
        geometry: Geometry,
        state: AttentionState,
        tables: tuple[Tensor | None, Tensor | None],
        kept: Tensor | None,
        write_mix: float,
        written: dict[str, Tensor | None],
    ) -> None:
        super().__init__(_Forward(), block, x, q, bias, geometry)
        norms = {"source": block.source_norm, "mlp": block.mlp_norm}
        self._set(**{f"{name}_norm": _NORMS[norm.kind] for name, norm in norms.items()})
        self._set(**{f"{name}_eps": norm.eps for name, norm in norms.items()}, key_eps=block.key_norm.eps)
        self._set(key_norm=_together(block, block.key_norm.kind is not nn.Identity), write_mix=write_mix)
        self._set(activation=_ACTIVATIONS.index(block.activation), gated=block.gated)
        matrices = {"out": block.out, "up": block.up, "down": block.down, "key_value": block.key_value}
        self.point(**{name: pack(matrix.t()) for name, matrix in matrices.items()})
        self.point(x=x, up_bias=block.up_bias, down_bias=block.down_bias, kept=None if kept is None else kept.to(x))
        for name, table in zip(("cos", "sin"), tables, strict=True):
            if table is not None:
                table = table.contiguous()
                self.point(**{name: table})
                strides = table.expand(*x.shape[:2], block.kv_dim // block.head_dim, block.head_dim).stride()
                axes = (f"{name}_position", f"{name}_batch", f"{name}_head")
                self._set(**dict(zip(axes, strides, strict=False)))
        self.point(maximum=state.maximum, denominator=state.denominator, numerator=state.numerator, **written)
        pairs = self._alive["keys"]
        self.point(key_columns=pack(torch.zeros_like(pairs).mT), value_rows=pack_heads(torch.zeros_like(pairs)))

    def merge(self, tile: Tile) -> None:
        """Merge the keys of a tile into the state of its queries."""
        self._pairs("merge", tile)

    def run(self, start: int, stop: int) -> None:
        """Do the positions of a block, into whose state all earlier blocks have been merged."""
        self._call("forward", start, stop)


class NativeBackward(_Kernels):
    """The backward pass, in the place of the two products of `Linearization` and of tiles.

    Args:
        x: the layer's input (seq, batch, d_model).
        read: `keys`, `values`, `heads` and `lse`: as in `effml_arch.recurrent.tiled.Scan`.
        written: `g`, with one more column than q, `dz`, `dk`, `dv` and `dq`, to all of which but g is added.
    """

    def __init__(
        self,
        block: FoldedBlock,
        x: Tensor,
        q: Tensor,
        bias: PairBias,
        geometry: Geometry,
        read: dict[str, Tensor],
        written: dict[str, Tensor],
    ) -> None:
        super().__init__(_Backward(), block, x, q, bias, geometry)
        self._set(parts=1 + block.gated, key_norm=_together(block, block.key_weight is not None))
        matrices = {"out": block.out, "up": block.up, "down": block.down, "key_value": block.key_value}
        self.point(**{name: pack(matrix) for name, matrix in matrices.items()})
        keys, values = read["keys"], read["values"]
        self.point(keys=keys, heads=read["heads"], lse=read["lse"], **written)
        self.point(key_columns=pack(keys.mT), value_columns=pack(values.mT), key_rows=pack_heads(keys))
        rows = (_BATCH, block.head_dim + _PANEL)
        self._scratch(x, d_logits=(_BATCH, _CHUNK), q_rows=rows, g_rows=rows, sums=(_CHUNK, rows[1]))

    def linearize(self, first: int, linear: Linearization) -> None:
        """Take the coefficients of the positions from `first` on."""
        self._set(first=first)
        self.point(**linear.coefficients._asdict())

    def run(self, start: int, stop: int) -> None:
        """Do the positions of a block, to which all later blocks have been spread."""
        self._call("backward", start, stop)

    def spread(self, tile: Tile) -> None:
        """Add what the queries of a tile ask of its keys and values to dk and dv, and the reverse to dq."""
        self._pairs("spread", tile)


def is_available() -> bool:
    """Say whether this machine has a C compiler that builds `block.c`."""
    return _library(torch.float32) is not None


def serves(block: FoldedBlock, x: Tensor, *others: Tensor) -> bool:
    """Say whether the C path takes this layer and these tensors, x being (seq, batch, d_model)."""
    matrices = (block.out, block.up, block.down, block.key_value)
    if type(block) is not FoldedBlock or block.activation not in _ACTIVATIONS:
        return False
    weights = sum(matrix.numel() for matrix in matrices)
    crowded = torch.get_num_threads() > 1 and x.shape[1] * weights > MAX_WORK
    if crowded or weights > len(x) * MAX_PACKED:
        return False
    if x.dtype not in (torch.float32, torch.float64):
        return False
    for tensor in (*matrices, x, *others):
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.dtype != x.dtype:
            return False
    try:
        x.data_ptr()
    except RuntimeError:  # a tensor of functorch or of a tracer has no memory of its own
        return False
    return _library(x.dtype) is not None and all(tensor.is_contiguous() for tensor in (x, *others))


def pack(matrix: Tensor, columns: int | None = None) -> Tensor:
    """Return matrices (.., depth, width) in panels (.., panels, depth, columns), the last filled up with zeros.

    columns: of a panel; None: those of a wide one.
    """
    columns = columns or _PANEL // matrix.element_size()
    padded = F.pad(matrix, (0, -matrix.shape[-1] % columns))
    return padded.unflatten(-1, (-1, columns)).transpose(-3, -2).contiguous()


def pack_heads(heads: Tensor) -> Tensor:
    """Return heads (pairs, seq, head_dim) in panels, narrow ones where these leave fewer columns empty."""
    narrow = _PANEL // heads.element_size() // 2
    return pack(heads, narrow if -(-heads.shape[-1] // narrow) % 2 else 2 * narrow)


def _together(block: FoldedBlock, normalised: bool) -> int:
    """Return how many channels of keys are normalised together, 0 for none."""
    return (block.kv_dim if block.whole_keys else block.head_dim) if normalised else 0


def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    return library(_SOURCE, ("FLOAT64",) if dtype == torch.float64 else (), fused=True)
