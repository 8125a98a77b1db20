from __future__ import annotations

import math

import pytest
import torch
from effml_diffusion.modulation import ScalarEmbedding, ZeroLinear, modulate, sinusoids


def test_sinusoids_of_a_known_time() -> None:
    cosines = [0.8775825619, 0.9987502604, 0.9999875000, 0.9999998750]
    sines = [0.4794255386, 0.0499791693, 0.0049999792, 0.0005]
    got = sinusoids(torch.tensor([0.5], dtype=torch.float64), 8)
    assert got.tolist()[0] == pytest.approx([*cosines, *sines], abs=1e-10)


def test_frequencies_fall_geometrically() -> None:
    got = sinusoids(torch.tensor([1.0, -2.0], dtype=torch.float64))
    angles = [math.exp(-math.log(1e4) * k / 128) for k in range(128)]
    for row, x in zip(got.tolist(), (1.0, -2.0), strict=True):
        assert row == pytest.approx([f(x * a) for f in (math.cos, math.sin) for a in angles], abs=1e-14)


def test_angles_stay_wide_in_a_narrow_network() -> None:
    torch.manual_seed(0)
    embedding = ScalarEmbedding(8)
    x = torch.tensor([999.7, 1000.0])
    expected = embedding(x)
    got = embedding.bfloat16()(x.double())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.02)


def test_a_zero_embedding_starts_as_nothing_and_learns() -> None:
    embedding = ScalarEmbedding(8, zero=True)
    out = embedding(torch.tensor([0.3]))
    assert not out.any()
    out.sum().backward()
    assert embedding.output.weight.grad is not None
    assert embedding.output.weight.grad.any()


def test_zero_linear_is_zero_after_every_reset() -> None:
    layer = ZeroLinear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    layer.reset_parameters()
    assert not layer.weight.any()
    assert not layer.bias.any()


def test_modulation_is_per_text() -> None:
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    shift, scale = torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert modulate(x, shift, scale).tolist() == [[[1.0, 3.0]], [[8.0, 8.0]]]
