"""The penalty against worked numbers, differences and draws; its direct gradient against autograd's."""

from __future__ import annotations

import pytest
import torch
from effml_quant import Quantizer, formats
from effml_quant.blocks import Blocks
from effml_quant.lotion import penalty
from effml_quant.lotion.penalty import lotion_penalty, penalty_gradient
from effml_quant.lotion.variance import cast, randomized_round, rr_variance
from effml_shared.errors import ConfigError
from torch import Tensor

SCALED = [name for name in formats if formats[name].scale != "none"]
QUANTIZERS = {
    **{f"{name}-continuous": Quantizer(name, scale="continuous") for name in SCALED},
    **{f"{name}-rceil": Quantizer(name, scale_rule="rceil") for name in SCALED if formats[name].scale == "e8m0"},
    "int4-tensor": Quantizer("int4", granularity="tensor"),
    "int4-channel": Quantizer("int4", granularity="channel"),
    "int3-groups-of-7": Quantizer("int3", granularity=("group", 7)),
    "fp4-along-columns": Quantizer("fp4", block_size=4, axis=0),
    "int4-tiles": Quantizer("int4", block_size=(4, 8)),
}
INT4 = Quantizer("int4", granularity="tensor")
FP4 = Quantizer("fp4", granularity="tensor")
ROWS = Quantizer("int4", granularity="channel")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_autograd(w: Tensor, g: Tensor, q: Quantizer, through_scale: bool = True) -> tuple[Tensor, Tensor]:
    w = w.detach().to(torch.promote_types(w.dtype, torch.float32)).requires_grad_()
    value = lotion_penalty(w, g, q, through_scale)
    (gradient,) = torch.autograd.grad(value, w)
    return gradient, value.detach()


WORKED = {
    INT4: ([0.70, -0.33, 0.05, -0.21, 0.44], 0.01365, [-0.0592857142857, -0.04, 0, -0.16, 0.05]),
    FP4: ([0.9, -0.5, 0.31, 0.07, -0.26], 0.0113, [-0.0633333333333, -0.05, 0.195, -0.13, -0.0125]),
}


@pytest.mark.parametrize("q", WORKED)
def test_worked_numbers(q: Quantizer) -> None:
    weights, value, gradient = WORKED[q]
    w, g = torch.tensor(weights, dtype=torch.float64), torch.arange(1.0, 6, dtype=torch.float64)
    for through_scale in (True, False):
        expected = torch.tensor(gradient if through_scale else [0, *gradient[1:]], dtype=torch.float64)
        for found, total in (by_autograd(w, g, q, through_scale), penalty_gradient(w, g, q, 1.0, through_scale)):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            assert float(total) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradient_is_that_of_central_differences(name: str) -> None:
    q, w = QUANTIZERS[name], draw(3, 9, seed=1)
    g, h = draw(3, 9, seed=2).square(), 1e-7
    gradient, _ = penalty_gradient(w, g, q)
    for i in range(w.numel()):
        step = torch.zeros(w.numel(), dtype=torch.float64).index_fill_(0, torch.tensor(i), h).view_as(w)
        difference = float(lotion_penalty(w + step, g, q) - lotion_penalty(w - step, g, q)) / (2 * h)
        assert float(gradient.flatten()[i]) == pytest.approx(difference, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("name", [*QUANTIZERS, "nvfp4-standard"])
def test_direct_gradient_is_autograds(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(penalty, "add_gradient", lambda *_: None)
    q = QUANTIZERS.get(name, Quantizer("nvfp4"))
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4), (torch.bfloat16, 2e-4)):
        w, g = draw(9, 64, dtype=dtype), draw(9, 64, seed=1).square().to(torch.promote_types(dtype, torch.float32))
        for through_scale in (True, False):
            expected, value = by_autograd(w, g, q, through_scale)
            gradient, total = penalty_gradient(w, g, q, 0.3, through_scale)
            torch.testing.assert_close(gradient, 0.3 * expected, rtol=tolerance, atol=tolerance * float(expected.std()))
            torch.testing.assert_close(total, 0.3 * value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name, q in QUANTIZERS.items() if q.scale_kind == "float32"])
