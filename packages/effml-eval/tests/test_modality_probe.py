from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.modality_probe import modality_probe
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def _best(image: Tensor, text: Tensor) -> float:
    """Try every threshold and both rules."""
    found = []
    for threshold in [-1e9, *image.tolist(), *text.tolist()]:
        right = (image > threshold).double().mean() / 2 + (text <= threshold).double().mean() / 2
        found += [float(right), 1 - float(right)]
    return max(found)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_the_best_threshold_is_found_exactly(images: int, texts: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    image, text = (torch.randint(-1, 4, (n, 3), generator=g).double() for n in (images, texts))
    expected = [_best(image[:, i], text[:, i]) for i in range(3)]
    for forms in ((image, text), tuple(map(SparseCodes.from_dense, (image, text)))):
        probe = modality_probe(*forms)
        assert probe.accuracy.tolist() == pytest.approx(expected, abs=1e-12)
        for i in range(3):
            right = (image[:, i] > probe.threshold[i]).double().mean() + (
                text[:, i] <= probe.threshold[i]
            ).double().mean()
            reached = right / 2 if probe.image_above[i] else 1 - right / 2
            assert float(reached) == pytest.approx(expected[i], abs=1e-12)


def test_one_modality_alone_is_told_apart_and_noise_is_not() -> None:
    image, text = torch.zeros(40, 3), torch.zeros(60, 3)
    image[:, 0], text[:, 1], image[:, 2], text[:, 2] = 1, 1, 1, 1
    probe = modality_probe(image, text)
    assert probe.accuracy.tolist() == [1.0, 1.0, 0.5]
    assert probe.image_above[:2].tolist() == [True, False]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(20, 7, generator=g).clamp(min=0) for _ in range(2))
    whole = modality_probe(image, text)
    monkeypatch.setattr("effml_eval.concepts.code_entries.BLOCK", 80)
    for one, other in zip(whole, modality_probe(image, SparseCodes.from_dense(text)), strict=True):
        assert torch.equal(one, other)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"^image_codes, text_codes: got 0 and 2 rows"):
        modality_probe(torch.zeros(0, 3), torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"^text_codes: got shape \(2, 4\)"):
        modality_probe(torch.zeros(1, 3), torch.zeros(2, 4))
