"""How far the gradient that low precision computes is from the exact one, at the same weights and the same batch.

    g exact, g~ computed under a scheme, e = g~ - g = zeta g       for some matrix zeta, of which only a bound shows:
    rho = |e| / |g| <= |zeta|    r = |g~| / |g|    cos = <g~, g> / (|g~| |g|)    rho^2 = 1 + r^2 - 2 r cos

rho < 1 makes -g~ a direction of descent; from 1 on it may be none, and rho = 2 is reached by g~ = -g. On a direction of
curvature lambda at learning rate eta, a constant zeta is stable iff -1 < zeta < 2 / (eta lambda) - 1, so at the edge of
stability any zeta > 0 diverges. (That divergence sets in near rho = 2 is said of a plot of the paper that we could not
check. The authors' code logs rho^2, of two runs at different weights: see `trajectory_bias`.)

Both gradients come from passes of their own under one random state; nothing of the training is disturbed. Sums are in
float64, per group, and add up over groups and batches. State: none. Cost: two forward and backward passes per batch,
and one more copy of the gradients; one more pass per role in a decomposition.

Source: arXiv 2506.20752, its section on multiplicative gradient bias; the bounds above are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from effml_shared import distributed, seeding
from effml_shared.errors import ConfigError
from effml_shared.steps import Loss
from torch import Tensor, nn

from effml_quant.instability.probes import Probe, undisturbed
from effml_quant.precision.scheme import ROLES, PrecisionScheme

if TYPE_CHECKING:
    from effml_quant.precision.application import ModelHandle

__all__ = ["GradientBias", "GradientBiasMeter", "compare_gradients", "isolate", "roles_of"]

Groups = str | Callable[[str], str]


class GradientBias(NamedTuple):
    """Sums over the entries of two gradients; those of two groups or batches add up with `+`.

    Attributes:
        exact, quantised, error: |g|^2, |g~|^2 and |g~ - g|^2.
        product: <g~, g>.
        error_sum: sum of g~ - g.
        entries: how many.
    """

    exact: float = 0.0
    quantised: float = 0.0
    error: float = 0.0
    product: float = 0.0
    error_sum: float = 0.0
    entries: int = 0

    def __add__(self, other: GradientBias) -> GradientBias:  # type: ignore[override]
        return GradientBias._make(a + b for a, b in zip(self, other, strict=True))

    @property
    def rho(self) -> float:
        """|g~ - g| / |g|, a lower bound of |zeta|; infinite where only g is 0, 0 where both are."""
        if self.exact > 0 or math.isnan(self.exact):
            return math.sqrt(self.error / self.exact)
        return 0.0 if self.error == 0 else math.inf

    @property
    def ratio(self) -> float:
        """|g~| / |g|."""
        if self.exact > 0 or math.isnan(self.exact):
            return math.sqrt(self.quantised / self.exact)
        return 1.0 if self.quantised == 0 else math.inf

    @property
    def cos(self) -> float:
        """Cosine of the angle between both; NaN where one is 0."""
        norms = math.sqrt(self.exact) * math.sqrt(self.quantised)
        return self.product / norms if norms else math.nan

    @property
    def mean_bias(self) -> float:
        """Mean of g~ less mean of g."""
        return self.error_sum / max(self.entries, 1)


@torch.no_grad()
def compare_gradients(
    exact: Mapping[str, Tensor | None], quantised: Mapping[str, Tensor | None], groups: Groups = "module"
) -> dict[str, GradientBias]:
    """Compare two gradients by parameter name, group by group.

    Args:
        exact, quantised: by the same names; None is a gradient of zeros.
        groups: `"module"` (the module that owns the parameter), `"parameter"`, or a function from name to group.

    Raises:
        ConfigError: the names differ.

    >>> g = {"layer.weight": torch.tensor([3.0, 4.0])}
    >>> compare_gradients(g, {"layer.weight": torch.tensor([3.0, 4.0]) * 1.5})["layer"].rho
    0.5
    """
    if exact.keys() != quantised.keys():
        differ = sorted(set(exact) ^ set(quantised))
        raise ConfigError(f"gradients: got {differ[0]!r} in one of the two only, expected the same parameters")
    group_of = _grouping(groups)
    sums, owners = [], []
    for name, g in exact.items():
        q = quantised[name]
        if g is None and q is None:
            continue
        g = torch.zeros_like(q) if g is None else g  # type: ignore[arg-type]
        q = torch.zeros_like(g) if q is None else q
        wide, other = g.double(), q.double()
        error = other - wide
        terms = (wide * wide, other * other, error * error, other * wide, error)
        sums.append(torch.stack([_whole(term.sum()) for term in terms]))
        owners.append((group_of(name), g.numel()))
    found: dict[str, GradientBias] = {}
    if sums:
        device = sums[0].device
        for (group, entries), row in zip(owners, torch.stack([s.to(device) for s in sums]).tolist(), strict=True):
            found[group] = found.get(group, GradientBias()) + GradientBias._make([*row, entries])
    return found


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if distributed.is_sharded(value) else value


def _grouping(groups: Groups) -> Callable[[str], str]:
    if callable(groups):
        return groups
    if groups not in ("module", "parameter"):
        raise ConfigError(f"groups: got {groups!r}, expected 'module', 'parameter' or a function of the name")
    return (lambda name: name) if groups == "parameter" else lambda name: name.rpartition(".")[0]


def roles_of(scheme: PrecisionScheme) -> list[str]:
    """Return the roles that a scheme quantises."""
    backward = ("w_bwd", "a_bwd", "g_dw", "g_dx")
    roles = [role for role in ROLES if scheme.format(role) is not None]
    return roles if scheme.quantize_backward else [role for role in roles if role not in backward]


def isolate(scheme: PrecisionScheme, *roles: str) -> PrecisionScheme:
    """Return the scheme with these roles alone quantised, each in the format that it had.

    >>> isolate(PrecisionScheme.mx("mxfp4"), "g_dx").a_fwd is None
    True
    """
    kept = {role: scheme.format(role) for role in roles}
    return scheme.replace(**{role: kept.get(role) for role in ROLES})


class GradientBiasMeter(Probe):
    """Measure the bias of the gradient at the weights of the moment.

    The readings are `bias/rho`, `bias/ratio`, `bias/cos` and, with `detail`, `bias/rho/GROUP` for every group.

    Args:
        handle: of the model, from `apply_scheme`; the scheme it has when it is measured is compared with none.
        loss: `loss(model, batch)`: sum of the terms, and their number.
        every, batches: see `Probe`.
        groups: see `compare_gradients`.
        detail: readings per group too.

    An optimizer that steps inside of the backward pass must be switched off while this measures.
    """

    def __init__(
        self,
        handle: ModelHandle,
        loss: Loss,
        *,
        every: int = 100,
        batches: Sequence[Any] | None = None,
        groups: Groups = "module",
        detail: bool = False,
    ) -> None:
        super().__init__(every, batches)
        _grouping(groups)
        self.handle, self.loss, self.groups, self.detail = handle, loss, groups, detail

    def compare(
        self, *batches: Any, schemes: Mapping[str, PrecisionScheme | None]
    ) -> dict[str, dict[str, GradientBias]]:
        """Return the bias under each of several schemes, by group, pooled over batches.

        Args:
            batches: what `loss` takes. Pooled is the sum of squares: rho^2 = sum |e|^2 / sum |g|^2.
            schemes: by any names; None is no quantising, and has none.
        """
        if not batches:
            raise ConfigError("batches: got none, expected at least one")
        found: dict[str, dict[str, GradientBias]] = {name: {} for name in schemes}
        with undisturbed(self.handle.model):
            random = seeding.capture()
            for batch in batches:
                exact = self._gradients(batch, None, random)
                for name, scheme in schemes.items():
                    quantised = self._gradients(batch, scheme, random)
                    for group, bias in compare_gradients(exact, quantised, self.groups).items():
                        found[name][group] = found[name].get(group, GradientBias()) + bias
        return found

    def decompose(self, *batches: Any, scheme: PrecisionScheme | None = None) -> dict[str, GradientBias]:
        """Return what each role's quantising does alone, and all of them (`"all"`), over all parameters.

        The squares need not add up to that of all: roles compensate or amplify one another.

        Args:
            scheme: None: the one that the model has.

        Raises:
            ConfigError: there is no scheme.
        """
        scheme = scheme or self.handle.scheme
        if scheme is None:
            raise ConfigError("scheme: got None on a model without one, expected a PrecisionScheme")
        schemes = {"all": scheme, **{role: isolate(scheme, role) for role in roles_of(scheme)}}
        return {name: total(groups) for name, groups in self.compare(*batches, schemes=schemes).items()}

    def measure(self, *batches: Any) -> dict[str, float]:
        """Return the readings under the scheme that the model has."""
        (groups,) = self.compare(*batches, schemes={"": self.handle.scheme}).values()
        bias = total(groups)
        readings = {"bias/rho": bias.rho, "bias/ratio": bias.ratio, "bias/cos": bias.cos}
        return readings | {f"bias/rho/{group}": part.rho for group, part in groups.items() if self.detail}

    def _gradients(
        self, batch: Any, scheme: PrecisionScheme | None, random: Mapping[str, Any]
    ) -> dict[str, Tensor | None]:
        model = self.handle.model
        model.zero_grad(set_to_none=True)
        seeding.restore(dict(random))
        with torch.enable_grad(), self.handle.using(scheme):
            terms, count = self.loss(model, batch)
            terms.backward()
        # Divided afterwards, as `GradientStep` does it: what is quantised in the backward pass is of the same size.
        scale = 1 / max(float(count), 1.0)
        found = {name: p.grad for name, p in _trained(model)}
        return {name: None if grad is None else grad * scale for name, grad in found.items()}


def total(groups: Mapping[str, GradientBias]) -> GradientBias:
    """Return the sums over all groups."""
    return sum(groups.values(), GradientBias())


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
