"""Find the width at which a Transformer costs as much as another: in parameters, FLOPs, cache bytes or anything else.

Comparing architectures fairly means holding one cost fixed and letting the width follow. Head size, query heads per
key head and the ratio d_ff / d_model stay as they are, so a width is a multiple of a whole group of heads. The cost
must grow with the width; it is bisected, at O(log width) evaluations of closed formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.layers import TransformerConfig
from effml_shared.transformer_costs import count_params

__all__ = ["match_width", "with_width"]

Cost = Callable[[TransformerConfig], float]

body_params = partial(count_params, embeddings=False)

_LARGEST = 1 << 24  # channels; beyond, the cost does not follow the width


def with_width(config: TransformerConfig, d_model: int) -> TransformerConfig:
    """Return the configuration at another width, with heads of the same size in groups of the same size.

    Raises:
        ConfigError: the width is no multiple of the channels of one group of heads.
    """
    group = config.n_heads // config.kv_heads
    if d_model < 1 or d_model % (config.head_dim * group):
        raise ConfigError(f"d_model: got {d_model}, expected a multiple of {config.head_dim * group}, a group of heads")
    n_heads = d_model // config.head_dim
    return replace(
        config,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=None if config.n_kv_heads is None else n_heads // group,
        d_ff=None if config.d_ff is None else max(1, round(config.d_ff * d_model / config.d_model)),
    )


def match_width(
    config: TransformerConfig,
    target: float,
    *,
    cost: Cost = body_params,
    multiple: int = 64,
    rounding: str = "nearest",
) -> TransformerConfig:
    """Return the configuration at the width whose cost is nearest to a target.

    Args:
        config: depth, head size and everything else; its width does not matter.
        target: the cost to meet, as of a reference model: `cost(reference)`.
        cost: of a configuration, growing with its width, such as `count_params`, `kv_bytes` or
            `partial(forward_flops, seq_len=512)`; by default the parameters outside embedding and head.
        multiple: widths are multiples of it and of a group of heads.
        rounding: nearest (the narrower of two equally near) | floor (at most the target) | ceil (at least).

    Raises:
        ConfigError: an option is out of range, or every width exceeds the target when it is to be met from below.

    >>> from effml_arch.presets import preset
    >>> match_width(preset("olmo-150m-6l"), 151_045_120, rounding="floor").d_model
    1408
    """
    check_count("multiple", multiple, 1)
    check_choice("rounding", rounding, ("nearest", "floor", "ceil"))
    if not 0 < target < math.inf:
        raise ConfigError(f"target: got {target}, expected a finite number > 0")
    unit = math.lcm(multiple, config.head_dim * (config.n_heads // config.kv_heads))

    def at(units: int) -> float:
        return cost(with_width(config, units * unit))

    above = 1
    while at(above) < target:
        above *= 2
        if above * unit > _LARGEST:
            raise ConfigError(f"target: got {target}, expected a cost that widths up to {_LARGEST} reach")
    below = above // 2  # its cost is less than the target; 0 units: no model at all
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if at(middle) < target else (below, middle)
    if rounding == "floor" and at(above) > target:
        if not below:
            raise ConfigError(f"target: got {target}, expected at least {at(1)}, the cost of width {unit}")
        above = below
    elif rounding == "nearest" and below and target - at(below) <= at(above) - target:
        above = below
    return with_width(config, above * unit)
