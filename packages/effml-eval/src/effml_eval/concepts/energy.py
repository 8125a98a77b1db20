"""Energy of a concept: its mean code, over all rows or over the rows of one modality.

    E_i = mean_n z_ni        E_i = (E_i^image + E_i^text) / 2  balanced: unequal numbers of rows do not tilt it

With a dictionary the energy is |E_i d_i|: the same for unit atoms, and the only one to compare dictionaries of other
norms by. Cost: one pass over the stored codes. Source: arXiv 2504.11695, section 4, as others summarise it.
"""

from __future__ import annotations

from typing import NamedTuple

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor, linalg

from effml_eval.concepts.code_entries import Codes, check_codes, check_column, check_matrix, n_concepts_of
from effml_eval.concepts.firing import Firing

__all__ = ["ModalityEnergy", "energy", "energy_share", "modality_energy", "top_concepts"]


class ModalityEnergy(NamedTuple):
    """Energies by modality, (C) float64 each."""

    image: Tensor
    text: Tensor

    @property
    def balanced(self) -> Tensor:
        """(C) float64, mean of the two."""
        return (self.image + self.text) / 2


def energy(codes: Codes, dictionary: Tensor | None = None) -> Tensor:
    """Return the energy of every concept, (C) float64.

    Args:
        codes: (N, C), of at least one row.
        dictionary: (C, d); its norms then multiply the energies, whose sign is dropped.

    Raises:
        ConfigError: there are no rows, something is not finite, or the dictionary has other concepts.

    >>> import torch
    >>> energy(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
    tensor([2., 1.], dtype=torch.float64)
    """
    return _energy("codes", codes, dictionary)


def modality_energy(image_codes: Codes, text_codes: Codes, dictionary: Tensor | None = None) -> ModalityEnergy:
    """Return energies over image rows and over text rows; the two sets need not be pairs, nor of one size."""
    check_codes("image_codes", image_codes)
    check_codes("text_codes", text_codes, n_concepts_of(image_codes))
    return ModalityEnergy(
        _energy("image_codes", image_codes, dictionary), _energy("text_codes", text_codes, dictionary)
    )


def top_concepts(energy: Tensor, top: int) -> Tensor:
    """Return the `top` concepts of most energy, (top) int64, the strongest first and of equals the lowest index.

    Raises:
        ConfigError: `top` is not a number from 1 to C.
    """
    check_count("top", top, 1)
    energy = check_column("energy", energy)
    if top > len(energy):
        raise ConfigError(f"top: got {top} of {len(energy)} concepts, expected at most as many")
    return energy.argsort(descending=True, stable=True)[:top]


def energy_share(energy: Tensor, top: int) -> float:
    """Return the part of all energy that the `top` strongest concepts carry; NaN where there is no energy."""
    return float(energy[top_concepts(energy, top)].sum() / energy.sum())


def _energy(name: str, codes: Codes, dictionary: Tensor | None) -> Tensor:
    if not check_codes(name, codes):
        raise ConfigError(f"{name}: got no rows, expected at least one")
    firing = Firing(n_concepts_of(codes), device=codes.device if isinstance(codes, Tensor) else codes.values.device)
    firing.update(codes)
    if dictionary is None:
        return firing.energy
    atoms = check_matrix("dictionary", dictionary)
    if len(atoms) != len(firing.energy):
        raise ConfigError(f"dictionary: got {len(atoms)} atoms, expected {len(firing.energy)}, one per concept")
    return firing.energy.abs() * linalg.vector_norm(atoms.double(), dim=1)
