"""The likelihood bound of a masked diffusion model: estimated with a standard error, or exactly for short sequences.

Two estimators of the same number (see `effml_diffusion.corruption`), both for any schedule: "count" draws how many of
the n maskable tokens are masked, "time" draws the mask's level uniformly. Neither loses the levels that a truncated
schedule or a smallest training time leaves out.

Draws are stratified in groups: S draws of a group cover counts (or levels) evenly, from one random offset,

    l_j = (k + floor(j n / S + 1/2) - 1) mod n + 1,     k ~ Unif{1..n},  j = 0..S-1,

so that every l_j is uniform by itself and the group's mean is unbiased. (Rounding half to even *after* adding k, as
LLaDA's code does, yields only even counts wherever j n / S ends in .5: a bias of several percent for short answers.)
Draws within a group are dependent; the standard error is therefore that of the mean of independent groups.

The exact bound sums over all 2^n - 1 non-empty sets of masks, one of l tokens with the weight 1 / (l C(n, l)). It
equals the mean over orders of the chain rule, -E_order sum_k log f(x_k | those before it).

Cost: n_mc forward passes per sequence, in evaluation mode, the head at masked positions only. Cross-entropies are
summed in float64.

Source: arXiv 2502.09992 (LLaDA), appendix and code; the rounding and the standard error are our own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.generation import evaluating
from torch import Tensor

from effml_diffusion.corruption import Corruption, uniform

if TYPE_CHECKING:
    from effml_diffusion.masked_diffusion import MaskedDiffusion

__all__ = ["Bound", "LogLikelihood", "exact_nelbo", "log_likelihood", "nelbo"]

_LONGEST = 16  # tokens of an exact bound: 65,535 forward rows


class Bound(NamedTuple):
    """An estimated upper bound on the negative log-likelihood of each sequence, in nats."""

    nats: Tensor  # (batch,) float64
    stderr: Tensor  # (batch,) float64, standard error of nats; NaN from a single group
    n_tokens: Tensor  # (batch,) int64, maskable tokens
    per_position: Tensor  # (batch, seq) float64, each position's part: it sums to nats

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens) of all sequences together: an upper bound on the perplexity."""
        return math.exp(float(self.nats.sum()) / max(int(self.n_tokens.sum()), 1))


class LogLikelihood(NamedTuple):
    """An estimated lower bound on the log-likelihood of each answer, in nats; its expectation is never above 0."""

    nats: Tensor  # (batch,) float64
    stderr: Tensor  # (batch,) float64


@torch.no_grad()
def nelbo(
    diffusion: MaskedDiffusion,
    x: Tensor,
    *,
    n_mc: int = 128,
    estimator: str = "count",
    groups: int = 8,
    batch_size: int = 64,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    **model_inputs: Any,
) -> Bound:
    """Estimate the bound on -log p(x) of each sequence x (batch, seq), given what is not maskable.

    Args:
        n_mc: draws per sequence, a multiple of groups.
        estimator: `"count"`, or `"time"` of greater variance.
        groups: independent groups of stratified draws; at least 2 for a standard error.
        batch_size: rows per forward pass.
        maskable, attention_mask, model_inputs: as for `MaskedDiffusion.loss`, tensors of model_inputs by row.

    Raises:
        ConfigError: an argument is out of range, or x does not suit the objective.
    """
    check_choice("estimator", estimator, ("count", "time"))
    check_count("groups", groups, 1)
    check_count("batch_size", batch_size, 1)
    check_count("n_mc", n_mc, groups)
    if n_mc % groups:
        raise ConfigError(f"n_mc: got {n_mc}, expected a multiple of groups = {groups}")
    allowed = diffusion.maskable(x, maskable=maskable, attention_mask=attention_mask)
    n_tokens, shape = allowed.sum(1), (len(x), groups, n_mc // groups)
    inputs = {"attention_mask": attention_mask, **model_inputs}
    argument, draw = ("n_masked", _counts) if estimator == "count" else ("mask_level", _levels)
    levels = draw(n_tokens, shape, generator).flatten()

    sums = torch.zeros(len(levels), dtype=torch.float64, device=x.device)
    per_position = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    rows_of_draws = torch.arange(len(x), device=x.device).repeat_interleave(n_mc)
    for draws in torch.arange(len(levels), device=x.device).split(batch_size):
        rows = rows_of_draws[draws]
        level = {argument: levels[draws]}
        corruption = diffusion.corrupt(x[rows], **level, maskable=allowed[rows], generator=generator)
        with evaluating(diffusion.model):
            values = diffusion.per_token(x[rows], corruption, **_take(inputs, rows)).double()
        sums[draws] = values.sum(1)
        per_position.index_add_(0, rows, values / n_mc)
    means = sums.view(shape).mean(2)
    nats = means.mean(1)
    variance = (means - nats[:, None]).square().sum(1) / (groups * (groups - 1))  # 0 / 0 from a single group
    return Bound(nats, variance.sqrt(), n_tokens, per_position)


def log_likelihood(diffusion: MaskedDiffusion, prompt: Tensor, answer: Tensor, **options: Any) -> LogLikelihood:
    """Estimate a lower bound on log p(answer | prompt).

    Args:
        prompt, answer: (batch, seq) with a seq of each their own, or (seq,) for one pair. Only answers are masked.
        options: of `nelbo`.

    Raises:
        ConfigError: shapes disagree; or see `nelbo`.
    """
    prompt, answer = (x[None] if x.ndim == 1 else x for x in (prompt, answer))
    if prompt.ndim != 2 or answer.ndim != 2 or len(prompt) != len(answer):
        shapes = f"{tuple(prompt.shape)} and {tuple(answer.shape)}"
        raise ConfigError(f"prompt, answer: got shapes {shapes}, expected (batch, seq) of one batch")
    maskable = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), torch.ones_like(answer, dtype=torch.bool)], dim=1)
    bound = nelbo(diffusion, torch.cat([prompt, answer], dim=1), maskable=maskable, **options)
    return LogLikelihood(-bound.nats, bound.stderr)


