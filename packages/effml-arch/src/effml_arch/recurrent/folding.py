"""What one position of a recurrent layer computes, with as few operations on as few matrices as possible.

A norm is xhat * w, where xhat = r (x - mean) with r = (mean square + eps)^-1/2; its weight, and for LayerNorm the
centring of its input's gradient, are folded into the matrix behind it: W diag(w) P, with P = I - 1 1^T / dim, since
P xhat = xhat. Then RMSNorm, LayerNorm and no norm have one vector-Jacobian product, r (d - xhat <xhat, d> / dim). The
residual factor, and dropout's, is folded into the matrices that write to the residual, the weight of the key norm into
the tables of cosines and sines. Cost per position: the layer's matrices once, and those of keys and values once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from effml_shared.layers import ACTIVATIONS, Block, LayerNorm, RMSNorm
from torch import Tensor, nn

from effml_arch.recurrent.form import NORMS, Form, form_of, weights_of

__all__ = ["FoldedBlock", "Norm", "turning_tables"]

# (cotangent, x) -> its product with the derivative at x, as PyTorch's backward passes: inside of an operator there is
# no autograd.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": torch.ops.aten.silu_backward.default,
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward.default, threshold=0),
}


@dataclass(frozen=True)
class Norm:
    """Normalisation without its weight, over the last dimension."""

    kind: type[nn.Module]
    eps: float

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
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


def turning_tables(
    weight: Tensor | None, rotary: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return the tables of `FoldedBlock.key_tables` for a norm's weight (1, batch or 1, heads or 1, head_dim)."""
    if rotary is None:
        return weight, None
    cos, sin = (table.to(dtype).permute(2, 0, 1, 3) for table in rotary)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return (cos, sin) if weight is None else (cos * weight, sin * weight.roll(sin.shape[-1] // 2, -1))


class FoldedBlock:
    """The matrices of one layer, folded, and one position's forward computation on rows (batch, d_model)."""

    def __init__(self, form: Form, weights: list[Tensor], dtype: torch.dtype) -> None:
        """weights: those that the form names."""
        get = {name: tensor.to(dtype) for name, tensor in zip(form.weights, weights, strict=True)}
        self.head_dim, self.whole_keys, self.gated = form.head_dim, form.whole_keys, form.mlp == "swiglu"
        self.source_norm = Norm(NORMS[form.source_norm], form.source_eps)
        self.key_norm = Norm(NORMS[form.key_norm], form.key_eps)
        self.mlp_norm = Norm(NORMS[form.mlp_norm], form.mlp_eps)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[form.mlp]
        self.derivative = _DERIVATIVES[form.mlp]
        scale = form.scale / (1 - form.dropout)  # what is kept is scaled up

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
        self.up_bias = torch.cat([get[f"mlp.{name}.bias"] for name in up]) if form.mlp_bias else None
        self.down = get["mlp.down_proj.weight"] * scale
        self.down_bias = get["mlp.down_proj.bias"] * scale if form.mlp_bias else None
        self.out = get["self_attn.o_proj.weight"] * scale

    @classmethod
    def of(cls, layer: Block, dtype: torch.dtype) -> FoldedBlock:
        """Return the matrices that a layer, without dropout, has now."""
        form = form_of(layer)
        return cls(form, weights_of(layer, form), dtype)

    def key_tables(self, rotary: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return tables c and s with k = khat * c + roll(khat, head_dim / 2) * s, the rotation after the key norm.

        Shapes (seq or 1, batch or 1, kv_heads or 1, head_dim); None stands for ones, and for zeros.
        """
        weight = None if self.key_weight is None else self.key_weight.view(1, 1, -1, self.head_dim)
        return turning_tables(weight, rotary, like.dtype)

    def finish(self, x: Tensor, heads: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the layer's output from its input x and its attention heads, all (rows, d_model).

        kept: (2, rows, d_model), 1 where dropout keeps what attention, and what the MLP, adds.
        """
        out, down = self.out.t(), self.down.t()
        u = torch.addmm(x, heads, out) if kept is None else torch.addcmul(x, heads @ out, kept[0])
        hidden = F.linear(self.mlp_norm(u), self.up, self.up_bias)
        if self.gated:
            gate, up = hidden.chunk(2, -1)
            hidden = self.activation(gate).mul_(up)
        else:
            hidden = self.activation(hidden)
        if kept is not None:
            return u.addcmul_(F.linear(hidden, self.down, self.down_bias), kept[1])
        z = u.addmm_(hidden, down)
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
