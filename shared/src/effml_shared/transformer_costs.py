"""Parameters, FLOPs and cache bytes of a `Transformer`, counted exactly from its configuration.

A multiply and an add are two FLOPs. Counted are the matrix products: the linear layers, the head and the two products
of attention over the pairs a query may see, N (N + 1) / 2 for a causal sequence of N tokens. Norms, rotations and
activations are not: they cost memory traffic rather than arithmetic.
"""

from __future__ import annotations

import torch

from effml_shared.layers import TransformerConfig


def _linear_weights(config: TransformerConfig) -> int:
    """Matrix entries of one layer, each of which is one multiply-add per token."""
    attention = 2 * config.d_model * (config.d_model + config.kv_heads * config.head_dim)
    return attention + (3 if config.mlp == "swiglu" else 2) * config.d_model * config.ff_dim


def count_params(config: TransformerConfig, *, embeddings: bool = True) -> int:
    """Return the number of parameters; `embeddings=False` leaves out embedding and head: the "150M" of a 150M model.

    >>> count_params(TransformerConfig(n_layers=4, d_model=512, n_heads=8, mlp="gelu"), embeddings=False)
    12587520
    """
    kv_dim = config.kv_heads * config.head_dim
    qk_norms = {"none": 0, "full": config.d_model + kv_dim, "head": 2 * config.head_dim}[config.qk_norm]
    biases = config.mlp_bias * (config.d_model + (2 if config.mlp == "swiglu" else 1) * config.ff_dim)
    body = config.n_layers * (_linear_weights(config) + 2 * config.d_model + qk_norms + biases) + config.d_model
    return body + embeddings * (1 if config.tied else 2) * config.rows * config.d_model


def forward_flops(config: TransformerConfig, seq_len: int) -> int:
    """Return the FLOPs of one forward pass over one sequence of seq_len tokens, the head at every position included."""
    pairs = seq_len * (seq_len + 1) // 2 if config.causal else seq_len**2
    linear = config.n_layers * _linear_weights(config) + config.rows * config.d_model
    return 2 * (seq_len * linear + config.n_layers * 2 * config.d_model * pairs)


def training_flops_per_token(config: TransformerConfig, seq_len: int, *, recompute: bool = False) -> float:
    """Return the FLOPs of forward and backward per token: three forward passes, four if activations are recomputed."""
    return (4 if recompute else 3) * forward_flops(config, seq_len) / seq_len


def kv_bytes(config: TransformerConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of keys and values that a `KVCache` holds per token."""
    return 2 * config.n_layers * config.kv_heads * config.head_dim * dtype.itemsize
