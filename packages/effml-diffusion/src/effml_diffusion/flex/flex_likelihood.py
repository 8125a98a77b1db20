"""Bounds on the likelihood of a text under FlexMDM, its length included: estimated with a standard error, or exactly.

    NELBO(x) = Int_0^1 E [ h_b sum_{i mask} -log f[i, x_i]  +  h_a sum_gaps (g - n - n ln g) ] dt        nats

from the density of the generating Markov chain's paths (derived here). It is tight: with the best f and g its mean is
the entropy of the data *including the length*, so it compares with an autoregressive model that has an end-of-text
token. The trained phi is larger by a constant of the data, E Int h_a sum n ln n dt.

A network whose g does not vanish as t -> 1 expects infinitely many insertions, and its bound is infinite: integrals end
at `t_end`, and grow by g with every factor e that is taken off 1 - t_end. What tokens cost there is lost, about
(1 - t_end) (1 - ln(1 - t_end)) of the whole.

At uniform times, the estimate would have an infinite variance, since rates grow as 1 / (1 - t); they are drawn with
1 - t = w^2, w uniform. Draws of a group are stratified, and the standard error is that of the mean of independent
groups. The exact bound sums over the 3^n ways in which n tokens are absent, masked or clean, at the nodes of a
quadrature.

Cost: n_mc forward rows per text; 3^n times nodes for the exact bound. Sums are float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.generation import evaluating
from torch import Tensor

from effml_diffusion.corruption import uniform
from effml_diffusion.flex.flex_state import FlexState
from effml_diffusion.flex.interpolant import gauss_legendre

if TYPE_CHECKING:
    from effml_diffusion.flex.flex_mdm import FlexMDM
    from effml_diffusion.flex.rows import Rows
    from effml_diffusion.flex.texts import Flags

__all__ = ["FlexBound", "exact_nelbo", "nelbo"]

_LONGEST = 8  # tokens of an exact bound: 6561 states at every node


class FlexBound(NamedTuple):
    """An upper bound on the negative log-likelihood of each text, in nats, its length included."""

    nats: Tensor  # (batch,) float64, unmask + insert
    stderr: Tensor  # (batch,) float64, standard error of nats; NaN from a single group, 0 if exact
    n_tokens: Tensor  # (batch,) int64, tokens that are not given
    unmask: Tensor  # (batch,) float64: the part of what the tokens are
    insert: Tensor  # (batch,) float64: the part of where tokens are, and how many; may be negative

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens) of all texts together."""
        return math.exp(float(self.nats.sum()) / max(int(self.n_tokens.sum()), 1))


