"""The exact symmetry of a norm with the linear layers that read it: gamma <- a gamma, beta <- a beta, W <- W / a.

The function that the model computes stays what it is (to rounding; bitwise where a is a power of two), but which gains
of a block share a code, and whether they saturate, does not: the symmetry tells what low precision does to a gain from
what the gain does. With a = 1 / gamma it folds gains into the weights, where no quantiser of gains finds them.
State: none. Cost: one pass over the gains and weights. Derived here; the effect on gains is that of arXiv 2506.20752.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from effml_shared.errors import ConfigError
from torch import Tensor, nn

__all__ = ["fold_gains", "rescale_gains"]

Readers = nn.Linear | Sequence[nn.Linear]


@torch.no_grad()
def rescale_gains(pairs: Iterable[tuple[nn.Module, Readers]], factor: float | Tensor) -> None:
    """Multiply gains (and biases) of norms by a factor and divide it out of the columns of what reads them, in place.

    Args:
        pairs: each norm with the one linear layer, or all those, that read its output. Nothing else may read it.
        factor: > 0 or < 0, one for all features or one per feature, (features).

    Raises:
        ConfigError: a norm has no gain, a shape does not fit, or a factor is 0 or not finite; nothing was changed.

    >>> norm, linear = nn.LayerNorm(4), nn.Linear(4, 2)
    >>> x = torch.randn(3, 4)
    >>> before = linear(norm(x))
    >>> rescale_gains([(norm, linear)], 2.0)
    >>> torch.equal(linear(norm(x)), before)
    True
    """
    a = torch.as_tensor(factor)
    if not bool((a.isfinite() & (a != 0)).all()):
        raise ConfigError(f"factor: got {factor}, expected finite numbers other than 0")
    checked = [_check(norm, readers, a) for norm, readers in pairs]
    for gain, bias, layers in checked:
        scale = a.to(gain)
        for parameter in (gain, bias):
            if parameter is not None:
                parameter.mul_(scale)
        for layer in layers:
            layer.weight.div_(scale)


@torch.no_grad()
def fold_gains(pairs: Iterable[tuple[nn.Module, Readers]]) -> None:
    """Make every gain 1 by moving it into the weights that read it, in place; biases of the norm are divided.

    Raises:
        ConfigError: as `rescale_gains`; a gain of 0 cannot be moved.
    """
    checked = [(norm, *_check(norm, readers, torch.ones(()))) for norm, readers in pairs]
    if not all(bool(((gain != 0) & gain.isfinite()).all()) for _, gain, _, _ in checked):
        raise ConfigError("pairs: got a norm with gains that are 0 or not finite, expected others")
    for norm, gain, _, layers in checked:
        rescale_gains([(norm, layers)], 1 / gain.double())
        gain.fill_(1.0)  # gamma x 1 / gamma is 1 to rounding only


def _check(norm: nn.Module, readers: Readers, factor: Tensor) -> tuple[Tensor, Tensor | None, Sequence[nn.Linear]]:
    """Return a norm's gain and bias, and its readers, or raise."""
    layers = [readers] if isinstance(readers, nn.Module) else list(readers)
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        raise ConfigError(f"pairs: got a {type(norm).__name__} without a gain (features), expected a norm that has one")
    if factor.ndim > 1 or (factor.ndim == 1 and factor.shape != weight.shape):
        raise ConfigError(f"factor: got shape {tuple(factor.shape)}, expected one number or ({len(weight)},)")
    for layer in layers:
        if not isinstance(layer, nn.Linear) or layer.in_features != len(weight):
            raise ConfigError(
                f"pairs: got {layer} behind {len(weight)} features, expected an nn.Linear that reads them"
            )
    return weight, getattr(norm, "bias", None), layers
