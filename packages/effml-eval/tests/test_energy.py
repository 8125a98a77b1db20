from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.energy import energy, energy_share, modality_energy, top_concepts
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError


def test_energy_is_the_mean_code() -> None:
    codes = torch.rand(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(energy(codes), codes.mean(0))
    torch.testing.assert_close(energy(SparseCodes.from_dense(codes)), codes.mean(0))


def test_atom_norms_weigh_it_so_that_rescaling_changes_nothing() -> None:
    codes = torch.rand(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    atoms = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    expected = (codes.mean(0)[:, None] * atoms).norm(dim=1)
    torch.testing.assert_close(energy(codes, atoms), expected)
    torch.testing.assert_close(energy(codes / scale, atoms * scale[:, None]), expected)


def test_the_balanced_energy_does_not_see_how_many_rows_a_modality_has() -> None:
    image, text = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    once, often = modality_energy(image, text), modality_energy(image.repeat(5, 1), text)
    assert once.balanced.tolist() == often.balanced.tolist() == [2.0, 1.0]


def test_the_strongest_concepts_and_their_share() -> None:
    values = torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert top_concepts(values, 3).tolist() == [1, 2, 0]
    assert energy_share(values, 2) == 0.75


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"^codes: got no rows"):
        energy(torch.zeros(0, 2))
    with pytest.raises(ConfigError, match=r"^dictionary: got 3 atoms, expected 2"):
        energy(torch.ones(1, 2), torch.ones(3, 4))
    with pytest.raises(ConfigError, match=r"^text_codes: got shape \(1, 3\)"):
        modality_energy(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ConfigError, match=r"^top: got 5 of 4 concepts"):
        top_concepts(torch.ones(4), 5)
