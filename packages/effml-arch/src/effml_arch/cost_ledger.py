"""What a Recurrent Transformer and its Transformer twin cost: parameters, FLOPs, bytes moved and steps in sequence.

Counted exactly from a `TransformerConfig`, as in `effml_shared.transformer_costs`; notation: N tokens, L layers, width
D, G key heads of d channels. A recurrent layer (arXiv 2604.21215) projects keys and values twice, from its input and
from its output, which adds 2 D G d multiply-adds per token and nothing else; its N positions follow one another. Its
attention off the diagonal runs in the tiles of `effml_arch.recurrent.schedule`, which read (N / 2) log2 N rows of keys
per head where a loop over positions reads N (N - 1) / 2.

Bytes are a model of traffic with memory, not a measurement: what a step uses is read once and caches are empty. In the
tiled forward pass, the weights that work on one position at a time (output projection, MLP, second projection of keys
and values) are read again at every position, those of the first projections once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.layers import TransformerConfig
from effml_shared.transformer_costs import count_params, forward_flops, kv_bytes

from effml_arch.recurrent.layer import RecurrentTransformerConfig
from effml_arch.recurrent.schedule import schedule as tiles_of

__all__ = ["CostLedger", "decode_bytes", "rt_cost", "tile_rows", "transformer_cost"]


@dataclass(frozen=True)
class CostLedger:
    """Costs of one model on `batch` sequences of `seq_len` tokens; FLOPs and bytes are of that whole batch.

    >>> from effml_arch.presets import preset
    >>> recurrent, plain = (cost(preset("olmo-150m"), 512, 1) for cost in (rt_cost, transformer_cost))
    >>> round(100 * (recurrent.forward_flops / plain.forward_flops - 1), 1), recurrent.sequential_steps
    (13.2, 6144)
    """

    seq_len: int
    batch: int
    params: int  # all of them
    body_params: int  # without embedding and head: the name of a model
    forward_flops: int  # head at every position included
    backward_flops: int  # two forward passes, the least; what a method recomputes comes on top
    kv_bytes_per_token: int  # a cache of this model
    weight_bytes: int  # read in a forward pass by the layers, without embedding and head
    attention_bytes: int  # read and written in a forward pass by attention: queries, keys, values, outputs, state
    sequential_steps: int  # layers or positions of a layer that wait for one another in a forward pass

    @property
    def tokens(self) -> int:
        """Tokens that the FLOPs and bytes are of."""
        return self.seq_len * self.batch

    @property
    def training_flops_per_token(self) -> float:
        """FLOPs of forward and backward pass."""
        return (self.forward_flops + self.backward_flops) / self.tokens

    @property
    def bytes_per_token(self) -> float:
        """Bytes that the layers move in a forward pass; activations between their operations are not among them."""
        return (self.weight_bytes + self.attention_bytes) / self.tokens


def transformer_cost(
    config: TransformerConfig, seq_len: int, batch: int = 1, *, dtype: torch.dtype = torch.bfloat16
) -> CostLedger:
    """Return the ledger of a Transformer whose attention reads queries, keys and values once (2205.14135)."""
    return rt_cost(config, seq_len, batch, recurrent_layers=(), dtype=dtype)


def rt_cost(
    config: TransformerConfig,
    seq_len: int,
    batch: int = 1,
    *,
    recurrent_layers: Sequence[int] | None = None,
    schedule: str = "tile",
    base: int = 1,
    wavefront: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> CostLedger:
    """Return the ledger of a Recurrent Transformer of this shape; its parameters are those of the Transformer.

    Args:
        config: of a causal model.
        recurrent_layers: which layers are recurrent; None: those of a `RecurrentTransformerConfig`, else all. A window
            is not taken into account.
        schedule, base: of the tiles, see `effml_arch.recurrent.schedule`. Within a block of `base` positions each
            reads the keys before it row by row; a block of the whole sequence is a loop without tiles.
        wavefront: positions C in a cell of `effml_arch.recurrent.wavefront`, forward only: then r recurrent layers in
            a row take N + (r - 1) C steps instead of r N, and pull their keys in blocks of C. 0: layer by layer.
        dtype: of weights, queries, keys and values. Logits, softmax state and outputs in progress are float32.

    Raises:
        ConfigError: a number is out of range, a layer does not exist, or the model is bidirectional.
    """
    for name, value, least in (
        ("seq_len", seq_len, 1),
        ("batch", batch, 1),
        ("base", base, 1),
        ("wavefront", wavefront, 0),
    ):
        check_count(name, value, least)
    if wavefront:
        schedule, base = "pull", wavefront
    if not config.causal:
        raise ConfigError("causal: got a bidirectional model, expected a causal one: positions follow one another")
    if recurrent_layers is None:
        recurrent_layers = range(config.n_layers)
        if isinstance(config, RecurrentTransformerConfig):
            recurrent_layers = list(filter(config.is_recurrent, recurrent_layers))
    layers = set(recurrent_layers)
    if len(layers) < len(recurrent_layers) or not layers <= set(range(config.n_layers)):
        raise ConfigError(
            f"recurrent_layers: got {list(recurrent_layers)}, expected different ones of 0 to {config.n_layers - 1}"
        )
    recurrent, plain = len(layers), config.n_layers - len(layers)
    runs = len(layers - {layer + 1 for layer in layers}) if wavefront else recurrent  # what waits for what is before it

    d_model, kv_dim, item = config.d_model, config.kv_heads * config.head_dim, dtype.itemsize
    second = 2 * d_model * kv_dim  # weights of the key and value projections
    mlp = (3 if config.mlp == "swiglu" else 2) * d_model * config.ff_dim
    first = d_model**2 + second  # of queries, keys and values: over all positions at once
    stepwise = d_model**2 + mlp + second
    flops = batch * (forward_flops(config, seq_len) + 2 * seq_len * recurrent * second)

    # Per position and layer: q and the output once; the self pair or all keys and values once.
    once = seq_len * item * (2 * d_model + 2 * kv_dim)
    keys, queries = tile_rows(seq_len, base, schedule)
    state = config.n_heads * (8 * config.head_dim + 16)  # o, m and l, read and written in float32
    pulled = keys * 2 * kv_dim * item + queries * (d_model * item + state)
    return CostLedger(
        seq_len=seq_len,
        batch=batch,
        params=count_params(config),
        body_params=count_params(config, embeddings=False),
        forward_flops=flops,
        backward_flops=2 * flops,
        kv_bytes_per_token=kv_bytes(config, dtype),
        weight_bytes=item * (plain * (first + d_model**2 + mlp) + recurrent * (first + seq_len * stepwise)),
        attention_bytes=batch * (config.n_layers * once + recurrent * pulled),
        sequential_steps=plain + runs * seq_len + (recurrent - runs) * min(wavefront, seq_len),
    )


def tile_rows(seq_len: int, base: int = 1, schedule: str = "tile") -> tuple[int, int]:
    """Return how many rows of keys, and of queries, one head reads for its tiles over a sequence.

    Rows of keys within a block are included, its queries are not: they are at hand.

    >>> tile_rows(512), tile_rows(1000)
    ((2304, 2304), (5052, 4932))
    """
    tiles = tiles_of(schedule, seq_len, base).values()
    full, rest = divmod(seq_len, base)
    within = full * base * (base - 1) // 2 + rest * (rest - 1) // 2
    return within + sum(tile.k1 - tile.k0 for tile in tiles), sum(tile.q1 - tile.q0 for tile in tiles)


def decode_bytes(
    config: TransformerConfig, context: int, batch: int = 1, *, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Return the bytes that one decoding step must at least read: every weight once, and the cache of every row.

    Of a Recurrent Transformer the same: it uses two of its weights twice, in one step. Divided by the memory bandwidth,
    a bound on the time of the step. Of an embedding that is not also the head, only `batch` rows are read.
    """
    check_count("context", context, 0)
    check_count("batch", batch, 1)
    weights = count_params(config) - (0 if config.tied else max(config.rows - batch, 0) * config.d_model)
    return weights * dtype.itemsize + batch * context * kv_bytes(config, dtype)
