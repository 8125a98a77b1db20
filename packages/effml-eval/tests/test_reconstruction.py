from __future__ import annotations

import math

import pytest
import torch
from effml_eval.concepts.reconstruction import Reconstruction, fvu, pareto_front, r2
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def _data(rows: int = 50, dim: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64) * 3 + torch.arange(dim)
    return x, x + torch.randn(rows, dim, generator=g, dtype=torch.float64)


def test_the_centre_decides() -> None:
    x, x_hat = torch.tensor([[0.0, 10.0], [2.0, 12.0]]), torch.tensor([[1.0, 11.0], [1.0, 11.0]])
    assert r2(x, x_hat) == 0
    assert r2(x, x_hat, center="scalar") == pytest.approx(0.961538, abs=1e-6)
    assert r2(x, x_hat, center="none") == pytest.approx(1 - 4 / 248)
    assert fvu(x, x_hat) == 1


@pytest.mark.parametrize("center", ["dim", "scalar", "none"])
@pytest.mark.parametrize("sizes", [[50], [1] * 50, [17, 0, 33], [49, 1]])
def test_streaming_equals_the_formula_however_it_is_cut(center: str, sizes: list[int]) -> None:
    x, x_hat = _data()
    c = {"dim": x.mean(0), "scalar": x.mean(), "none": torch.zeros(())}[center]
    expected = 1 - (x - x_hat).square().sum() / (x - c).square().sum()
    meter = Reconstruction()
    for part, part_hat in zip(x.split(sizes), x_hat.split(sizes), strict=True):
        meter.update(part, part_hat)
    assert meter.r2(center) == pytest.approx(float(expected), rel=1e-12)
    assert meter.mse == pytest.approx(float((x - x_hat).square().sum(1).mean()), rel=1e-12)
    assert meter.rows == 50


def test_a_large_common_mean_costs_no_digits() -> None:
    x, x_hat = _data()
    assert r2((x + 1e7), (x_hat + 1e7)) == pytest.approx(r2(x, x_hat), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_wide(dtype: torch.dtype) -> None:
    x = torch.ones(70_000, 1, dtype=dtype)
    x[::2] = 3
    assert r2(x, torch.full_like(x, 2)) == 0
    assert r2(x, x) == 1


def test_without_spread_there_is_no_r2() -> None:
    assert math.isnan(r2(torch.ones(3, 2), torch.zeros(3, 2)))
    assert math.isnan(r2(torch.ones(0, 2), torch.zeros(0, 2)))
    assert math.isnan(Reconstruction().r2())
    assert math.isnan(Reconstruction().mse)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^x_hat: got shape \(2, 3\), expected \(rows, 2\)$"):
        r2(torch.ones(2, 2), torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"^x_hat: got 3 rows beside 2 of x"):
        r2(torch.ones(2, 2), torch.ones(3, 2))
    with pytest.raises(ConfigError, match=r"^center: got 'mean', expected one of"):
        r2(torch.ones(2, 2), torch.ones(2, 2), center="mean")
    with pytest.raises(ConfigError, match=r"NaN or infinite"):
        r2(torch.ones(2, 2), torch.full((2, 2), torch.nan))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_the_front_is_what_no_other_dominates(points: list[tuple[int, int]]) -> None:
    def beaten(i: int) -> bool:
        (sparsity, quality) = points[i]
        return any(s <= sparsity and q >= quality and (s, q) != (sparsity, quality) for s, q in points)

    front = pareto_front([s for s, _ in points], [q for _, q in points])
    assert sorted(front) == [i for i in range(len(points)) if not beaten(i)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_the_front_leaves_out_what_has_no_number() -> None:
    assert pareto_front([4, 8], [math.nan, 0.5]) == [1]
    with pytest.raises(ConfigError, match=r"^r2: got 1 values beside 2 of l0"):
        pareto_front([1, 2], [0.5])
