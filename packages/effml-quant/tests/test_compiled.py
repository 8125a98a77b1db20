"""The kernel against its twin in torch, for every real-valued scale and length, and where it steps back."""

from __future__ import annotations

import pytest
import torch
from effml_quant import Quantizer, formats
from effml_quant.lotion import compiled, penalty
from effml_quant.lotion.compiled import add_gradient, is_available
from torch import Tensor

SCALED = [name for name in formats if formats[name].scale != "none"]
needs_compiler = pytest.mark.skipif(not is_available(), reason="no C compiler here")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(w: Tensor, q: Quantizer, through_scale: bool = True) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    g = draw(*w.shape, seed=1).square()
    one, other = torch.ones_like(w), torch.ones_like(w)
    values = add_gradient(w, g, one, q, 0.7, through_scale)
    assert values is not None
    return (one, values.float()), (other, penalty._add_gradient(w, g, other, q, 0.7, through_scale, None))


@needs_compiler
@pytest.mark.parametrize("length", [1, 5, 16, 33, 5000])
@pytest.mark.parametrize("name", SCALED)
def test_the_kernel_is_torch(name: str, length: int) -> None:
    q, w = Quantizer(name, scale="continuous"), draw(7, length, seed=2)
    w[1] = 0
    w[2] = -0.3
    w[3, length // 2] = w[3].abs().max() * -1  # ties
    for through_scale in (True, False):
        (one, values), (other, wanted) = both(w, q, through_scale)
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(values, wanted, rtol=2e-5, atol=1e-9)
        assert values[1] == 0
        assert bool((one[1] == 1).all())


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(bad: float) -> None:
    w = draw(3, 40)
    w[1, 7] = bad
    for name in ("int4", "fp4"):
        (one, values), (_, wanted) = both(w, Quantizer(name, granularity="channel"))
        assert values.isfinite().tolist() == wanted.isfinite().tolist() == [True, False, True]
        assert bool(one[0].isfinite().all())


@needs_compiler
def test_subnormal_scales_and_empty_blocks() -> None:
    (one, values), _ = both(torch.full((2, 20), 1e-40), Quantizer("int4", granularity="channel"))
    assert not values.any()
    assert bool((one == 1).all())
    for shape in ((0, 5), (3, 0)):
        empty = torch.ones(shape)
        values = add_gradient(empty, empty, empty, Quantizer("int4"), 1.0, True)
        assert values is not None
        assert values.tolist() == [0.0] * shape[0]


def test_what_torch_must_do() -> None:
    w, q = draw(3, 32), Quantizer("int4")
    assert add_gradient(w.double(), w.double(), w.double(), q, 1.0, True) is None
    assert add_gradient(w, w, torch.zeros(32, 3).T, q, 1.0, True) is None
    assert add_gradient(w, w, w.clone(), Quantizer("mxfp4"), 1.0, True) is None


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    w, g, q = draw(4, 32), draw(4, 32, seed=1).square(), Quantizer("fp4", granularity="channel")
    gradient, value = penalty.penalty_gradient(w, g, q)
    monkeypatch.setattr(compiled, "_library", lambda *, floats: None)
    assert not is_available()
    plain, total = penalty.penalty_gradient(w, g, q)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value, total, rtol=1e-5, atol=0)
