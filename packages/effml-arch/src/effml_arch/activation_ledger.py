"""What the layers of a Transformer keep in memory between forward and backward pass, in bytes, counted exactly.

Per token of a layer, in the notation of `effml_arch.cost_ledger` with H query heads and hidden width F. Numbers are of
the type of the weights; *wide* ones are of float32 or wider:

    norms      each of two: input D (wide of an RMSNorm), normalised D, scaled D, and statistics: 1 wide or, with
               centring, 2
    attention  queries D, keys and values 2 G d, heads D, log-sum-exp H wide; a query or key norm keeps its input,
               normalised output and statistics; a copy of the heads D for the output projection, where rotation or
               a norm of each head has put the queries in order of heads, which the kernel's output follows
    mlp        hidden 2 F, of which ReLU keeps 1 F; SwiGLU 4 F: gate, silu(gate), up, their product
    bias       ALiBi of a standard layer, H N^2 numbers a sequence: a copy per layer in narrow types, else one of all

A recurrent layer (arXiv 2604.21215, our tiled algorithm) keeps no bias and its heads once. Of the second use of norm,
keys and values it keeps the normalised and scaled input 2 D and all that the key norm does, and besides the solution of
the recurrence, wide: output and heads 2 D, keys and values 2 G d, log-sum-exp H; its input D, where the norm has kept
that in another type. Everything is O(N), while autograd through the loop over positions keeps the keys that each of
them gathers, O(N^2).

Counted are the storages that autograd holds of an eager pass in one type on a CPU, whose attention kernel keeps no
weights. Autocast adds copies and dropout its masks; other kernels may keep statistics in other types. Embedding, final
norm, head and loss are left out. Derived here from the code of the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from effml_shared.checks import check_count
from effml_shared.layers import TransformerConfig

from effml_arch.recurrent.layer import RecurrentTransformerConfig

__all__ = ["ActivationLedger", "activation_ledger"]

_HIDDEN = {"swiglu": 4, "relu": 1}


@dataclass(frozen=True)
class ActivationLedger:
    """Bytes that all layers together keep for the backward pass of a batch.

    >>> from effml_arch.presets import preset
    >>> ledger = activation_ledger(preset("olmo-150m", position="rope"), 1024, 32)
    >>> round(ledger.total / 2**30, 1), round(ledger.mlp / ledger.total, 2)
    (17.3, 0.35)
    """

    norms: int
    attention: int
    mlp: int
    recurrence: int  # the solutions of recurrent layers
    bias: int  # ALiBi in standard layers
    angles: int  # of rotary positions, which all layers share

    @property
    def total(self) -> int:
        """All of them."""
        return self.norms + self.attention + self.mlp + self.recurrence + self.bias + self.angles


def activation_ledger(
    config: TransformerConfig, seq_len: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> ActivationLedger:
    """Return what the layers of a model keep for batch sequences of seq_len tokens.

    Args:
        config: of a `RecurrentTransformer`, or else of a `Transformer`. Without masks, windows or dropout, and in a
            recurrent model with `write_mix` 1.
        seq_len, batch: of one forward pass. In a batch of one sequence some copies are none: it keeps a little less.
        dtype: of weights and activations.

    Raises:
        ConfigError: a number is not an integer of at least 1.
    """
    check_count("seq_len", seq_len, 1)
    check_count("batch", batch, 1)
    recurrent = 0
    if isinstance(config, RecurrentTransformerConfig):
        recurrent = sum(map(config.is_recurrent, range(config.n_layers)))
    plain, tokens, item = config.n_layers - recurrent, seq_len * batch, dtype.itemsize
    wide = max(item, 4)
    d_model, kv_dim, heads = config.d_model, config.kv_heads * config.head_dim, config.n_heads

    def norm(rows: int, dim: int) -> int:
        """Input, normalised output and statistics of rows of dim channels."""
        centred = config.norm == "layer"
        return rows * (dim * ((item if centred else wide) + item) + (2 * item if centred else wide))

    query_norm, key_norm = {
        "none": (0, 0),
        "full": (norm(1, d_model), norm(1, kv_dim)),
        "head": (norm(heads, config.head_dim), norm(config.kv_heads, config.head_dim)),
    }[config.qk_norm]
    norms = 2 * (norm(1, d_model) + d_model * item)
    projected = query_norm + key_norm + (d_model + 2 * kv_dim) * item
    converted = config.norm == "rms" and item < wide
    copied = config.position == "rope" or config.qk_norm == "head"
    alibi = heads * seq_len**2 * (plain * item if item < 4 else wide * (plain > 0))
    return ActivationLedger(
        norms=tokens * (config.n_layers * norms + recurrent * 2 * d_model * item),
        attention=tokens
        * (
            plain * (projected + (1 + copied) * d_model * item + heads * wide)
            + recurrent * (projected + key_norm + d_model * item)
        ),
        mlp=tokens * config.n_layers * _HIDDEN.get(config.mlp, 2) * config.ff_dim * item,
        recurrence=tokens * recurrent * ((2 * d_model + 2 * kv_dim + heads) * wide + converted * d_model * item),
        bias=alibi if config.position == "alibi" else 0,
        angles=seq_len * config.head_dim * wide if config.position == "rope" else 0,
    )
