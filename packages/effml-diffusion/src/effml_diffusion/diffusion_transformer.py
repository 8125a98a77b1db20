"""The bidirectional Transformer of masked diffusion, told the time by adaptive layer norms, with a head for gaps.

    c = silu(embedding(t) + embedding(length))                                    effml_diffusion.modulation
    per layer: (shift, scale, gate) x 2 = A c + a,   A = a = 0 at the start
        x = x + gate_1 drop(Attention(LN(x) (1 + scale_1) + shift_1))             rotary positions, no biases
        x = x + gate_2 drop(MLP(LN(x) (1 + scale_2) + shift_2))                   GELU (tanh), with biases
    logits = W (LN(x) (1 + scale) + shift) + b,       W = b = 0 at the start

So every layer starts as the identity and every logit as exactly 0: the first loss is the logarithm of the number of
tokens, and the first gradient is in W and b alone. Masked diffusion does not need the time (arXiv 2406.07524), FlexMDM
does; without conditioning the layers are the shared plain ones.

With a gap head, a terminal slot is appended to each text: texts of k tokens have k + 1 gaps, gap i just before token i
and gap k at the slot behind the last token. Keys are seen up to that slot, rotary positions count real tokens.

Parameters, with D channels, V ids, c = cond_dim, L layers: V D + L (12 D^2 + 7 D) + D + (D + 1) V, and for conditioning
258 c + c^2 + (6 L + 2) D (c + 1). Cost: that of a Transformer of this shape; modulation adds O(L D c) per text.

Source: the DiT of arXiv 2310.16834, 2406.07524 and 2509.01025. Matrices are drawn like those of the shared Transformer,
truncated normal, where the papers' code draws uniform numbers of a third of that variance. The length embedding, the
coordinates and leaving conditioning away are our own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from effml_shared.layers import Block, Context, make_norm, rotary_tables, visible
from effml_shared.tensors import widen
from effml_shared.transformer import initialize
from torch import Tensor, nn

from effml_diffusion.diffusion_transformer_config import DiffusionTransformerConfig
from effml_diffusion.insertion_head import InsertionHead
from effml_diffusion.modulation import ScalarEmbedding, ZeroLinear, modulate
from effml_diffusion.value_checks import check_values

__all__ = ["DiffusionBlock", "DiffusionTransformer", "DiffusionTransformerConfig", "DiffusionTransformerOutput"]


class DiffusionTransformerOutput(NamedTuple):
    """What a `DiffusionTransformer` returns: a tuple, in which DDP, FSDP2 and `torch.compile` find the tensors."""

    logits: Tensor  # (batch, seq, rows), -inf from vocab_size on
    hidden_states: tuple[Tensor, ...] = ()  # on request: the input of every layer, then the last one's output
    gaps: Tensor | None = None  # (batch, seq + 1), expected missing tokens before each token; with that head
    log_gaps: Tensor | None = None  # (batch, seq + 1), their logarithms
    gap_logits: Tensor | None = None  # (batch, seq + 1, max_length + 1); with the head for distributions
    quality: Tensor | None = None  # (batch, seq), for wrappers that judge tokens: this network does not


class DiffusionBlock(Block):
    """The shared layer, or with conditioning the adaLN-zero one: shift, scale and gate of both branches follow c."""

    def __init__(self, config: DiffusionTransformerConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.modulation = ZeroLinear(config.cond_dim, 6 * config.d_model) if config.conditioned else None

    def forward(self, x: Tensor, context: Context, c: Tensor | None = None) -> Tensor:
        """Return x (batch, seq, d_model) after this layer; c (batch, cond_dim)."""
        if self.modulation is None:
            return super().forward(x, context)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c).chunk(6, dim=-1)
        branch = self.self_attn(modulate(self.input_layernorm(x), shift_1, scale_1), context)
        x = x + self.scale * gate_1[:, None] * self.dropout(branch)
        branch = self.mlp(modulate(self.post_attention_layernorm(x), shift_2, scale_2))
        return x + self.scale * gate_2[:, None] * self.dropout(branch)


class DiffusionTransformer(nn.Module):
    """A denoising network for `MaskedDiffusion`, and with a gap head for `FlexMDM`.

    >>> model = DiffusionTransformer(DiffusionTransformerConfig(n_layers=1, d_model=32, vocab_size=5))
    >>> model(torch.tensor([[0, 4, 4]])).logits.abs().max().item()
    0.0
    """

    coordinates: Tensor  # (axes, positions) int64, if there are any

    def __init__(self, config: DiffusionTransformerConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, dim, cond_dim = config, config.d_model, config.cond_dim
        device = torch.get_default_device()
        with torch.device("meta"):  # PyTorch's own initial draw would be overwritten at once
            embedding = nn.Embedding(config.rows, dim)
            layers = nn.ModuleList(DiffusionBlock(config, layer) for layer in range(config.n_layers))
            self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": make_norm(config, dim)})
            self.lm_head = ZeroLinear(dim, config.rows)
            self.coordinate_embeddings = nn.ModuleList(nn.Embedding(max(axis) + 1, dim) for axis in config.coordinates)
            self.time_embedding = ScalarEmbedding(cond_dim) if config.conditioned else None
            self.length_embedding = ScalarEmbedding(cond_dim, zero=True) if config.length_conditioning else None
            self.norm_modulation = ZeroLinear(cond_dim, 2 * dim) if config.conditioned else None
            self.gap_head: InsertionHead | None = None
            if config.gap_head != "none" and config.max_length is not None:
                modulated_by = cond_dim if config.conditioned else None
                self.gap_head = InsertionHead(dim, config.max_length, config.gap_head, cond_dim=modulated_by)
            if config.coordinates:
                places = torch.empty(len(config.coordinates), len(config.coordinates[0]), dtype=torch.int64)
                self.register_buffer("coordinates", places)
        if device.type != "meta":
            self.to_empty(device=device).reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draw all parameters: what a model built on meta needs after `to_empty`."""
        initialize(self, self.config, seed)
        for module in self.modules():
            if isinstance(module, ZeroLinear):
                module.reset_parameters()
        if self.gap_head is not None:
            self.gap_head.reset_output()
        if self.config.coordinates:
            self.coordinates.copy_(torch.tensor(self.config.coordinates))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        t: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cond: Tensor | None = None,
        hidden_states: bool = False,
    ) -> DiffusionTransformerOutput:
        """Return the logits of ids (batch, seq), and with a gap head what is missing in the gaps.

        Args:
            attention_mask: (batch, seq), zero at padding, which is not seen; with a gap head at the right only.
            t: (batch,), what `conditioning` says: the diffusion time, alpha or sigma.
            lengths: (batch,), tokens before the padding, in place of an attention_mask.
            cond: (batch,), another name of t: `FlexMDM` says cond, for a(t), and `MaskedDiffusion` t.
            hidden_states: return them as well.

        Raises:
            ConfigError: shapes disagree, t is missing or superfluous, or (seen on a CPU only) ids, t or lengths are out
                of range.
        """
        if input_ids.ndim != 2:
            raise ConfigError(f"input_ids: got shape {tuple(input_ids.shape)}, expected (batch, seq)")
        batch, seq = input_ids.shape
        shapes: Any = (
            ("attention_mask", attention_mask, (batch, seq)),
            ("t", t, (batch,)),
            ("lengths", lengths, (batch,)),
            ("cond", cond, (batch,)),
        )
        for name, given, expected in shapes:
            if given is not None and given.shape != expected:
                raise ConfigError(f"{name}: got shape {tuple(given.shape)}, expected {expected}")
        if t is not None and cond is not None:
            raise ConfigError("cond: got it beside t, expected one of them")
        real = self._real(input_ids, attention_mask, lengths)
        c = self._condition(input_ids, real, cond if t is None else t)

        ids, seen = input_ids, real
        if self.gap_head is not None and self.config.pad_id is not None:
            real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
            right = real[:, 1:] <= real[:, :-1]
            check_values("attention_mask", real[:, 1:].int(), right, "padding at the right only, beside a gap head")
            ids = F.pad(ids.where(real, self.config.pad_id), (0, 1), value=self.config.pad_id)
            seen = F.pad(real, (1, 0), value=True)  # one more than is real: the terminal slot
        x = self._embed(ids)
        context = Context()
        if seen is not None:
            context.mask = visible(seen, ids.shape[1], causal=False)
        if self.config.position == "rope":
            slots = torch.arange(ids.shape[1], device=ids.device)[None]
            positions = slots if seen is None else (seen.cumsum(1) - 1).clamp(min=0)
            context.rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_base, widen(x[:0]).dtype)
        states = [x]
        for layer in self.model["layers"]:  # type: ignore[attr-defined]
            states.append(layer(states[-1], context, c))

        x = self.model["norm"](states[-1])
        if self.norm_modulation is not None:
            x = modulate(x, *self.norm_modulation(c).chunk(2, dim=-1))
        logits = self.lm_head(x[:, :seq])
        logits[..., self.config.vocab_size :] = -torch.inf
        kept = tuple(states) if hidden_states else ()
        gaps = () if self.gap_head is None else self.gap_head(states[-1], c)
        return DiffusionTransformerOutput(logits, kept, *gaps)

    def _real(self, ids: Tensor, attention_mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        """Return which of ids (batch, seq) are no padding, or None if all are."""
        if lengths is None:
            return None if attention_mask is None else attention_mask.bool()
        if attention_mask is not None:
            raise ConfigError("lengths: got them beside an attention_mask, expected one of them")
        seq = ids.shape[1]
        check_values("lengths", lengths, (lengths >= 0) & (lengths <= seq), f"0 to {seq}")
        return torch.arange(seq, device=ids.device) < lengths[:, None]

    def _embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (batch, seq, d_model) of ids and, with coordinates, of their places."""
        vocab_size = self.config.vocab_size
        check_values("input_ids", ids, (ids >= 0) & (ids < vocab_size), f"0 to {vocab_size - 1}")
        x = self.model["embed_tokens"](ids)
        if self.config.coordinates and ids.shape[1] > self.coordinates.shape[1]:
            raise ConfigError(f"input_ids: got {ids.shape[1]} tokens, expected at most {self.coordinates.shape[1]}")
        for axis, embedding in enumerate(self.coordinate_embeddings):
            x = x + embedding(self.coordinates[axis, : ids.shape[1]])
        return x

    def _condition(self, ids: Tensor, real: Tensor | None, t: Tensor | None) -> Tensor | None:
        """Return what modulates the layers, (batch, cond_dim)."""
        config = self.config
        if (t is None) != (config.conditioning in ("none", "zero")):
            got, expected = ("none", "some") if t is None else ("some", "none")
            raise ConfigError(f"t: got {got}, expected {expected} for conditioning={config.conditioning!r}")
        if self.time_embedding is None:
            return None
        t = torch.zeros(len(ids), device=ids.device) if t is None else widen(t)
        most = torch.inf if config.conditioning == "sigma" else 1
        check_values("t", t, (t >= 0) & (t <= most), f"numbers in [0, {most}] for conditioning={config.conditioning!r}")
        c = self.time_embedding(config.time_scale * t)
        if self.length_embedding is not None and config.max_length is not None:
            lengths = torch.full_like(t, ids.shape[1]) if real is None else real.sum(1).to(t.dtype)
            c = c + self.length_embedding(config.time_scale * lengths / config.max_length)
        return F.silu(c)
