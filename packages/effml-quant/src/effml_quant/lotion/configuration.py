"""What LOTION needs to be told: how weights will be cast, how strongly training prepares for it, and which weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_quant.formats import Format
from effml_quant.lotion.curvature import CURVATURES
from effml_quant.lotion.variance import check_quantizer
from effml_quant.quantizer import Quantizer
from effml_quant.selection import WeightFilter, select_weights

__all__ = ["LotionConfig", "choose_weights"]


@dataclass(frozen=True)
class LotionConfig:
    """What is quantised later, and how strongly training prepares for it."""

    format: str | Format = "int4"  # as in `effml_quant.formats`
    granularity: str | tuple[str, int] | None = None  # "tensor", "channel", ("group", size); None: the format's own
    scale: str = "continuous"  # or "format": the standard's rounded scales, under which guarantees are lost
    strength: float = 1.0  # of the penalty
    curvature: str = "empirical_fisher"  # see `effml_quant.lotion.curvature`
    beta: float = 0.95  # decay of the curvature's average, per update
    batch_correction: str | int | None = "tokens"  # N: "tokens" (what accumulate is told), a fixed number, None (1)
    through_scale: bool = True  # let the penalty's gradient see that scales follow the largest weights
    coupled: bool = True  # add the gradient before the optimizer's step; False: w -= lr grad R after it
    every: int = 1  # steps between updates of the curvature
    warmup: int = 0  # steps over which the strength rises from 0, linearly

    def __post_init__(self) -> None:
        check_range("strength", self.strength, 0.0)
        check_choice("curvature", self.curvature, CURVATURES)
        check_range("beta", self.beta, 0.0, 1.0)
        if self.batch_correction not in ("tokens", None):
            check_count("batch_correction", self.batch_correction, 1)
        check_count("every", self.every, 1)
        check_count("warmup", self.warmup, 0)
        check_quantizer(self.quantizer)

    @property
    def quantizer(self) -> Quantizer:
        """What `cast` and the penalty take. Power-of-two scales saturate nothing, so that rounding stays unbiased."""
        return Quantizer(self.format, granularity=self.granularity, scale=self.scale, scale_rule="rceil")


def choose_weights(model: nn.Module | Iterable[Any], filter: WeightFilter | None) -> dict[str, nn.Parameter]:
    """Return the weights to train for, by name, frozen ones left out and tied ones once.

    Args:
        model: a module, or parameters, or (name, parameter) pairs.
        filter: of modules; None: inner linear and convolution layers.

    Raises:
        ConfigError: there is none, or one is not floating.
    """
    if isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", model)  # a compiled module
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
        named = list(select_weights(inner, filter).items())
    else:
        if filter is not None:
            raise ConfigError("filter: got one for bare parameters, expected a module to choose from")
        named = [item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(model)]
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, weight in named:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise ConfigError(f"{name}: got {got}, expected a floating parameter")
        if weight.requires_grad and id(weight) not in seen:
            seen.add(id(weight))
            chosen[name] = weight
    if not chosen:
        raise ConfigError("model: got no weight that requires a gradient, expected at least one")
    return chosen
