from __future__ import annotations

import math

import pytest
import torch
from effml_diffusion.puzzles.length_mixture import LengthMixture
from effml_diffusion.puzzles.sample_stream import SampleStream
from effml_shared.errors import ConfigError


def test_lengths_come_as_often_as_they_should() -> None:
    mixture = LengthMixture()
    batch = SampleStream(mixture).next(20000)
    for length, probability in mixture.lengths.items():
        share = (batch["lengths"] == length).double().mean().item()
        assert abs(share - probability) < 4 * (probability * (1 - probability) / 20000) ** 0.5
    assert batch["input_ids"].shape == (20000, 64)
    assert torch.equal((batch["input_ids"] == mixture.symbol).sum(1), batch["lengths"])
    assert (batch["input_ids"].diff(dim=1) >= 0).all()  # pads are behind


@pytest.mark.parametrize(
    ("present", "alpha", "missing"),
    [
        (0, 0.0, 26.0),
        (2, 0.25, 11.164186),
        (4, 0.25, 14.595230),
        (8, 0.5, 8.197072),
        (16, 0.5, 15.999769),
        (20, 0.75, 12.0),
        (32, 0.99, 0.0),
    ],
)
def test_expected_missing_tokens(present: int, alpha: float, missing: float) -> None:
    mixture = LengthMixture()
    found = mixture.expected_missing(torch.tensor(present), torch.tensor(alpha, dtype=torch.float64)).item()
    assert found == pytest.approx(missing, abs=1e-6)
    weight = {
        n: p * math.comb(n, present) * alpha**present * (1 - alpha) ** (n - present)
        for n, p in mixture.lengths.items()
        if n >= present
    }
    expected = sum(w * (n - present) for n, w in weight.items()) / sum(weight.values())
    assert found == pytest.approx(expected, rel=1e-12)


def test_impossible_states_are_not_a_number() -> None:
    mixture = LengthMixture({4: 1.0})
    present, alpha = torch.tensor([[5, 4], [3, 1]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert mixture.expected_missing(present, alpha).isnan().tolist() == [[True, False], [True, True]]


def test_empty_texts_and_bad_laws() -> None:
    assert SampleStream(LengthMixture({0: 1.0})).next(3)["input_ids"].shape == (3, 0)
    for law in ({4: 0.5}, {4: 1.5, 5: -0.5}, {4: float("nan")}):
        with pytest.raises(ConfigError, match=r"lengths: got .*expected probabilities that sum to 1"):
            LengthMixture(law)
    with pytest.raises(ConfigError, match=r"lengths: got -1, expected an integer of at least 0"):
        LengthMixture({-1: 1.0})
    with pytest.raises(ConfigError, match=r"lengths: got \{\}"):
        LengthMixture({})
