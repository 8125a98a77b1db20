"""Muon against torch's, bit for bit, and the map of singular values."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from effml_optim import Muon
from effml_optim.muon import newton_schulz
from effml_shared.errors import ConfigError
from effml_shared.testing.optimizers import OptimizerKit
from torch.nn import Parameter


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_equals_torch_bit_for_bit(foreach: bool | None, nesterov: bool, adjust_lr: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 16), (8, 16), (16, 8), (33, 20), (12, 12), (8, 16)]
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    others = copy.deepcopy(params)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours = Muon(params, adjust_lr=adjust_lr, foreach=foreach, **options)
    theirs = torch.optim.Muon(others, adjust_lr_fn=adjust_lr, **options)
    for _ in range(6):
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
            other.grad = param.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.001, 0.470544),
        (0.01, 0.698917),
        (0.05, 0.758120),
        (0.1, 0.712120),
        (0.3, 1.079592),
        (0.5, 0.765439),
        (0.8, 1.119204),
        (1.0, 0.696436),
    ],
)
def test_singular_values_follow_the_polynomial(value: float, expected: float) -> None:
    rest = math.sqrt(1 - value**2)  # makes the Frobenius norm 1, so that normalising changes nothing
    u, v = (torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64)[i]).Q[:, :2] for i in (0, 1))
    x = u @ torch.diag(torch.tensor([value, rest], dtype=torch.float64)) @ v.T
    out = newton_schulz(x[None], dtype=torch.float64)[0]
    assert float(u[:, 0] @ out @ v[:, 0]) == pytest.approx(expected, abs=1e-6)


def test_tall_wide_and_zero_matrices() -> None:
    tall = torch.randn(3, 20, 7, generator=torch.Generator().manual_seed(0))
    out = newton_schulz(tall)
    assert torch.equal(newton_schulz(tall.mT), out.mT)
    values = torch.linalg.svdvals(out.float())
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert not newton_schulz(torch.zeros(1, 2, 2)).any()


def test_convolutions_are_seen_as_out_by_all_the_rest() -> None:
    kernel = Parameter(torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0)))
    matrix = Parameter(kernel.detach().reshape(6, 6).clone())
    optimizer = Muon([kernel, matrix])
    for seed in range(3):
        kernel.grad = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(seed))
        matrix.grad = kernel.grad.reshape(6, 6)
        optimizer.step()
    assert torch.equal(kernel.reshape(6, 6), matrix)


def test_vectors_need_an_adamw_group() -> None:
    vector = Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"shape \(3,\).*use_adamw=True"):
        Muon([vector])
    Muon([{"params": [vector], "use_adamw": True}])


class TestMuonConformance(OptimizerKit):
    bad_arguments = (
        ("lr", -1.0),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("ns_steps", 0),
        ("ns_eps", -1.0),
        ("ns_coefficients", (1.0, 2.0)),
        ("adjust_lr", "spectral"),
        ("betas", (0.9, 1.0)),
        ("eps", -1.0),
    )

    def make(self, params: Any, **overrides: Any) -> Muon:
        return Muon(params, **{"lr": 0.05, **overrides})