def test_degree_two(name: str) -> None:
    q, w, g = QUANTIZERS[name], draw(8, 64, seed=3), draw(8, 64, seed=4).square()
    gradient, _ = penalty_gradient(w, g, q)
    blocks = Blocks.cut((8, 64), q.axis, q.block)
    along, value = (blocks.split(x).sum(blocks.dims) for x in (w * gradient, g * rr_variance(w, q)))
    torch.testing.assert_close(along, value, rtol=1e-9, atol=1e-12)
    twice, total = penalty_gradient(2 * w, g, q)
    torch.testing.assert_close(twice, 2 * gradient, rtol=1e-9, atol=1e-12)
    assert float(total) == pytest.approx(2 * float(value.sum()), rel=1e-9)


def test_long_blocks_in_float32() -> None:
    w, g = draw(1, 100_003, dtype=torch.float32), draw(1, 100_003, seed=1, dtype=torch.float32).square()
    for q in (INT4, FP4):
        expected, value = by_autograd(w.double(), g.double(), q)
        gradient, total = penalty_gradient(w, g, q)
        at = int(w.abs().argmax())
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4)
        assert float(gradient[0, at]) == pytest.approx(float(expected[0, at]), rel=1e-4)
        assert float(total) == pytest.approx(float(value), rel=1e-5)


def test_ties_share_equally() -> None:
    w = torch.tensor([[0.7, -0.7, 0.7, 0.23, 0.11], [0.1, 0.2, 0.3, 0.4, 0.55]], dtype=torch.float64)
    for q in (INT4, ROWS, FP4):
        expected, _ = by_autograd(w, torch.ones_like(w), q)
        gradient, _ = penalty_gradient(w, torch.ones_like(w), q)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
        assert gradient[0, 0] == -gradient[0, 1] == gradient[0, 2] != 0


def test_blocks_are_independent_tensors() -> None:
    w, g = draw(6, 10, seed=5), draw(6, 10, seed=6).square()
    gradient, value = penalty_gradient(w, g, ROWS)
    rows = [penalty_gradient(row, weight, INT4) for row, weight in zip(w, g, strict=True)]
    torch.testing.assert_close(gradient, torch.stack([row for row, _ in rows]), rtol=1e-12, atol=0)
    torch.testing.assert_close(value, sum(part for _, part in rows), rtol=1e-12, atol=0)


def test_mean_loss_of_a_quadratic_is_loss_plus_penalty() -> None:
    n = 400_000
    w, b, half = draw(5, seed=7), draw(5, seed=8), draw(5, 5, seed=9)
    hessian = half @ half.T + draw(5, 5, seed=10).triu(1) + draw(5, 5, seed=10).triu(1).T  # indefinite will do

    def loss(x: Tensor) -> Tensor:
        return 0.5 * ((x @ hessian) * x).sum(-1) + x @ b

    for q in (ROWS, Quantizer("fp4", granularity="channel")):
        losses = loss(randomized_round(w.expand(n, 5), q, torch.Generator().manual_seed(0)))
        expected = loss(w) + lotion_penalty(w[None], hessian.diagonal()[None], q)
        assert abs(float(losses.mean() - expected)) < 3 * float(losses.std()) / n**0.5
        assert abs(float(losses.mean() - loss(w))) > 6 * float(losses.std()) / n**0.5  # the penalty is no detail


def test_continuous_along_a_line_with_a_real_scale_and_not_with_a_power_of_two() -> None:
    ends = draw(2, 6, seed=11)
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None]
    line = ends[0] * (1 - t) + ends[1] * t  # the largest weight changes on the way
    assert len(line.abs().argmax(1).unique()) > 1
    jumps = {}
    for name in ("int4", "fp4", "mxfp4"):
        q = Quantizer(name, granularity="channel", scale_rule="rceil")
        jumps[name] = float(rr_variance(line, q).sum(1).diff().abs().max())
    assert jumps["int4"] < 2e-4
    assert jumps["fp4"] < 2e-4
    assert jumps["mxfp4"] > 1e-2


def test_gradient_flow_ends_on_the_grid() -> None:
    """A grid point is a minimum for targets within half a cell of it."""
    h, s = 2.0, 0.1
    offset = torch.tensor([0.0, 0.2, -0.4, 0.6, -0.8], dtype=torch.float64)
    w = torch.tensor([[0.7, 0.334]], dtype=torch.float64).repeat(5, 1)  # the first fixes the scale: 0.7 / 7
    g = torch.tensor([[0.0, h]], dtype=torch.float64).expand(5, 2)
    for _ in range(1500):
        gradient, _ = penalty_gradient(w, g, ROWS, through_scale=False)
        w[:, 1] -= 3e-3 * (gradient[:, 1] + h * (w[:, 1] - (3 + offset) * s))
    torch.testing.assert_close(w[:, 1] / s, 3 + offset.round(), rtol=0, atol=1e-2)  # up to one step of the descent


