"""The parts of the baseline Transformer: configuration, norms, positions, masks, attention, MLP and block.

Methods that change the layer build on these and keep their names and shapes. Tensors are (batch, seq, channels), or
(batch, heads, seq, head_dim) inside attention. Sources: rotary positions (arXiv 2104.09864), ALiBi (2108.12409),
grouped queries (2305.13245), SwiGLU (2002.05202), QK-norm and reordered norms (OLMo 2, 2501.00656).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effml_shared.checks import check_range
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "Block",
    "Context",
    "LayerNorm",
    "RMSNorm",
    "TransformerConfig",
    "alibi_bias",
    "make_norm",
    "rotary_tables",
    "rotate",
    "visible",
]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of each kind of MLP
    "swiglu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}
_CHOICES = {
    "position": ("rope", "alibi", "none"),
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post"),
    "qk_norm": ("none", "full", "head"),
    "mlp": tuple(ACTIVATIONS),
    "init": ("mitchell", "normal"),
    "residual_scale": ("none", "depth"),
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and variant of a `Transformer`; where a field is None, the property named beside it has the rule.

    >>> TransformerConfig(d_model=64, n_heads=3)
    Traceback (most recent call last):
    effml_shared.errors.ConfigError: n_heads: got 3, expected a divisor of d_model=64
    """

    n_layers: int = 4
    d_model: int = 256  # channels of the residual stream
    n_heads: int = 4  # query heads, each of d_model / n_heads channels
    n_kv_heads: int | None = None  # key and value heads; None: as many as query heads (kv_heads)
    d_ff: int | None = None  # hidden channels of the MLP (ff_dim)
    vocab_size: int = 256  # token ids
    vocab_rows: int | None = None  # rows of embedding and head; None: vocab_size rounded up to 128 (rows)
    tied: bool = False  # the head is the embedding
    causal: bool = True  # False: every position sees every other
    position: str = "rope"  # rope | alibi | none
    rope_base: float = 10_000.0  # base of the geometric series of rotation frequencies, in radians per position
    norm: str = "rms"  # rms | layer; both with a scale and without a bias
    norm_eps: float = 1e-6  # added to the mean square or variance
    norm_position: str = "pre"  # pre: x + f(norm x) | post: x + norm f(x), as in OLMo 2
    qk_norm: str = "none"  # none | full: over all heads together | head: over each head, with one shared scale
    mlp: str = "swiglu"  # swiglu | gelu (exact) | gelu_tanh | relu
    mlp_bias: bool = False
    init: str = "mitchell"  # mitchell | normal: see `initialize`
    residual_scale: str = "none"  # factor of both branches; none: 1 | depth: 1 / sqrt(n_layers)
    resid_dropout: float = 0.0  # probability of dropping, in training, each number that a branch adds

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "kv_heads", "ff_dim", "vocab_size", "rope_base", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        check_range("resid_dropout", self.resid_dropout, 0, 1)
        if self.d_model % self.n_heads:
            raise ConfigError(f"n_heads: got {self.n_heads}, expected a divisor of d_model={self.d_model}")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"n_kv_heads: got {self.kv_heads}, expected a divisor of n_heads={self.n_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ConfigError(f"n_heads: got heads of {self.head_dim} channels, expected an even number with rope")
        if self.rows < self.vocab_size:
            raise ConfigError(f"vocab_rows: got {self.rows}, expected at least vocab_size={self.vocab_size}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ff_dim(self) -> int:
        """By default 4 d_model, or for SwiGLU the multiple of 256 that comes closest to as many weights."""
        default = 256 * max(1, round(8 * self.d_model / 768)) if self.mlp == "swiglu" else 4 * self.d_model
        return default if self.d_ff is None else self.d_ff

    @property
    def rows(self) -> int:
        return -(-self.vocab_size // 128) * 128 if self.vocab_rows is None else self.vocab_rows


class RMSNorm(nn.Module):
    """Scale x (..., dim) to mean square 1, then by a weight (dim). Statistics in float32 or wider."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        # The kernels accumulate in float32, yet save x for the backward pass in its own, narrower type.
        return F.rms_norm(x, self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class LayerNorm(RMSNorm):
    """Scale x (..., dim) to mean 0 and variance 1, then by a weight (dim). Statistics in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, None, None, self.eps).to(x.dtype) * self.weight


def make_norm(config: TransformerConfig, dim: int) -> RMSNorm:
    """Return the configured kind of norm over `dim` channels."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(dim, config.norm_eps)


def rotary_tables(position_ids: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin (batch, 1, seq, head_dim / 2) of position * base^(-2i / head_dim) in float32 or float64."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=dtype, device=position_ids.device) / head_dim)
    angle = position_ids[:, None, :, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + head_dim / 2) of x (batch, heads, seq, head_dim) by the angles of the tables."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def alibi_bias(n_heads: int, distance: Tensor) -> Tensor:
    """Return -2^(-8h / n_heads) |distance|, h = 1..n_heads: (batch, n_query, n_key) -> (batch, n_heads, ...)."""
    slopes = 2.0 ** (-8 * torch.arange(1, n_heads + 1, dtype=distance.dtype, device=distance.device) / n_heads)
    return -slopes[:, None, None] * distance.abs()[:, None]


def visible(key_valid: Tensor, n_query: int, *, causal: bool, doc_ids: Tensor | None = None) -> Tensor:
    """Return which keys the last n_query positions may see: bool (batch, 1, n_query, n_key).

    key_valid: (batch, n_key), False hides a key from all. doc_ids: (batch, n_key), a token sees only its document.
    """
    n_key = key_valid.shape[1]
    mask = key_valid[:, None, None, :].expand(-1, 1, n_query, n_key)
    if causal:
        mask = mask.tril(n_key - n_query)
    if doc_ids is not None:
        mask = mask & (doc_ids[:, None, -n_query:, None] == doc_ids[:, None, None, :])
    return mask


@dataclass
class Context:
    """What the layers of one forward pass share. Not a tuple, else FSDP2 would cast its angles to the compute type."""

    rotary: tuple[Tensor, Tensor] | None = None  # see rotary_tables
    mask: Tensor | None = None  # see Attention.attend
    cache: KVCache | None = None


class Attention(nn.Module):
    """Grouped-query attention softmax(q k / sqrt(head_dim)) v over x (batch, seq, d_model). No biases."""

    def __init__(self, config: TransformerConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.causal, self.head_dim, self.qk_norm = layer, config.causal, config.head_dim, config.qk_norm
        kv_dim = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm != "none":
            self.q_norm = make_norm(config, config.d_model if config.qk_norm == "full" else config.head_dim)
            self.k_norm = make_norm(config, kv_dim if config.qk_norm == "full" else config.head_dim)

    def _heads(self, x: Tensor, norm: nn.Module, context: Context) -> Tensor:
        whole = self.qk_norm == "full"
        heads = (norm(x) if whole else x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        heads = heads if whole else norm(heads)
        return (rotate(heads, *context.rotary) if context.rotary else heads).to(x.dtype)

    def query(self, x: Tensor, context: Context) -> Tensor:
        """Return the queries of x, normalised and then rotated: (batch, n_heads, seq, head_dim)."""
        return self._heads(self.q_proj(x), self.q_norm, context)

    def key_value(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Return the keys of x, normalised and then rotated, and its values: both (batch, kv_heads, seq, head_dim)."""
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self._heads(self.k_proj(x), self.k_norm, context), value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return W_o applied to the attention of q over k and v: (batch, n_query, d_model).

        mask: (batch or 1, n_heads or 1, n_query, n_key), bool (True: may see) or a bias; a query that sees nothing
        yields 0. None: every key, or in a causal layer those up to the query, the last query being the last key.
        """
        n_query, n_key = q.shape[2], k.shape[2]
        causal = self.causal and mask is None and n_query > 1
        if causal and n_query != n_key:  # PyTorch's flag would align the first query with the first key
            mask, causal = visible(q.new_ones(1, n_key, dtype=torch.bool), n_query, causal=True), False
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        grouped = q.shape[1] != k.shape[1]
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        k, v = self.key_value(x, context)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        return self.attend(self.query(x, context), k, v, context.mask)


class MLP(nn.Module):
    """down(act(up x)), or for SwiGLU down(silu(gate x) * up x), on x (..., d_model)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        shape = (config.d_model, config.ff_dim)
        self.activation = ACTIVATIONS[config.mlp]
        self.gate_proj = nn.Linear(*shape, bias=config.mlp_bias) if config.mlp == "swiglu" else None
        self.up_proj = nn.Linear(*shape, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*shape[::-1], bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer on the residual stream x (batch, seq, d_model): attention, then MLP, each beside its norm.

    In training, dropout draws a mask of x's shape from PyTorch's global generator for each of the two.
    """

    def __init__(self, config: TransformerConfig, layer: int = 0) -> None:
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.scale = config.n_layers**-0.5 if config.residual_scale == "depth" else 1.0
        self.input_layernorm = make_norm(config, config.d_model)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.d_model)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        drop = self.dropout
        if self.pre:
            x = x + self.scale * drop(self.self_attn(self.input_layernorm(x), context))
            return x + self.scale * drop(self.mlp(self.post_attention_layernorm(x)))
        x = x + self.scale * drop(self.input_layernorm(self.self_attn(x, context)))
        return x + self.scale * drop(self.post_attention_layernorm(self.mlp(x)))
