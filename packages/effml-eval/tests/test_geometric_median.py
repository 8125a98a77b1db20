"""The geometric median against its optimality condition, and where plain iterations divide by zero."""

import pytest
import torch
from effml_eval.sae.geometric_median import geometric_median
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st


def cost(rows, point):
    return float((rows - point).norm(dim=1).sum())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_no_neighbour_and_no_row_is_better(count, dim, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=g, dtype=torch.float64)
    point = geometric_median(rows, max_iterations=3000, tolerance=1e-10)
    least = cost(rows, point)
    for other in [*rows, *(point + 0.03 * torch.randn(20, dim, generator=g, dtype=torch.float64))]:
        assert least <= cost(rows, other) + 1e-6


def test_known_medians():
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    assert geometric_median(square).tolist() == [1.0, 1.0]
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(triangle), triangle.mean(0))
    line = torch.tensor([[0.0], [1.0], [2.0], [7.0], [90.0]], dtype=torch.float64)
    assert float(geometric_median(line, max_iterations=2000, tolerance=1e-12)) == pytest.approx(2.0, abs=1e-6)


def test_a_row_on_the_point_neither_divides_by_zero_nor_holds_it():
    """The mean, where iterations start, is a row: one alone gives way, while enough of them are the median."""
    around = torch.tensor([[3.0, 0.0], [3.0, 1.0], [-1.0, 0.0], [-5.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    assert around.mean(0).tolist() == [0.0, 0.0]
    point = geometric_median(around, tolerance=1e-10)
    assert cost(around, point) <= cost(around, torch.zeros(2))
    many = torch.cat([around, torch.zeros(5, 2, dtype=torch.float64)])
    assert geometric_median(many).tolist() == [0.0, 0.0]
    assert geometric_median(torch.full((4, 3), 0.1)).tolist() == torch.full((3,), 0.1).tolist()
    assert geometric_median(torch.ones(1, 2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outliers_hardly_move_it(dtype):
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    rows[:20] += 1000.0
    point = geometric_median(rows.to(dtype))
    assert point.dtype == dtype
    assert float(point.float().norm()) < 0.6
    assert float(rows.mean(0).norm()) > 100


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 3), torch.full((2, 2), torch.nan)])
def test_bad_rows_are_refused(bad):
    with pytest.raises(ConfigError, match=r"^x: got shape"):
        geometric_median(bad)