def test_on_the_grid_there_is_nothing_to_pay() -> None:
    for name, q in QUANTIZERS.items():
        w = cast(draw(8, 64, seed=12, dtype=torch.float32), q)
        gradient, value = penalty_gradient(w, torch.ones_like(w), q)
        assert float(value) == 0, name
        assert not gradient.any(), name


@pytest.mark.parametrize("w", [torch.zeros(4, 8), torch.full((4, 8), -0.3), torch.ones(()), torch.zeros(0, 3)])
def test_degenerate_weights(w: Tensor) -> None:
    for q in (INT4, FP4, ROWS, Quantizer("mxfp4", scale="continuous") if w.ndim else INT4):
        gradient, value = penalty_gradient(w, torch.ones_like(w), q)
        assert gradient.shape == w.shape
        assert float(value) == 0
        assert not gradient.any()


def test_nan_is_not_hidden() -> None:
    w, g = draw(4, 8), torch.ones(4, 8, dtype=torch.float64)
    for bad in (torch.nan, torch.inf):
        for q in (INT4, FP4):
            assert not bool(penalty_gradient(w, g.clone().index_fill_(0, torch.tensor(1), bad), q)[1].isfinite())
            assert not bool(penalty_gradient(w.clone().index_fill_(0, torch.tensor(1), bad), g, q)[1].isfinite())


def test_the_gradient_is_added_to_what_is_there() -> None:
    w, g = draw(6, 7), draw(6, 7, seed=1).square()
    for q in (INT4, Quantizer("int4", granularity=("group", 3))):
        gradient, _ = penalty_gradient(w, g, q)
        for out in (torch.ones(6, 7, dtype=torch.float64), torch.ones(7, 6, dtype=torch.float64).T):
            found, _ = penalty_gradient(w, g, q, out=out)
            assert found is out
            torch.testing.assert_close(out, 1 + gradient)
        half = torch.ones(6, 7, dtype=torch.bfloat16)
        penalty_gradient(w.bfloat16(), g.float(), q, out=half)
        assert half.dtype == torch.bfloat16


def test_a_block_over_shards() -> None:
    w, g = draw(8, 16, seed=13), draw(8, 16, seed=14).square()
    for q in (INT4, FP4):
        expected, value = penalty_gradient(w, g, q)
        sums: list[Tensor] = []

        def first(values: Tensor, operation: str, sums: list[Tensor] = sums) -> Tensor:
            if operation == "sum":
                sums.append(values.clone())
                return values
            return w.abs().amax().reshape(1, 1)

        def second(values: Tensor, operation: str, sums: list[Tensor] = sums) -> Tensor:
            return sums[0] + sums[1] if operation == "sum" else w.abs().amax().reshape(1, 1)

        shards = list(zip(w.split(5), g.split(5), strict=True))
        for part, weight in shards:
            penalty_gradient(part, weight, q, reduce=first)
        found = [penalty_gradient(part, weight, q, reduce=second) for part, weight in shards]
        torch.testing.assert_close(torch.cat([gradient for gradient, _ in found]), expected, rtol=1e-12, atol=1e-15)
        assert all(float(total) == pytest.approx(float(value), rel=1e-12) for _, total in found)


def test_curvature_is_a_constant() -> None:
    w, g = draw(5).requires_grad_(), draw(5, seed=1).requires_grad_()
    lotion_penalty(w, g, INT4).backward()
    assert g.grad is None


def test_bad_arguments() -> None:
    w = draw(3, 4)
    with pytest.raises(ConfigError, match=r"g: got shape \(4,\), expected a tensor like the weight, \(3, 4\)"):
        penalty_gradient(w, torch.ones(4), INT4)
    with pytest.raises(ConfigError, match=r"g: got float"):
        lotion_penalty(w, 1.0, INT4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"out: got shape \(3,\)"):
        penalty_gradient(w, w, INT4, out=torch.ones(3))
    with pytest.raises(ConfigError, match=r"expected one with a scale"):
        penalty_gradient(w, w, Quantizer("bfloat16"))