@torch.no_grad()
def nelbo(
    flex: FlexMDM,
    x: Rows,
    *,
    n_mc: int = 128,
    groups: int = 8,
    batch_size: int = 64,
    t_end: float = 1 - 1e-8,
    fixed: Flags | None = None,
    closed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> FlexBound:
    """Estimate the bound on -log p(x) of each text, given its fixed tokens.

    Args:
        x, fixed, closed: as for `FlexMDM.texts`.
        n_mc: draws per text, a multiple of groups.
        groups: independent groups of stratified draws; at least 2 for a standard error.
        batch_size: rows per forward pass.
        t_end: where the integral over t ends.

    Raises:
        ConfigError: an argument is out of range, or a schedule does not run from 0 to 1.
    """
    check_count("groups", groups, 1)
    check_count("batch_size", batch_size, 1)
    check_count("n_mc", n_mc, groups)
    if n_mc % groups:
        raise ConfigError(f"n_mc: got {n_mc}, expected a multiple of groups = {groups}")
    _check_ends(flex, t_end)
    texts = flex.texts(x, fixed, closed)
    batch, device, strata = len(texts.ids), texts.ids.device, n_mc // groups
    u = (uniform((batch, groups, strata), device, generator) + torch.arange(strata, device=device)) / strata
    flow_t, weight = _times(u.flatten(), 2, t_end)
    sums = torch.zeros(2, len(flow_t), dtype=torch.float64, device=device)
    rows_of_draws = torch.arange(batch, device=device).repeat_interleave(n_mc)
    with evaluating(flex.model):
        for draws in torch.arange(len(flow_t), device=device).split(batch_size):
            state = flex.corrupt(texts.take(rows_of_draws[draws]), flow_t=flow_t[draws], generator=generator)
            sums[:, draws] = weight[draws] * _integrand(flex, state)
    means = sums.view(2, batch, groups, strata).mean(3)
    total = means.sum(0)
    stderr = total.std(1) / groups**0.5 if groups > 1 else torch.full_like(total[:, 0], math.nan)
    unmask, insert = means.mean(2)
    return FlexBound(unmask + insert, stderr, texts.n_free, unmask, insert)


@torch.no_grad()
def exact_nelbo(
    flex: FlexMDM,
    x: Rows,
    *,
    nodes: int = 32,
    batch_size: int = 4096,
    t_end: float = 1 - 1e-8,
    fixed: Flags | None = None,
    closed: Tensor | None = None,
) -> FlexBound:
    """Return the bound on -log p(x) of each text without sampling, up to the error of the quadrature.

    Args as for `nelbo`; at most 8 tokens that are not given.
    """
    check_count("nodes", nodes, 2)
    check_count("batch_size", batch_size, 1)
    _check_ends(flex, t_end)
    texts = flex.texts(x, fixed, closed)
    most = max(texts.n_free.tolist(), default=0)
    if most > _LONGEST:
        raise ConfigError(f"x: got {most} tokens that are not given, expected at most {_LONGEST} for an exact bound")
    device = texts.ids.device
    u, weight = (part.to(device) for part in gauss_legendre(nodes))
    flow_t, slope = _times(u, 4, t_end)  # smooth at t = 1, where the integrand is not
    weight = weight * slope
    chance = flex.interpolant.state_probabilities(flow_t)
    parts = torch.zeros(2, len(texts.ids), dtype=torch.float64, device=device)
    with evaluating(flex.model):
        for row in range(len(texts.ids)):
            free = (~texts.fixed[row, : int(texts.lengths[row])]).nonzero().squeeze(1)
            states = 3 ** len(free)
            for cases in torch.arange(states * nodes, device=device).split(batch_size):
                node, number = cases // states, cases % states
                digits = number[:, None] // 3 ** torch.arange(len(free), device=device) % 3  # absent, mask, clean
                kind = torch.full((len(cases), texts.ids.shape[1]), 2, device=device)
                kind[:, free] = digits
                state = flex.observe(texts.take(torch.full_like(cases, row)), kind > 0, kind == 1, flow_t[node])
                probability = chance[node[:, None], digits].prod(1)
                parts[:, row] += (weight[node] * probability * _integrand(flex, state)).sum(1)
    unmask, insert = parts
    return FlexBound(unmask + insert, torch.zeros_like(unmask), texts.n_free, unmask, insert)


def _times(u: Tensor, power: int, t_end: float) -> tuple[Tensor, Tensor]:
    """Map u in [0, 1] to times from t_end to 0, with 1 - t a power of what is linear in u; return |dt / du| too."""
    first = (1 - t_end) ** (1 / power)
    w = first + (1 - first) * u
    return 1 - w**power, (1 - first) * power * w ** (power - 1)


def _integrand(flex: FlexMDM, state: FlexState) -> Tensor:
    """Return the integrand at noisy texts, its parts at masks and at gaps: (2, batch) float64."""
    terms, interpolant = flex.terms(state), flex.interpolant
    unmask = interpolant.unmask.rate(state.flow_t) * terms.cross_entropy.double().sum(1)
    return torch.stack([unmask, interpolant.insert.rate(state.flow_t) * terms.insertion_nll.double()])


def _check_ends(flex: FlexMDM, t_end: float) -> None:
    check_range("t_end", t_end, 0.0, 1.0)
    interpolant = flex.interpolant
    for name, one in (("insert", interpolant.insert), ("unmask", interpolant.unmask)):
        if not one.complete:
            raise ConfigError(
                f"{name}: got {one.schedule}, expected a schedule from 0 to 1, since no bound exists else"
            )
