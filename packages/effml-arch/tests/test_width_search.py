from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
from effml_arch.cost_ledger import rt_cost
from effml_arch.presets import preset
from effml_arch.width_search import body_params, match_width, with_width
from effml_shared.errors import ConfigError
from effml_shared.layers import TransformerConfig
from effml_shared.transformer_costs import count_params, forward_flops, kv_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

SIX = preset("olmo-150m-6l")


def test_the_papers_six_layer_model_is_the_widest_below_the_twelve_layer_one() -> None:
    target = body_params(preset("olmo-150m"))
    assert target == 151_045_120
    nearest, floor = match_width(SIX, target), match_width(SIX, target, rounding="floor")
    assert (nearest.d_model, body_params(nearest)) == (1472, 156_045_248)
    assert (floor.d_model, body_params(floor)) == (1408, 142_772_608)
    assert floor == SIX
    assert match_width(SIX, target, rounding="ceil") == nearest


def test_other_costs_are_matched_too() -> None:
    wide = match_width(SIX, kv_bytes(preset("olmo-150m")), cost=kv_bytes)
    assert (wide.d_model, kv_bytes(wide)) == (2048, 49_152)
    flops = partial(forward_flops, seq_len=512)
    same = match_width(preset("olmo-300m", d_model=64, n_heads=1, d_ff=256), flops(preset("olmo-300m")), cost=flops)
    assert same == preset("olmo-300m")


def test_a_recurrent_model_of_as_many_flops_is_narrower() -> None:
    plain = preset("olmo-150m")
    narrower = match_width(plain, forward_flops(plain, 512), cost=lambda c: rt_cost(c, 512).forward_flops)
    assert narrower.d_model == 960


def test_groups_of_heads_and_the_ratio_of_the_mlp_stay() -> None:
    config = TransformerConfig(n_layers=2, d_model=96, n_heads=6, n_kv_heads=2, d_ff=240)
    wider = with_width(config, 192)
    assert (wider.n_heads, wider.kv_heads, wider.head_dim, wider.d_ff) == (12, 4, 16, 480)
    default = with_width(replace(config, n_kv_heads=None, d_ff=None), 192)
    assert (default.n_kv_heads, default.d_ff) == (None, None)
    assert match_width(config, 1e6, multiple=64).d_model % 192 == 0  # lcm(64, 3 heads of 16)
    with pytest.raises(ConfigError, match=r"d_model: got 128, expected a multiple of 48"):
        with_width(config, 128)
    with pytest.raises(ConfigError, match=r"d_model: got 0"):
        with_width(config, 0)


@settings(deadline=None)
@given(
    target=st.integers(1, 10**9),
    multiple=st.sampled_from([1, 16, 64, 96]),
    heads=st.sampled_from([(4, None), (4, 2), (8, 1), (1, None)]),
    mlp=st.sampled_from(["gelu", "swiglu"]),
    d_ff=st.sampled_from([None, 100]),
)
def test_equals_a_search_through_all_widths(
    target: int, multiple: int, heads: tuple[int, int | None], mlp: str, d_ff: int | None
) -> None:
    config = TransformerConfig(n_layers=3, d_model=64, n_heads=heads[0], n_kv_heads=heads[1], mlp=mlp, d_ff=d_ff)
    unit = math.lcm(multiple, 64 // heads[0] * (heads[0] // (heads[1] or heads[0])))
    widths = [unit]
    while count_params(with_width(config, widths[-1])) < target:
        widths.append(widths[-1] + unit)
    costs = {width: count_params(with_width(config, width)) for width in widths[-2:]}  # the last is the first above
    search = partial(match_width, config, target, cost=count_params, multiple=multiple)
    assert search(rounding="ceil").d_model == widths[-1]
    assert search().d_model == min(costs, key=lambda width: abs(costs[width] - target))
    below = [width for width in costs if costs[width] <= target]
    if below:
        assert search(rounding="floor").d_model == max(below)
    else:
        with pytest.raises(ConfigError, match=r"target: got .* expected at least"):
            search(rounding="floor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, r"target: got 0"),
        ({"target": math.nan}, r"target: got nan"),
        ({"target": math.inf}, r"target: got inf"),
        ({"target": 1e6, "multiple": 0}, r"multiple: got 0"),
        ({"target": 1e6, "rounding": "up"}, r"rounding: got 'up'"),
        ({"target": 1e6, "cost": lambda config: config.n_layers}, r"target: got 1000000.0, expected a cost that"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        match_width(SIX, **arguments)
