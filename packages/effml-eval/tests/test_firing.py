from __future__ import annotations

import math

import pytest
import torch
from effml_eval.concepts.firing import Firing, dead_fraction, l0
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError


def _codes() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(40, 6, generator=g, dtype=torch.float64).clamp(min=0)
    codes[:, 4] = 0
    return codes


def test_l0_counts_active_concepts_and_dead_ones_never_fire() -> None:
    codes = _codes()
    for form in (codes, SparseCodes.from_dense(codes)):
        assert l0(form) == (codes > 0).sum().item() / 40
        assert dead_fraction(form) == pytest.approx(1 / 6)


def test_signed_codes_that_cancel_are_not_dead() -> None:
    assert dead_fraction(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0.5
    assert l0(torch.tensor([[1.0, -2.0]])) == 2


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [13, 0, 27]])
@pytest.mark.parametrize("sparse", [False, True])
def test_streaming_equals_all_at_once(sizes: list[int], sparse: bool) -> None:
    codes, firing = _codes(), Firing(6)
    for part in codes.split(sizes):
        firing.update(SparseCodes.from_dense(part) if sparse else part)
    torch.testing.assert_close(firing.energy, codes.mean(0))
    assert torch.equal(firing.counts, (codes > 0).sum(0))
    torch.testing.assert_close(firing.rate, (codes > 0).double().mean(0))
    assert firing.rows == 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_wide(dtype: torch.dtype) -> None:
    codes = torch.ones(70_000, 1, dtype=dtype)
    for form in (codes, SparseCodes(codes, torch.zeros(70_000, 1, dtype=torch.int64), 1)):
        firing = Firing(1)
        firing.update(form)
        assert firing.sums.item() == 70_000


def test_nothing_seen_and_wrong_shapes() -> None:
    assert math.isnan(Firing(3).l0)
    assert math.isnan(l0(torch.zeros(0, 3)))
    with pytest.raises(ConfigError, match=r"^codes: got shape \(2, 4\), expected \(rows, 3\)$"):
        Firing(3).update(torch.ones(2, 4))
    with pytest.raises(ConfigError, match=r"^n_concepts: got 0"):
        Firing(0)