@torch.no_grad()
def exact_nelbo(
    diffusion: MaskedDiffusion,
    x: Tensor,
    *,
    batch_size: int = 1024,
    maskable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **model_inputs: Any,
) -> Tensor:
    """Return the bound on -log p(x) of each sequence x (batch, seq) in nats, without sampling: (batch,) float64.

    Args as for `nelbo`. 2^n - 1 forward rows for n maskable tokens, at most 16.
    """
    check_count("batch_size", batch_size, 1)
    allowed = diffusion.maskable(x, maskable=maskable, attention_mask=attention_mask)
    inputs = {"attention_mask": attention_mask, **model_inputs}
    bounds = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for row in range(len(x)):
        places = allowed[row].nonzero().squeeze(1)
        n = len(places)
        if n > _LONGEST:
            raise ConfigError(
                f"x: got {n} maskable tokens in row {row}, expected at most {_LONGEST} for an exact bound"
            )
        of_size = [0.0] + [1 / (size * math.comb(n, size)) for size in range(1, n + 1)]
        weights = torch.tensor(of_size, dtype=torch.float64, device=x.device)
        for start in range(1, 2**n, batch_size):
            numbers = torch.arange(start, min(start + batch_size, 2**n), device=x.device)
            mask = torch.zeros(len(numbers), x.shape[1], dtype=torch.bool, device=x.device)
            mask[:, places] = (numbers[:, None] >> torch.arange(n, device=x.device)) % 2 == 1
            rows = torch.full_like(numbers, row)
            clean, size = x[rows], mask.sum(1)
            z, t = clean.masked_fill(mask, diffusion.mask_id), diffusion.schedule.inverse(1 - size.double() / n)
            corruption = Corruption(z, mask, t, weights[size], allowed[rows])
            with evaluating(diffusion.model):
                bounds[row] += diffusion.per_token(clean, corruption, **_take(inputs, rows)).double().sum()
    return bounds


def _take(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _counts(n_tokens: Tensor, shape: tuple[int, int, int], generator: torch.Generator | None) -> Tensor:
    """Draw how many of n_tokens (batch,) are masked, in 1..n_tokens: (batch, groups, strata) int64; 0 for none."""
    n = n_tokens.clamp(min=1)[:, None, None]
    first = (uniform((*shape[:2], 1), n.device, generator) * n).long()  # k - 1
    steps = (2 * torch.arange(shape[2], device=n.device) * n + shape[2]) // (2 * shape[2])  # floor(j n / S + 1/2)
    return torch.where(n_tokens[:, None, None] > 0, (first + steps) % n + 1, 0)


def _levels(n_tokens: Tensor, shape: tuple[int, int, int], generator: torch.Generator | None) -> Tensor:
    """Draw levels on (0, 1], one per stratum of a group: (batch, groups, strata) float64."""
    strata = torch.arange(1, shape[2] + 1, device=n_tokens.device)
    return (strata - uniform(shape, n_tokens.device, generator)) / shape[2]
