from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.baselines.ica import ica
from effml_eval.concepts.baselines.pca import pca
from effml_eval.concepts.matching import match_dictionaries
from effml_eval.concepts.reconstruction import r2
from effml_shared.errors import ConfigError
from torch import Tensor


def _data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    uniform = torch.rand(3000, 4, generator=g, dtype=torch.float64)
    sources = torch.where(uniform < 0.5, (2 * uniform).log(), -(2 * (1 - uniform)).log())  # Laplace: heavy-tailed
    mixing = torch.randn(4, 4, generator=g, dtype=torch.float64)
    return sources @ mixing + 3, mixing


def test_independent_sources_are_found_up_to_order_and_sign() -> None:
    x, mixing = _data()
    model = ica(x, 4, generator=torch.Generator().manual_seed(1))
    assert model.converged
    both = torch.cat([model.dictionary, -model.dictionary])
    matching = match_dictionaries(mixing, both, rectangular=True)
    assert matching.similarity.min() > 0.99
    codes = model.encode(x)
    torch.testing.assert_close(codes.T @ codes / len(x), torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(model.decode(codes), x)


def test_fewer_components_explain_what_as_many_principal_ones_do() -> None:
    x, _ = _data()
    model = ica(x.float(), 2)
    assert model.dictionary.dtype == torch.float32
    axes = pca(x, 2)
    assert r2(x, model.decode(model.encode(x))) == pytest.approx(r2(x, axes.decode(axes.encode(x))), abs=1e-5)


def test_errors() -> None:
    flat = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    with pytest.raises(ConfigError, match=r"^n_concepts: got 2, expected no more than the directions"):
        ica(flat, 2)
    assert not ica(_data()[0], 4, iterations=1).converged
    with pytest.raises(ConfigError, match=r"^tolerance: got -1"):
        ica(flat, 1, tolerance=-1.0)
