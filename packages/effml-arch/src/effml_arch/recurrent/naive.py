"""The recurrent layer as it is defined, one position after the other: the reference of the tiled algorithm.

Every operation is a module of the layer on one position, and autograd differentiates through all of them. Position t
attends to the persistent pairs of earlier positions and to its own pair, made from the layer's input:

    h = norm1 x_t;   a = attention(q(h); {(k_i, v_i), i < t} and (k(h), v(h)));   u = x_t + rho W_o a
    z_t = u + rho MLP(norm2 u);   (k_t, v_t) = key and value of norm1((1 - mu) x_t + mu z_t), of the same weights

Cost: seq^2 / 2 key rows read per layer, and under autograd memory O(seq^2) for the keys that each position gathers.
Source: the Recurrent Transformer, arXiv 2604.21215, section 2; the mixture mu, 1 in the paper, is our own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effml_shared.layers import Block, Context
from effml_shared.tensors import widen
from torch import Tensor

from effml_arch.recurrent.pair_bias import PairBias

__all__ = ["naive_scan", "residual"]


def naive_scan(
    layer: Block,
    x: Tensor,
    bias: PairBias,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    write_mix: float = 1.0,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output (batch, seq, d_model) and its persistent keys and values (batch, kv_heads, seq, dim).

    Args:
        x: (batch, seq, d_model).
        past: keys and values of earlier tokens.
        write_mix: mu above.
        kept: (2, batch, seq, d_model), False where dropout leaves out what attention, and what the MLP, adds.
    """
    keys, values = ([], []) if past is None else ([past[0]], [past[1]])
    first = 0 if past is None else past[0].shape[2]
    outputs: list[Tensor] = []
    for t, x_t in enumerate(x.split(1, dim=1)):
        angles = None if rotary is None else (rotary[0][:, :, t : t + 1], rotary[1][:, :, t : t + 1])
        here, slot = Context(rotary=angles), first + t
        h = layer.input_layernorm(x_t)
        own_k, own_v = layer.self_attn.key_value(h, here)
        row = bias.tile(range(slot, slot + 1), range(slot), widen(x[:0])) if slot else None
        mask = None if row is None else F.pad(row, (0, 1))  # its own pair comes last, and is neither biased nor hidden
        k, v = torch.cat([*keys, own_k], dim=2), torch.cat([*values, own_v], dim=2)
        kept_t = None if kept is None else kept[:, :, t : t + 1]
        u = residual(layer, x_t, layer.self_attn.attend(layer.self_attn.query(h, here), k, v, mask), kept_t, 0)
        z = residual(layer, u, layer.mlp(layer.post_attention_layernorm(u)), kept_t, 1)
        source = z if write_mix == 1 else torch.lerp(x_t, z, write_mix)
        k, v = layer.self_attn.key_value(layer.input_layernorm(source), here)
        keys.append(k)
        values.append(v)
        outputs.append(z)
    new = len(outputs)
    return torch.cat(outputs, dim=1), torch.cat(keys[-new:], dim=2), torch.cat(values[-new:], dim=2)


def residual(layer: Block, x: Tensor, branch: Tensor, kept: Tensor | None, which: int) -> Tensor:
    """Return x plus what a branch adds after dropout: of attention if `which` is 0, of the MLP if 1."""
    if kept is None:
        return x + layer.scale * branch
    return x + layer.scale / (1 - layer.dropout.p) * (branch * kept[which])
