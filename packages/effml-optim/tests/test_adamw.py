"""The AdamW rule against torch's, through an optimizer whose only group uses it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from effml_optim import SOAP, Muon, Shampoo
from effml_optim.matrix.adamw import divide
from effml_shared.testing.optimizers import OptimizerKit
from torch.nn import Parameter


@pytest.mark.parametrize("kind", [SOAP, Shampoo, Muon])
def test_equals_torch_adamw(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in ((4, 3), (4, 3), (3,), ())]
    others = copy.deepcopy(params)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours = kind([{"params": params, "use_adamw": True}], **options)
    theirs = torch.optim.AdamW(others, **options)
    for step in range(12):
        for i, (param, other) in enumerate(zip(params, others, strict=True)):
            if step >= 3 or i != 1:  # one starts late
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                other.grad = param.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, others, rtol=0, atol=1e-14)
    assert set(ours.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_dividing_by_a_root_of_zero_gives_zero_only_without_eps() -> None:
    zero = torch.zeros(2)
    assert divide(zero, zero, eps=0.0).tolist() == [0.0, 0.0]


class TestAdamWGroupConformance(OptimizerKit):
    def make(self, params: Any, **overrides: Any) -> SOAP:
        groups = list(params) if isinstance(params[0], dict) else [{"params": params}]
        optimizer = SOAP([{**group, "use_adamw": True} for group in groups], **{"lr": 0.03, **overrides})
        optimizer.defaults["use_adamw"] = True  # also in groups that a test adds
        return optimizer
