from __future__ import annotations

from importlib import import_module

import pytest
import torch
from effml_eval.concepts.baselines.kmeans import kmeans
from effml_eval.concepts.firing import l0
from effml_eval.concepts.reconstruction import r2
from effml_shared.errors import ConfigError
from torch import Tensor


def _clusters() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(6, dtype=torch.float64) + 3
    return centres[torch.arange(120) % 6] + 0.1 * torch.randn(120, 6, generator=g, dtype=torch.float64), centres


def test_separate_clusters_are_found() -> None:
    x, centres = _clusters()
    model = kmeans(x, 6, generator=torch.Generator().manual_seed(1))
    assert torch.cdist(model.dictionary, centres).min(1).values.max() < 0.1
    codes = model.encode(x)
    assert l0(codes) == 1
    assert r2(x, model.decode(codes)) > 0.99
    assert model.inertia == pytest.approx(float((x - model.decode(codes)).square().sum(1).mean()))
    assert torch.equal(codes.indices[:6].sort(0).values[:, 0], torch.arange(6))


def test_projections_fit_lengths_as_well() -> None:
    x, _ = _clusters()
    x = x * torch.linspace(0.5, 1.5, 120, dtype=torch.float64)[:, None]
    one, projection = (
        kmeans(x, 6, code=code, generator=torch.Generator().manual_seed(1)) for code in ("one", "projection")
    )
    assert r2(x, projection.decode(projection.encode(x))) > r2(x, one.decode(one.encode(x)))
    opposite = projection.encode(-x)
    assert (opposite.values >= 0).all()


def test_more_sweeps_never_hurt_and_as_many_centres_as_rows_fit_exactly() -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    inertia = [kmeans(x, 8, iterations=n, generator=torch.Generator().manual_seed(0)).inertia for n in (0, 1, 2, 5, 20)]
    assert inertia == sorted(inertia, reverse=True)
    assert kmeans(x, 60).inertia < 1e-6


def test_an_empty_cluster_takes_the_farthest_point(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    monkeypatch.setattr(
        import_module("effml_eval.concepts.baselines.kmeans"),
        "_first_centres",
        lambda x, count, generator: torch.tensor([[0.0], [100.0]]) - 2.325,
    )
    assert sorted(kmeans(x, 2).dictionary[:, 0].tolist()) == pytest.approx([0.1, 9.0], abs=1e-5)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"^n_concepts: got 3 for 1 different rows"):
        kmeans(torch.ones(5, 2), 3)
    with pytest.raises(ConfigError, match=r"^n_concepts: got 6"):
        kmeans(torch.eye(5), 6)
    with pytest.raises(ConfigError, match=r"^code: got 'two'"):
        kmeans(torch.eye(5), 2, code="two")
    assert kmeans(torch.eye(5), 2).encode(torch.zeros(0, 5)).values.shape == (0, 1)
