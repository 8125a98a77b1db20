from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.energy import modality_energy
from effml_eval.concepts.modality import (
    modality_alignment,
    modality_direction,
    modality_histogram,
    modality_score,
    modality_subspace,
    orthonormal,
)
from effml_shared.errors import ConfigError


def _draw(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_score_of_three_to_one_and_of_a_dead_concept() -> None:
    score = modality_score(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert score[0] == 0.75
    assert score[1].isnan()


def test_duplicating_the_images_changes_no_score() -> None:
    image, text = _draw(6, 4, 0).abs(), _draw(5, 4, 1).abs()
    once, twice = (modality_score(*modality_energy(images, text)) for images in (image, image.repeat(2, 1)))
    torch.testing.assert_close(once, twice)


def test_negative_energies_have_no_score() -> None:
    with pytest.raises(ConfigError, match=r"^text_energy: got a smallest value of -1.0, expected energies >= 0$"):
        modality_score(torch.ones(1), -torch.ones(1))
    with pytest.raises(ConfigError, match=r"^text_energy: got shape \(2,\)"):
        modality_score(torch.ones(1), torch.ones(2))


def test_histograms_count_concepts_or_energy_and_leave_out_the_dead() -> None:
    score = torch.tensor([0.0, 0.04, 1.0, torch.nan])
    fractions, edges = modality_histogram(score, bins=10)
    assert fractions.tolist() == pytest.approx([2 / 3, *[0] * 8, 1 / 3])
    assert edges.tolist() == pytest.approx([i / 10 for i in range(11)])
    weighted = modality_histogram(score, bins=10, weights=torch.tensor([1.0, 1.0, 6.0, 5.0]))
    assert weighted.fractions.tolist() == pytest.approx([0.25, *[0] * 8, 0.75])
    with pytest.raises(ConfigError, match=r"^score: got values from 0.0 to 2.0, expected \[0, 1\]$"):
        modality_histogram(torch.tensor([0.0, 2.0]))
    with pytest.raises(ConfigError, match=r"^weights: got shape \(1,\)"):
        modality_histogram(score, weights=torch.ones(1))


@pytest.mark.parametrize("method", ["means", "probe"])
def test_the_direction_points_from_text_to_images(method: str) -> None:
    axis = torch.nn.functional.normalize(_draw(1, 8, 0), dim=1)[0]
    image, text = _draw(4000, 8, 1) + 2 * axis, _draw(3000, 8, 2) - 2 * axis
    found = modality_direction(image, text, method=method)
    assert found.norm() == pytest.approx(1)
    assert found @ axis > 0.99


def test_the_probe_discounts_what_varies_within_a_modality() -> None:
    wide = torch.tensor([10.0, 1.0], dtype=torch.float64)
    image, text = _draw(4000, 2, 1) * wide + 1, _draw(4000, 2, 2) * wide - 1
    expected = torch.nn.functional.normalize(torch.tensor([2 / 200, 2 / 2], dtype=torch.float64), dim=0)
    assert modality_direction(image, text, method="probe") @ expected > 0.999
    assert modality_direction(image, text)[0] > 0.5


def test_sets_of_one_mean_have_no_direction() -> None:
    with pytest.raises(ConfigError, match=r"^image, text: got two sets of one mean"):
        modality_direction(torch.eye(2), torch.eye(2))
    with pytest.raises(ConfigError, match=r"^text: got no rows"):
        modality_direction(torch.eye(2), torch.zeros(0, 2))
    with pytest.raises(ConfigError, match=r"^method: got 'svm'"):
        modality_direction(torch.eye(2), torch.eye(2), method="svm")
    assert modality_direction(torch.ones(1, 2), torch.zeros(1, 2), method="probe").norm() == pytest.approx(1)


def test_the_subspace_of_three_modalities_has_two_dimensions() -> None:
    shifts = [torch.eye(5, dtype=torch.float64)[i] * 3 for i in range(3)]
    groups = [_draw(50, 5, i) * 0.01 + shift for i, shift in enumerate(shifts)]
    basis = modality_subspace(groups)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(
        modality_alignment(torch.stack(shifts), basis), torch.full((3,), (2 / 3) ** 0.5).double(), atol=0.01, rtol=0
    )
    two = modality_subspace(groups[:2])
    assert abs(two[0] @ modality_direction(groups[0], groups[1])) == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"^rank: got 2, expected at most 1"):
        modality_subspace(groups[:2], 2)
    with pytest.raises(ConfigError, match=r"^groups: got 1"):
        modality_subspace(groups[:1])


def test_alignment_is_the_cosine_whatever_the_norms() -> None:
    atoms = torch.tensor([[3.0, 4.0], [-3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(modality_alignment(atoms, torch.tensor([5.0, 0.0])), torch.tensor([0.6, 0.6, 0.0]))
    torch.testing.assert_close(modality_alignment(atoms, torch.tensor([[1.0, 0.0], [1.0, 1.0]])), torch.ones(3))
    with pytest.raises(ConfigError, match=r"^directions: got vectors that depend on each other"):
        modality_alignment(atoms, torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    with pytest.raises(ConfigError, match=r"^dictionary: got 1 atoms of norm 0"):
        modality_alignment(torch.zeros(1, 2), torch.ones(2))
    with pytest.raises(ConfigError, match=r"^u: got 3 vectors, expected 1 to 2"):
        orthonormal("u", torch.ones(3, 2), 2)
