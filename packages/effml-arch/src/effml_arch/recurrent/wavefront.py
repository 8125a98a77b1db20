"""Several recurrent layers at once, forward only: cells (layer, block of positions) along anti-diagonals.

Cell (l, b) needs the output of cell (l - 1, b) and the persistent pairs of cells (l, < b), so all cells of a diagonal
l + b = d are independent and run as one batch of (layer, sequence) rows on stacked matrices. Of N positions in blocks
of C through L layers, N + (L - 1) C steps follow one another instead of L N, with the same arithmetic: worthwhile where
a step is too small to fill the machine, as in the prefill of few sequences.

Keys are stored with a delay: position p of layer l has slot p + l C. A diagonal then occupies the same C slots in every
layer, distances stay what they are, and the empty slots before a layer's first position are hidden as padding is. So a
diagonal is what `scan` calls one block after a cache, of (number of layers) x batch sequences.

State: a copy of the layers' weights, keys and values of all positions and of (L - 1) C empty slots, in float32 or
wider. The copy is made in every call, weights being free to change in between: as much traffic as two or three steps of
one sequence. Pairs across blocks are pulled: N^2 / (2 C) rows of keys per layer.
Source: the order of the recurrence is that of the Recurrent Transformer, arXiv 2604.21215; the wavefront is our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from effml_shared.kv_cache import KVCache
from effml_shared.layers import MLP, Attention, LayerNorm, RMSNorm
from effml_shared.tensors import widen
from torch import Tensor, nn

from effml_arch.recurrent.attention_state import Geometry
from effml_arch.recurrent.layer import RecurrentContext, RecurrentTransformerLayer
from effml_arch.recurrent.pair_bias import PairBias
from effml_arch.recurrent.stacking import StackedBlocks
from effml_arch.recurrent.tiled import scan

__all__ = ["block_size", "serves", "wanted", "wavefront"]

MAX_BATCH = 64  # sequences
_PLAIN = (RecurrentTransformerLayer, Attention, MLP, nn.Linear, RMSNorm, LayerNorm, nn.Identity, nn.Dropout)


def wanted(choice: str, x: Tensor) -> bool:
    """Return whether to try a wavefront over x (batch, seq, d_model), the choice being `on`, `off` or `auto`.

    Never with gradients, in a graph that is being compiled, or for a single position. `auto` means up to `MAX_BATCH`
    sequences on a GPU, for which a layer's steps are too small; how many is unmeasured. On a CPU it means off: the C
    path of a single layer, whose weights stay in the processor's caches, is 3 to 6 times as fast.
    """
    if choice == "off" or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.shape[1] < 2 or not len(x):
        return False
    return choice == "on" or (x.is_cuda and len(x) <= MAX_BATCH)


def serves(layers: Sequence[RecurrentTransformerLayer], x: Tensor) -> bool:
    """Return whether nobody notices that these layers run on x (batch, seq, d_model) as a wavefront.

    There are several, all alike, with the tiled backend and without dropout; and none of their modules was replaced,
    wrapped, put on another device or given a hook that waits for its call.
    """
    first = layers[0]
    for layer in layers:
        if layer.backend != "tiled" or (layer.config, layer.write_mix) != (first.config, first.write_mix):
            return False
        for module in layer.modules():
            if type(module) not in _PLAIN or "forward" in vars(module):
                return False
            if module._forward_hooks or module._forward_pre_hooks:
                return False
            if type(module) is nn.Linear and module.bias is not None and not first.config.mlp_bias:
                return False
            if type(module) is nn.Dropout and module.training and module.p:
                return False
        if any(type(p) not in (nn.Parameter, Tensor) or p.device != x.device for p in layer.parameters()):
            return False
    return len(layers) > 1


def block_size(n: int, layers: int, most: int) -> int:
    """Return how many positions a cell should have: at most `most`, in blocks of equal size where possible.

    A diagonal adds about as many operations as four steps, so N + (L - 1) C + 4 N / C counts, least at the root of
    4 N / (L - 1).

    >>> [block_size(n, 12, 32) for n in (2, 20, 512, 8192)]
    [1, 2, 13, 32]
    """
    wanted = min(max(math.isqrt(4 * n // max(layers - 1, 1)), 1), most)
    return -(-n // -(-n // wanted))


@torch.no_grad()
def wavefront(layers: Sequence[RecurrentTransformerLayer], x: Tensor, context: RecurrentContext) -> list[Tensor]:
    """Return the output (batch, seq, d_model) of each of successive layers, the first of which reads x of that shape.

    For layers that `serves` accepts. The cache of the context, if any, takes in the keys and values of all layers.
    """
    kind = x.device.type
    stored = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        cells = _Cells(layers, x, context)
        outputs = cells.run()
    cache = context.cache
    if cache is not None:
        for i, layer in enumerate(layers):
            cache.append(layer.self_attn.layer, *(pair.to(stored) for pair in cells.pairs(i)))
    return [torch.cat(z)[: x.shape[1]].transpose(0, 1).to(x.dtype).contiguous() for z in outputs]


class _Cells:
    """The cells of one call: inputs, tables and masks cut into blocks, keys and values with their delay."""

    def __init__(self, layers: Sequence[RecurrentTransformerLayer], x: Tensor, context: RecurrentContext) -> None:
        config, dtype = layers[0].config, widen(x[:0]).dtype
        self.batch, self.n, _ = x.shape
        self.depth, self.past, self.write_mix = len(layers), context.past, layers[0].write_mix
        self.kv_heads, self.group = config.kv_heads, config.n_heads // config.kv_heads
        self.size = block_size(self.n, self.depth, min(layer.base_block for layer in layers))
        self.blocks = -(-self.n // self.size)
        self.stack = StackedBlocks(layers, dtype)

        missing = self.blocks * self.size - self.n  # positions after the last one, whose results nobody reads
        rows = F.pad(x.to(dtype).transpose(0, 1), (0, 0, 0, 0, 0, missing))
        self.inputs = rows.unflatten(0, (self.blocks, self.size))
        self.rotary = None
        if context.rotary is not None:  # the last block first, since a diagonal's first layer has its last block
            tables = (F.pad(table.to(dtype), (0, 0, 0, missing)) for table in context.rotary)
            cut = [table.unflatten(2, (self.blocks, self.size)).permute(2, 0, 1, 3, 4).flip(0) for table in tables]
            self.rotary = [table.expand(-1, self.batch, -1, -1, -1) for table in cut]

        slots = self.past + (self.blocks + self.depth - 1) * self.size
        shape = (self.depth, self.batch * self.kv_heads, slots, config.head_dim)
        self.keys, self.values = rows.new_zeros(shape), rows.new_zeros(shape)  # 0: what is hidden must be finite too
        if self.past:
            for i, layer in enumerate(layers):
                for own, earlier in zip(
                    self.pairs(i, 0), cast(KVCache, context.cache).get(layer.self_attn.layer), strict=True
                ):
                    own[:, :, : self.past] = earlier
        self.bias = context.bias
        valid = context.bias.key_valid
        self.valid = self._delay(
            x.new_ones(self.batch, self.past + self.n, dtype=torch.bool) if valid is None else valid
        )
        self.documents = None if context.bias.doc_ids is None else self._delay(context.bias.doc_ids)

    def _delay(self, x: Tensor) -> Tensor:
        """Return x (batch, past + seq) by layer and slot, 0 at empty ones: (layers, batch, slots)."""
        out = x.new_zeros(self.depth, self.batch, self.keys.shape[2])
        for i, own in enumerate(out):
            own[:, i * self.size : i * self.size + x.shape[1]] = x
        return out

    def pairs(self, layer: int, first: int | None = None) -> tuple[Tensor, Tensor]:
        """Return views of a layer's keys and values from a position on, by default the first that is not in the cache.

        Both (batch, kv_heads, positions, head_dim).
        """
        start, stop = (layer * self.size + slot for slot in (self.past if first is None else first, self.past + self.n))
        keys, values = (t[layer, :, start:stop].unflatten(0, (self.batch, -1)) for t in (self.keys, self.values))
        return keys, values

    def run(self) -> list[list[Tensor]]:
        """Return for each layer its outputs (positions, batch, d_model), block by block."""
        outputs: list[list[Tensor]] = [[] for _ in range(self.depth)]
        z = self.inputs[0, :, None]
        for diagonal in range(self.blocks + self.depth - 1):
            low, high = max(0, diagonal - self.blocks + 1), min(self.depth, diagonal + 1)
            x = z[:, : high - max(low, 1)]  # of the layers before these, one diagonal earlier
            if diagonal < self.blocks:
                x = torch.cat([self.inputs[diagonal, :, None], x], dim=1)
            elif low == self.depth - 1:  # one cell is left: it ends with the sequence
                x = x[: self.n - (self.blocks - 1) * self.size]
            z = self._diagonal(diagonal, low, high, x)
            for layer in range(low, high):
                outputs[layer].append(z[:, layer - low])
        return outputs

    def _diagonal(self, diagonal: int, low: int, high: int, x: Tensor) -> Tensor:
        """Compute the cells of layers [low, high) from their inputs x (positions, layers, batch, d_model)."""
        size, here, layers = len(x), self.past + diagonal * self.size, slice(low, high)
        stack = self.stack.part(layers)
        rotary = None
        if self.rotary is not None:
            last = self.blocks - 1 - (diagonal - low)
            cos, sin = (table[last : last + high - low, ..., :size, :].flatten(0, 1) for table in self.rotary)
            rotary = (cos, sin)
        keys, values = (t[layers] for t in (self.keys, self.values))
        documents = None if self.documents is None else self.documents[layers].flatten(0, 1)
        bias = PairBias(self.bias.alibi_heads, self.valid[layers].flatten(0, 1), documents, self.bias.window)
        solution = scan(
            stack,
            x.flatten(1, 2),
            stack.queries(x, rotary),
            bias,
            Geometry((high - low) * self.batch, self.group, here),
            rotary=rotary,
            past=(keys.flatten(0, 1)[:, :here], values.flatten(0, 1)[:, :here]),
            write_mix=self.write_mix,
            base_block=size,
            tiles={},
            with_lse=False,
        )
        keys[:, :, here : here + size] = solution.keys.unflatten(0, (high - low, -1))
        values[:, :, here : here + size] = solution.values.unflatten(0, (high - low, -1))
        return solution.z.unflatten(1, (high - low, self.batch))
