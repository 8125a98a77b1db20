"""Neighbours and variances against a search through the sorted grid; rounding as its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from effml_quant import Quantizer, fake_quantize, formats
from effml_quant.blocks import Blocks
from effml_quant.lotion.variance import cast, neighbours, randomized_round, rr_variance
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SCALED = [name for name in formats if formats[name].scale != "none"]
QUANTIZERS = {
    **{f"{name}-continuous": Quantizer(name, scale="continuous") for name in SCALED},
    **{f"{name}-rceil": Quantizer(name, scale_rule="rceil") for name in SCALED if formats[name].scale == "e8m0"},
    "int4-tensor": Quantizer("int4", granularity="tensor"),
    "int4-channel": Quantizer("int4", granularity="channel"),
    "int3-groups-of-7": Quantizer("int3", granularity=("group", 7)),
    "fp4-along-columns": Quantizer("fp4", block_size=4, axis=0),
    "mxfp8_e4m3-tiles": Quantizer("mxfp8_e4m3", block_size=(4, 8), scale_rule="rceil"),
}
TENSOR = Quantizer("int4", granularity="tensor")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scale_of_blocks(w: Tensor, q: Quantizer) -> Tensor:
    """Return the scale of each weight, by the definition."""
    blocks = Blocks.cut(tuple(w.shape), q.axis, q.block)
    amax = blocks.split(w).abs().amax(blocks.dims, keepdim=True)
    if q.scale_kind == "float32":
        scale = amax / q.format.max
    else:
        scale = 2.0 ** torch.tensor([math.ceil(math.log2(a / q.format.max)) for a in amax.flatten()]).reshape(
            amax.shape
        )
    return blocks.join(scale.to(w.dtype).expand(blocks.view))


def searched(w: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    """Return neighbours by a search through the sorted grid; only for weights off the grid."""
    grid = torch.tensor(sorted({s * v for v in q.format.grid for s in (-1, 1)}), dtype=torch.float64)
    scale = scale_of_blocks(w, q)
    z = w / scale
    above = torch.searchsorted(grid, z.contiguous()).clamp(1, len(grid) - 1)
    return grid[above - 1] * scale, grid[above] * scale


@pytest.mark.parametrize("name", QUANTIZERS)
def test_neighbours_are_those_of_the_sorted_grid(name: str) -> None:
    q, w = QUANTIZERS[name], draw(12, 96)
    low, high = neighbours(w, q)
    on_grid = low == high
    expected_low, expected_high = searched(w, q)
    torch.testing.assert_close(low[~on_grid], expected_low[~on_grid], rtol=1e-12, atol=0)
    torch.testing.assert_close(high[~on_grid], expected_high[~on_grid], rtol=1e-12, atol=0)
    torch.testing.assert_close(low[on_grid], w[on_grid], rtol=1e-6, atol=0)
    variance = ((w - expected_low) * (expected_high - w)).masked_fill(on_grid, 0)
    torch.testing.assert_close(rr_variance(w, q), variance, rtol=1e-9, atol=0)
    if q.scale_kind == "float32":
        assert int(on_grid.sum()) >= math.prod(Blocks.cut((12, 96), q.axis, q.block).scales)  # the largest of each


@pytest.mark.parametrize("name", [*QUANTIZERS, "nvfp4-standard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast_and_draws_are_neighbours(name: str, dtype: torch.dtype) -> None:
    q = QUANTIZERS.get(name, Quantizer("nvfp4"))
    w = draw(6, 64, dtype=dtype)
    low, high = (end.to(dtype) for end in neighbours(w, q))
    generator = torch.Generator().manual_seed(1)
    nearest, drawn = cast(w, q), randomized_round(w, q, generator)
    assert torch.equal(nearest, fake_quantize(w, q))
    for outcome in (nearest, drawn):
        # NVFP4's own arithmetic multiplies by a rounded reciprocal: its outcomes differ by that rounding.
        tolerance = 1e-6 if q.scale_kind == "e4m3" else 0.0
        distance = torch.minimum((outcome - low).abs(), (outcome - high).abs())
        assert bool((distance <= tolerance * w.abs().max()).all())
    assert bool(((drawn == low) & (low != high)).any())
    assert bool(((drawn == high) & (low != high)).any())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_draws_have_mean_and_variance(name: str) -> None:
    q, n = QUANTIZERS[name], 2000
    w = draw(4, 32, seed=3)
    draws = randomized_round(w.repeat(n, 1), q, torch.Generator().manual_seed(0)).view(n, 4, 32)  # of the same blocks
    variance = rr_variance(w, q)
    error = (variance / n).sqrt()
    assert bool(((draws.mean(0) - w).abs() <= 5 * error + 1e-6 * w.abs()).all())
    low, high = neighbours(w, q)
    p = torch.where(low == high, 0, (w - low) / (high - low))
    spread = (high - low).square() * (p * (1 - p) * (1 - 2 * p).square() / n + 2 * (p * (1 - p) / n).square()).sqrt()
    assert bool(((draws.var(0) - variance).abs() <= 6 * spread + 1e-3 * variance + 1e-12).all())
    assert len(draws[:, 1, 1].unique()) <= 2


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_on_the_grid_stays(name: str, dtype: torch.dtype) -> None:
    q = QUANTIZERS[name]
    on_grid = cast(draw(8, 64, dtype=dtype, seed=5), q)
    again = randomized_round(on_grid, q, torch.Generator().manual_seed(0))
    assert torch.equal(cast(on_grid, q), on_grid)
    torch.testing.assert_close(again, on_grid, rtol=3e-7, atol=0)  # products with a scale that is one ulp off
    assert not rr_variance(on_grid, q).any()
    drawn = randomized_round(draw(8, 64, dtype=dtype, seed=5), q, torch.Generator().manual_seed(0))
    assert not rr_variance(drawn, q).any()  # an outcome keeps the scale


def test_integers_in_float32_do_not_miss_the_grid() -> None:
    q = Quantizer("int8", granularity="channel")
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(2000, 1, generator=generator) + 0.5
    codes = torch.randint(-127, 128, (2000, 50), generator=generator).float()
    codes[:, 0] = 127
    w = codes * scale
    assert not rr_variance(w, q).any()
    z = w / (w.abs().amax(1, keepdim=True) / 127)
    missed = ((z - z.round()).abs() > 1e-6).float().mean()
    assert 0.01 < float(missed) < 0.2  # what a fixed margin would take for off the grid


def test_worked_numbers() -> None:
    w = torch.tensor([0.70, -0.33, 0.05, -0.21, 0.44], dtype=torch.float64)
    expected = torch.tensor([0, 0.0021, 0.0025, 0.0009, 0.0024], dtype=torch.float64)
    torch.testing.assert_close(rr_variance(w, TENSOR), expected, rtol=1e-10, atol=1e-15)
    w = torch.tensor([0.9, -0.5, 0.31, 0.07, -0.26], dtype=torch.float64)
    expected = torch.tensor([0, 0.005, 0.0014, 0.00035, 0.0014], dtype=torch.float64)
    torch.testing.assert_close(rr_variance(w, Quantizer("fp4")), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("rule", "at", "before", "after"), [("floor", 1.0, 0.00071, 0.00165), ("rceil", 1.5, 0.00165, 0.0154)]
)
def test_power_of_two_scales_jump(rule: str, at: float, before: float, after: float) -> None:
    q = Quantizer("mxfp4", scale_rule=rule)
    found = [float(rr_variance(torch.tensor([at + step, 0.11, 0.3]), q)[1]) for step in (-1e-4, 1e-4)]
    assert found == pytest.approx([before, after], rel=0.01)


def test_what_saturates_has_no_variance() -> None:
    q = Quantizer("mxfp4", scale_rule="floor")
    w = torch.tensor([7.9, -7.0, 6.5, 5.0, -0.3])
    variance = rr_variance(w, q)
    assert variance[:3].tolist() == [0, 0, 0]
    assert bool((variance[3:] > 0).all())
    assert randomized_round(w, q)[:3].tolist() == [6, -6, 6]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_symmetries(name: str) -> None:
    q, w = QUANTIZERS[name], draw(8, 64, seed=2)
    variance = rr_variance(w, q)
    factor = 0.37 if q.scale_kind == "float32" else 0.25  # power-of-two scales follow powers of two only
    torch.testing.assert_close(rr_variance(factor * w, q), factor**2 * variance, rtol=1e-7, atol=1e-18)
    assert torch.equal(rr_variance(-w, q), variance)
    halves = torch.cat([rr_variance(half, q) for half in w.split(4)])
    if q.block != "tensor":
        assert torch.equal(halves, variance)


def test_permutation_within_a_block() -> None:
    w, order = draw(50, seed=4), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for name in ("int4", "fp4"):
        q = Quantizer(name, granularity="tensor")
        assert torch.equal(rr_variance(w[order], q), rr_variance(w, q)[order])


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.sampled_from(sorted(QUANTIZERS)),
)
@settings(max_examples=100, deadline=None)
def test_variance_is_within_its_bounds(values: list[float], name: str) -> None:
    q = QUANTIZERS[name]
    w = torch.tensor([values])
    low, high = neighbours(w, q)
    variance = rr_variance(w, q)
    assert bool((variance >= 0).all())
    assert bool((variance <= 0.2501 * (high - low).square()).all())
    slack = 1e-6 * w.abs().max() + q.format.max * torch.finfo(w.dtype).tiny  # a subnormal scale counts as none
    assert bool((low <= w + slack).all())
    assert bool((w - slack <= high).all())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_degenerate_blocks(name: str) -> None:
    q = QUANTIZERS[name]
    assert not rr_variance(torch.zeros(4, 32), q).any()
    assert not rr_variance(torch.full((4, 32), -1.7), q).any() or q.scale_kind == "e8m0"
    assert rr_variance(torch.zeros(0, 32), q).shape == (0, 32)
    tiny = torch.full((4, 32), 1e-42)
    assert not rr_variance(tiny, q).any()  # no normal scale
    bad = torch.ones(8, 64)
    bad[1, 3] = torch.nan
    found = rr_variance(bad, q)
    assert bool(found[1, 3].isnan())


def test_single_weights() -> None:
    w = draw(5, 3)
    assert not rr_variance(w, Quantizer("int4", granularity=("group", 1))).any()
    assert float(rr_variance(torch.tensor(0.3), TENSOR)) == 0
    part = draw(64, 8).T  # not contiguous
    assert torch.equal(rr_variance(part, TENSOR), rr_variance(part.contiguous(), TENSOR))
    assert rr_variance(w.to(torch.bfloat16), TENSOR).dtype == torch.float32


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match=r"format: got bfloat16"):
        rr_variance(draw(3), Quantizer("bfloat16"))
    with pytest.raises(ConfigError, match=r"recipe: got 'torchao'"):
        rr_variance(draw(3), Quantizer("int4", recipe="torchao"))
    with pytest.raises(ConfigError, match=r"x: got torch.int64"):
        rr_variance(torch.arange(3), TENSOR)
