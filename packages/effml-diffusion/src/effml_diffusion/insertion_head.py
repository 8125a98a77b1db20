"""The head that says how many tokens are missing in each gap of a text, for FlexMDM.

    u = W_2 gelu(W_1 adaLN(h) + b_1) + b_2

    "expectation"    one number per gap: g = scale softplus(u), trained by a divergence
    "distribution"   scale + 1 logits per gap, over the number n = 0 .. scale itself, trained by cross-entropy

Both start without a preference: W_2 = 0, with b_2 such that g is `initial_gap` everywhere (the papers' code starts at
0.69 scale, hundreds of tokens per gap), or the uniform law. An expectation's last product is computed in float32
or wider also under autocast, since g is exponential in u, and ln g is returned too: it is finite where g underflows.

Cost: 2 d^2 + 2 d FLOPs per gap, or 2 d^2 + 2 d (scale + 1). Source: arXiv 2509.01025 and its code; the distribution is
an alternative of the paper's re-implementations; the start is our own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.layers import LayerNorm
from effml_shared.tensors import widen
from torch import Tensor, nn

from effml_diffusion.modulation import ZeroLinear, modulate

__all__ = ["INSERTION_HEADS", "GapPrediction", "InsertionHead"]

INSERTION_HEADS = ("expectation", "distribution")


class GapPrediction(NamedTuple):
    """Missing tokens of gaps, in float32 or wider: the first two of an expectation, the last of a distribution."""

    gaps: Tensor | None  # (batch, n_gaps), expected number, at least 0
    log_gaps: Tensor | None  # (batch, n_gaps), its natural logarithm
    gap_logits: Tensor | None  # (batch, n_gaps, scale + 1)


class InsertionHead(nn.Module):
    """Predict the missing tokens of gaps from hidden states (batch, n_gaps, d_model).

    Args:
        d_model: channels of the hidden states.
        scale: the most tokens that can be missing in a gap, that is the longest text.
        kind: `"expectation"` or `"distribution"`.
        cond_dim: channels of the embedding that modulates the norm; None: a norm that nothing modulates.
        initial_gap: tokens that an expectation starts with, everywhere. With linear schedules, half of n tokens are
            missing from n / 2 + 1 gaps on average.

    Raises:
        ConfigError: a size is below 1, the kind is unknown, or initial_gap is not above 0.

    >>> InsertionHead(8, scale=64)(torch.zeros(1, 3, 8)).gaps.detach()
    tensor([[1.0000, 1.0000, 1.0000]])
    """

    def __init__(
        self,
        d_model: int,
        scale: int,
        kind: str = "expectation",
        *,
        cond_dim: int | None = None,
        initial_gap: float = 1.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model, 1)
        check_count("scale", scale, 1)
        check_choice("kind", kind, INSERTION_HEADS)
        if not 0 < initial_gap < math.inf:
            raise ConfigError(f"initial_gap: got {initial_gap}, expected a number above 0")
        self.scale, self.kind, self.initial_gap = scale, kind, initial_gap
        self.norm = LayerNorm(d_model, norm_eps)
        self.modulation = None if cond_dim is None else ZeroLinear(cond_dim, 2 * d_model)
        self.hidden = nn.Linear(d_model, d_model)
        self.output = ZeroLinear(d_model, 1 if kind == "expectation" else scale + 1)
        self.reset_output()

    @torch.no_grad()
    def reset_output(self) -> None:
        """Forget all preferences: predict the same at every gap, as the module explains."""
        share = self.initial_gap / self.scale
        start = share + math.log(-math.expm1(-share))  # softplus(start) = share
        self.output.reset_parameters()
        if self.kind == "expectation":
            self.output.bias.fill_(start)
        if self.modulation is not None:
            self.modulation.reset_parameters()

    def forward(self, hidden: Tensor, c: Tensor | None = None) -> GapPrediction:
        """Return what is missing in gaps: hidden (batch, n_gaps, d_model), c (batch, cond_dim) if the norm has one."""
        x = self.norm(hidden)
        if self.modulation is not None:
            if c is None:
                raise ConfigError("c: got None, expected the embedding (batch, cond_dim) that modulates the norm")
            x = modulate(x, *self.modulation(c).chunk(2, dim=-1))
        x = F.gelu(self.hidden(x))
        if self.kind == "distribution":
            return GapPrediction(None, None, widen(self.output(x)))
        u = (widen(x) * widen(self.output.weight)).sum(-1) + widen(self.output.bias)  # no product to autocast
        tiny = u < -37  # there softplus is the exponential, in every bit of a float64, and later underflows
        log_softplus = torch.where(tiny, u, F.softplus(u.masked_fill(tiny, 0.0)).log())
        return GapPrediction(self.scale * F.softplus(u), math.log(self.scale) + log_softplus, None)
