from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.baselines.pca import pca
from effml_eval.concepts.reconstruction import r2
from effml_shared.errors import ConfigError
from torch import Tensor


def _data(rows: int = 200, dim: int = 8, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.randn(rows, dim, generator=g, dtype=torch.float64) @ mix + 5


@pytest.mark.parametrize("count", [1, 3, 8])
def test_it_is_the_truncated_singular_value_decomposition(count: int) -> None:
    x = _data()
    model = pca(x, count)
    _, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert r2(x, model.decode(model.encode(x))) == pytest.approx(float(s[:count].square().sum() / s.square().sum()))
    torch.testing.assert_close(model.variance, s[:count].square() / 200)
    torch.testing.assert_close(model.dictionary @ model.dictionary.T, torch.eye(count, dtype=torch.float64))
    torch.testing.assert_close(model.encode(x).var(0, correction=0), model.variance)


def test_signs_are_settled_and_new_rows_are_encoded() -> None:
    model = pca(_data(), 3)
    axes = model.dictionary
    assert bool((axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all())
    assert model.encode(_data(5, seed=1)).shape == (5, 3)
    assert pca(_data().float(), 2).dictionary.dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"^n_concepts: got 9"):
        pca(_data(), 9)
    with pytest.raises(ConfigError, match=r"^x: got shape \(2, 3\), expected \(rows, 8\)"):
        pca(_data(), 2).encode(torch.ones(2, 3))
