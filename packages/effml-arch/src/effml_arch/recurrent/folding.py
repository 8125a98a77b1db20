"""What one position of a recurrent layer computes, with as few operations on as few matrices as possible.

A norm is xhat * w, where xhat = r (x - mean) with r = (mean square + eps)^-1/2; its weight, and for LayerNorm the
centring of its input's gradient, are folded into the matrix behind it: W diag(w) P, with P = I - 1 1^T / dim, since
P xhat = xhat. Then RMSNorm, LayerNorm and no norm have one vector-Jacobian product, r (d - xhat <xhat, d> / dim). The
residual factor is folded into the matrices that write to the residual, the weight of the key norm into the tables of
cosines and sines. Cost per position: the layer's matrices once, and those of keys and values a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from effml_shared.layers import Block, LayerNorm, RMSNorm
from torch import Tensor, nn

__all__ = ["FoldedBlock", "Norm", "layer_tensors"]

_MATRICES = (
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "self_attn.k_norm", "post_attention_layernorm")


def layer_tensors(layer: Block) -> dict[str, Tensor]:
    """Return the parameters that the recurrence reads, by name, detached.

    Raises:
        ConfigError: a part is not the plain module that the folded arithmetic stands for.
    """
    tensors = {}
    for name in (*_MATRICES, *_NORMS):
        module: Any = layer.get_submodule(name) if name != "mlp.gate_proj" else layer.mlp.gate_proj
        known = (nn.Linear,) if name in _MATRICES else (RMSNorm, LayerNorm, nn.Identity)
        if module is None or type(module) is nn.Identity:
            continue
        if type(module) not in known:
            expected = "nn.Linear" if name in _MATRICES else "RMSNorm, LayerNorm or nn.Identity"
            raise ConfigError(f"{name}: got {type(module).__name__}, expected {expected}, or backend='naive'")
        tensors.update({f"{name}.{key}": value.detach() for key, value in module.named_parameters()})
    return tensors


@dataclass(frozen=True)
class Norm:
    """Normalisation without its weight, over the last dimension."""

    kind: type[nn.Module]
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(type(module), getattr(module, "eps", 0.0))

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind is RMSNorm:  # on one position, half the time of F.rms_norm, which is no single kernel on a CPU
            return x * x.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return F.layer_norm(x, x.shape[-1:], None, None, self.eps) if self.kind is LayerNorm else x

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return xhat, r (.., 1) and xhat / sqrt(dim), or for no norm what makes the same product the identity."""
        if self.kind is nn.Identity:
            return x, torch.ones_like(x[..., :1]), torch.zeros_like(x)
        centred = x - x.mean(-1, keepdim=True) if self.kind is LayerNorm else x
        r = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * r, r, centred * (r * x.shape[-1] ** -0.5)

    def fold(self, matrix: Tensor, weight: Tensor | None) -> Tensor:
        """Return matrix diag(weight) P (out, in)."""
        matrix = matrix if weight is None else matrix * weight
        return matrix - matrix.mean(1, keepdim=True) if self.kind is LayerNorm else matrix


class FoldedBlock:
    """The matrices of one layer, folded, and one position's forward computation on rows (batch, d_model)."""

    def __init__(self, layer: Block, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        get = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        attn = layer.self_attn
        self.head_dim, self.scale = attn.head_dim, layer.scale
        self.whole_keys = attn.qk_norm == "full"
        self.source_norm, self.mlp_norm = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        self.key_norm = Norm.of(attn.k_norm)
        self.activation: Callable[[Tensor], Tensor] = layer.mlp.activation
        self.gated = layer.mlp.gate_proj is not None

        keys, values = get["self_attn.k_proj.weight"], get["self_attn.v_proj.weight"]
        self.kv_dim = keys.shape[0]
        if self.key_norm.kind is LayerNorm:  # centred before the norm, so that its gradient need not be
            heads = keys[None] if self.whole_keys else keys.unflatten(0, (-1, self.head_dim))
            keys = (heads - heads.mean(1, keepdim=True)).flatten(0, 1)
        self.key_weight = get.get("self_attn.k_norm.weight")
        source = get.get("input_layernorm.weight")
        self.key_value = self.source_norm.fold(torch.cat([keys, values]), source)
        up = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        into = torch.cat([get[f"mlp.{name}.weight"] for name in up])
        self.up = self.mlp_norm.fold(into, get.get("post_attention_layernorm.weight"))
        biased = "mlp.up_proj.bias" in get
        self.up_bias = torch.cat([get[f"mlp.{name}.bias"] for name in up]) if biased else None
        self.down = get["mlp.down_proj.weight"] * self.scale
        self.down_bias = get["mlp.down_proj.bias"] * self.scale if biased else None
        self.out = get["self_attn.o_proj.weight"] * self.scale

    def key_tables(self, rotary: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return tables c and s with k = khat * c + roll(khat, head_dim / 2) * s, the rotation after the key norm.

        Shapes (seq or 1, batch or 1, kv_heads or 1, head_dim); None stands for ones, and for zeros.
        """
        weight = None
        if self.key_weight is not None:
            weight = self.key_weight.view(1, 1, -1, self.head_dim)
        if rotary is None:
            return weight, None
        cos, sin = (table.to(like.dtype).permute(2, 0, 1, 3) for table in rotary)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return (cos, sin) if weight is None else (cos * weight, sin * weight.roll(self.head_dim // 2, -1))

    def finish(self, x: Tensor, heads: Tensor) -> Tensor:
        """Return the layer's output from its input x and its attention heads, all (rows, d_model)."""
        u = torch.addmm(x, heads, self.out.t())
        hidden = F.linear(self.mlp_norm(u), self.up, self.up_bias)
        if self.gated:
            gate, up = hidden.chunk(2, -1)
            hidden = self.activation(gate).mul_(up)
        else:
            hidden = self.activation(hidden)
        z = u.addmm_(hidden, self.down.t())
        return z if self.down_bias is None else z.add_(self.down_bias)

    def persist(self, source: Tensor, table: tuple[Tensor | None, Tensor | None], k: Tensor, v: Tensor) -> None:
        """Write the persistent pair of source (batch, d_model) to k and v (batch x kv_heads, head_dim).

        table: one position of `key_tables`.
        """
        pair = F.linear(self.source_norm(source), self.key_value)
        keys, values = pair.split(self.kv_dim, -1)
        v.copy_(values.reshape(v.shape))
        keys = self.key_norm(keys if self.whole_keys else keys.unflatten(-1, (-1, self.head_dim)))
        keys = keys.view(source.shape[0], -1, self.head_dim)
        cos, sin = table
        out = k.view(keys.shape)
        if sin is not None and cos is not None:
            torch.addcmul(keys * cos, keys.roll(self.head_dim // 2, -1), sin, out=out)
        else:
            out.copy_(keys if cos is None else keys * cos)
