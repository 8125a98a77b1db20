from __future__ import annotations

from importlib import import_module

import pytest
import torch
from effml_eval.concepts.pair_alignment import modality_gap, pair_alignment, retrieval_ranks
from effml_shared.errors import ConfigError
from torch import Tensor


def _pairs(rows: int = 40, dim: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    return image, image + torch.randn(rows, dim, generator=g, dtype=torch.float64)


def test_ranks_against_sorting() -> None:
    image, text = _pairs()
    similarity = torch.nn.functional.normalize(image, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    order = similarity.argsort(dim=1, descending=True)
    expected = (order == torch.arange(40)[:, None]).int().argmax(1) + 1
    assert torch.equal(retrieval_ranks(image, text), expected)
    found = pair_alignment(image, text, ks=(1, 5))
    assert found.image_to_text == {k: float((expected <= k).double().mean()) for k in (1, 5)}
    assert found.similarity == pytest.approx(float(similarity.diagonal().mean()))
    back = retrieval_ranks(text, image)
    assert found.text_to_image[1] == float((back == 1).double().mean())


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = _pairs()
    expected = retrieval_ranks(image, text)
    monkeypatch.setattr(import_module("effml_eval.concepts.pair_alignment"), "BLOCK", 90)
    assert torch.equal(retrieval_ranks(image, text), expected)


def test_ties_earn_nothing() -> None:
    same = torch.ones(10, 3)
    assert pair_alignment(same, same).image_to_text == {1: 0.0}
    assert pair_alignment(torch.eye(3), torch.eye(3)).text_to_image == {1: 1.0}


def test_the_gap_is_the_distance_of_means() -> None:
    image, text = _pairs()
    assert modality_gap(image, text[:7]) == pytest.approx(float((image.mean(0) - text[:7].mean(0)).norm()))
    one = torch.tensor([[2.0, 0.0]])
    assert pair_alignment(one, -3 * one).gap == 2
    assert pair_alignment(one, -3 * one).similarity == -1


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"^text: got shape \(3, 2\) beside \(2, 2\)"):
        pair_alignment(torch.ones(2, 2), torch.ones(3, 2))
    with pytest.raises(ConfigError, match=r"^text: got shape \(0, 2\) beside \(0, 2\)"):
        retrieval_ranks(torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(ConfigError, match=r"^ks: got 0"):
        pair_alignment(torch.eye(2), torch.eye(2), ks=(0,))
    with pytest.raises(ConfigError, match=r"^image, text: got 0 and 1 rows"):
        modality_gap(torch.ones(0, 2), torch.ones(1, 2))
