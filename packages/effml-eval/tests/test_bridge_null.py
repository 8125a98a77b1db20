from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.bridge import bridge_matrix
from effml_eval.concepts.bridge_null import significant_bridges
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError
from torch import Tensor


def _pairs(rows: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Image concept 0 and text concept 1 fire together; the others, of either side, by themselves."""
    g = torch.Generator().manual_seed(0)
    image, text = ((torch.rand(rows, 6, generator=g) < 0.3).double() for _ in range(2))
    text[:, 1] = image[:, 0]
    return image, text, torch.ones(6, 1, dtype=torch.float64)


def test_the_true_bridge_stands_out_and_chance_does_not() -> None:
    image, text, atoms = _pairs()
    for form in (lambda z: z, SparseCodes.from_dense):
        edges, q = significant_bridges(form(image), form(text), atoms, 10, generator=torch.Generator().manual_seed(1))
        assert (edges.image[0], edges.text[0], q[0]) == (0, 1, 0)
        assert q[1:].min() > 0.2
        assert q.max() <= 1
        assert bool((q.diff() >= 0).all())


def test_q_values_against_counting_by_hand() -> None:
    image, text, atoms = _pairs(40)
    edges, q = significant_bridges(image, text, atoms, 8, shuffles=5, generator=torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    nulls = [bridge_matrix(image, text[torch.randperm(40, generator=g)], atoms, center=True) for _ in range(5)]
    observed = bridge_matrix(image, text, atoms, center=True)
    rate = [sum((null >= s).sum().item() for null in nulls) / 5 / (observed >= s).sum().item() for s in edges.score]
    expected = [min([1.0, *rate[i:]]) for i in range(len(rate))]
    assert q.tolist() == pytest.approx(expected)


def test_nothing_to_judge() -> None:
    edges, q = significant_bridges(torch.zeros(3, 2), torch.ones(3, 2), torch.ones(2, 1), 5)
    assert len(edges.score) == len(q) == 0
    with pytest.raises(ConfigError, match=r"^shuffles: got 0"):
        significant_bridges(torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 1), 5, shuffles=0)
