from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effml_diffusion.flex import FlexMDM
from effml_diffusion.insertion_head import InsertionHead
from effml_shared.errors import ConfigError
from effml_shared.testing.modules import ModuleKit
from torch import Tensor


def head(kind: str = "expectation", scale: int = 12, **options: Any) -> InsertionHead:
    """A head that predicts something: every parameter is moved off its start."""
    torch.manual_seed(0)
    made = InsertionHead(8, scale, kind, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.requires_grad_(False)


def hidden(n_gaps: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(2, n_gaps, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestExpectationConforms(ModuleKit):
    def make(self) -> InsertionHead:
        made = InsertionHead(8, 12, cond_dim=4)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.arange(parameter.numel()).mul(0.7).sin().view(parameter.shape))
        return made

    def inputs(self) -> dict[str, Any]:
        return {"hidden": hidden().float(), "c": torch.linspace(-1, 1, 8).view(2, 4)}

    @pytest.mark.slow  # compiled with the Transformer by default
    def test_compiled_equals_eager(self) -> None:
        super().test_compiled_equals_eager()


class TestDistributionConforms(TestExpectationConforms):
    def make(self) -> InsertionHead:
        made = InsertionHead(8, 12, "distribution")
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.arange(parameter.numel()).mul(0.7).sin().view(parameter.shape))
        return made

    def inputs(self) -> dict[str, Any]:
        return {"hidden": hidden().float()}


@pytest.mark.parametrize("kind", ["expectation", "distribution"])
def test_is_its_formula(kind: str) -> None:
    made, c = head(kind, cond_dim=4), torch.randn(2, 4, dtype=torch.float64)
    x = F.layer_norm(hidden(), (8,), made.norm.weight, eps=1e-5)
    assert made.modulation is not None
    shift, scale = F.linear(c, made.modulation.weight, made.modulation.bias).split(8, dim=-1)
    x = x * (1 + scale[:, None]) + shift[:, None]
    x = F.gelu(F.linear(x, made.hidden.weight, made.hidden.bias))
    u = F.linear(x, made.output.weight, made.output.bias)
    gaps, log_gaps, gap_logits = made(hidden(), c)
    if kind == "distribution":
        assert gaps is None
        assert log_gaps is None
        torch.testing.assert_close(gap_logits, u)
    else:
        assert gap_logits is None
        torch.testing.assert_close(gaps, 12 * u.squeeze(-1).exp().log1p())
        torch.testing.assert_close(log_gaps, gaps.log())


@pytest.mark.parametrize("initial_gap", [1e-3, 1.0, 700.0])
@pytest.mark.parametrize("scale", [1, 1024])
def test_an_expectation_starts_where_it_was_told(initial_gap: float, scale: int) -> None:
    made = InsertionHead(8, scale, initial_gap=initial_gap).double()
    with torch.no_grad():
        made.output.bias.copy_(InsertionHead(8, scale, initial_gap=initial_gap).output.bias)
    gaps, log_gaps, _ = made(hidden())
    torch.testing.assert_close(gaps, torch.full_like(gaps, initial_gap), rtol=1e-6, atol=0.0)  # a float32 bias
    torch.testing.assert_close(log_gaps, gaps.log())


def test_a_distribution_starts_uniform() -> None:
    _, _, gap_logits = InsertionHead(8, 12, "distribution")(hidden().float())
    assert gap_logits.shape == (2, 5, 13)
    assert not gap_logits.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logarithm_survives_where_the_gap_underflows(dtype: torch.dtype) -> None:
    """And its gradient is exact: d ln softplus(u) / du -> 1."""
    made = InsertionHead(8, 1).to(dtype)
    grid = torch.tensor([-1000.0, -200.0, -100.0, -40.0, -37.5, -37.0, -36.5, -20.0, 0.0, 30.0], dtype=torch.float64)
    exact = torch.where(grid < -37, grid, grid.exp().log1p().log())
    slope = torch.where(grid < -37, 1.0, grid.sigmoid() / grid.exp().log1p())
    for u, expected, slant in zip(grid, exact, slope, strict=True):
        made.output.bias.data.fill_(float(u))
        made.zero_grad()
        gaps, log_gaps, _ = made(torch.zeros(1, 1, 8, dtype=dtype))
        log_gaps.sum().backward()
        tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
        assert float(gaps.detach()) >= 0
        assert float(log_gaps.detach()) == pytest.approx(float(expected), rel=tolerance, abs=tolerance)
        grad = made.output.bias.grad
        assert grad is not None
        assert float(grad) == pytest.approx(float(slant), rel=tolerance)


def test_the_end_is_computed_wide() -> None:
    made = InsertionHead(8, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        gaps = made(hidden().float()).gaps
    assert gaps.dtype == torch.float32
    torch.testing.assert_close(gaps, torch.ones_like(gaps))  # bfloat16 would round the bias, and g by 1%
    narrow = InsertionHead(8, 1024).bfloat16()
    assert narrow(hidden().bfloat16()).gaps.dtype == torch.float32


@pytest.mark.parametrize("kind", ["expectation", "distribution"])
def test_learns_the_mean_number_missing(kind: str) -> None:
    """Two kinds of gaps with different laws, through the objective's own losses."""
    torch.manual_seed(0)
    made = InsertionHead(8, 3, kind)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    told = torch.eye(2, 8)[torch.tensor([0, 1] * 8)][:, None]  # (16, 1, 8): texts of no token, of two kinds
    missing = [0, 1, 3, 1] * 4

    def model(ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        prediction = made(F.pad(told, (0, 0, 0, ids.shape[1])))
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 6), **prediction._asdict())

    flex = FlexMDM(model, 4, 5, 3, length_multiple=1)
    texts = [[1] * n for n in missing]
    state = flex.corrupt(texts, flow_t=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = flex.loss(texts, state=state).loss
        loss.backward()
        optimizer.step()
    gaps = flex.predict(state.ids, state.lengths, state.flow_t).gaps[:2, 0]
    torch.testing.assert_close(gaps, torch.tensor([1.5, 1.0]), atol=0.02, rtol=0.0)


def test_no_gaps_and_one_gap() -> None:
    assert head()(hidden(0)).gaps.shape == (2, 0)
    assert head()(hidden(1)).gaps.shape == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, r"^d_model: got 0, expected an integer of at least 1$"),
        ({"scale": 0}, r"^scale: got 0, expected an integer of at least 1$"),
        ({"kind": "poisson"}, r"^kind: got 'poisson', expected one of 'expectation', 'distribution'$"),
        ({"initial_gap": 0.0}, r"^initial_gap: got 0\.0, expected a number above 0$"),
        ({"initial_gap": float("nan")}, r"^initial_gap: got nan"),
        ({"initial_gap": float("inf")}, r"^initial_gap: got inf"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InsertionHead(**{"d_model": 8, "scale": 4, **options})


def test_a_modulated_norm_needs_its_embedding() -> None:
    with pytest.raises(ConfigError, match=r"^c: got None, expected the embedding"):
        head(cond_dim=4)(hidden())
