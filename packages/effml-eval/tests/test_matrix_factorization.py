from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.baselines.matrix_factorization import nmf, semi_nmf
from effml_eval.concepts.reconstruction import r2
from effml_shared.errors import ConfigError
from torch import Tensor


def _data(signed: bool, rows: int = 150) -> Tensor:
    g = torch.Generator().manual_seed(0)
    codes = torch.rand(rows, 5, generator=g, dtype=torch.float64) * (torch.rand(rows, 5, generator=g) < 0.5)
    atoms = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return codes @ (atoms if signed else atoms.abs())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_sweep_raises_the_objective_and_the_data_is_found(signed: bool, seed: int) -> None:
    x = _data(signed)
    model = (semi_nmf if signed else nmf)(x, 6, iterations=150, generator=torch.Generator().manual_seed(seed))
    for before, after in zip(model.objective, model.objective[1:], strict=False):
        assert after <= before * (1 + 1e-9) + 1e-12
    codes = model.encode(x)
    assert codes.min() >= 0
    assert r2(x, model.decode(codes)) > 0.97
    if not signed:
        assert model.dictionary.min() >= 0
        torch.testing.assert_close(model.dictionary.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_new_rows_are_encoded_about_as_well_as_by_an_exact_solver() -> None:
    from scipy.optimize import nnls

    x = _data(True)
    model = semi_nmf(x[:100], 5, iterations=200, generator=torch.Generator().manual_seed(0))
    found = (x[100:] - model.decode(model.encode(x[100:]))).square().sum()
    best = sum(nnls(model.dictionary.numpy().T, row.numpy())[1] ** 2 for row in x[100:])
    assert best <= float(found) <= best + 1e-2 * float(x[100:].square().sum())


def test_it_repeats_and_float32_stays_finite() -> None:
    x = _data(True).float()
    one, other = (semi_nmf(x, 20, iterations=30, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.dictionary, other.dictionary)
    assert one.dictionary.isfinite().all()
    zeros = nmf(torch.cat([torch.zeros(3, 12), _data(False).float()]), 5, iterations=30)
    assert zeros.dictionary.isfinite().all()


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"^x: got a smallest value of -1.0, expected none below 0; semi_nmf"):
        nmf(-torch.eye(3), 2)
    with pytest.raises(ConfigError, match=r"^x: got a smallest value of -1.0"):
        nmf(torch.eye(3), 2, iterations=2).encode(-torch.eye(3))
    with pytest.raises(ConfigError, match=r"^iterations: got 0"):
        semi_nmf(torch.eye(3), 2, iterations=0)
