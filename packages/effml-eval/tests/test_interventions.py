from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_eval.concepts.interventions import ablate, remove_directions, steer
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError
from torch import Tensor


def _world() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(10, 6, generator=g, dtype=torch.float64).clamp(min=0)
    atoms = torch.randn(6, 4, generator=g, dtype=torch.float64)
    return codes @ atoms + 0.1 * torch.randn(10, 4, generator=g, dtype=torch.float64), codes, atoms


@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("form", [lambda z: z, SparseCodes.from_dense])
@pytest.mark.parametrize("scale", [0.0, 2.5, torch.tensor([0.5, -1.0])])
def test_against_changing_the_codes_and_decoding(keep_error: bool, form: Any, scale: float | Tensor) -> None:
    x, codes, atoms = _world()
    changed = codes.clone()
    changed[:, [4, 1]] *= scale
    expected = changed @ atoms + (x - codes @ atoms if keep_error else 0)
    found = steer(x, form(codes), atoms, [4, 1], scale, keep_error=keep_error)
    torch.testing.assert_close(found, expected)


def test_ablating_nothing_and_scaling_by_one_change_nothing() -> None:
    x, codes, atoms = _world()
    assert torch.equal(ablate(x, codes, atoms, []), x)
    assert torch.equal(steer(x, codes, atoms, [0, 1], 1.0), x)
    offset = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(ablate(x, codes, atoms, range(6), keep_error=False, offset=offset), offset.expand(10, 4))


def test_a_concept_that_stands_twice_in_a_row_goes_altogether() -> None:
    codes = SparseCodes(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 1]]), 2)
    assert ablate(torch.tensor([[0.5, 3.0]]), codes, torch.eye(2), torch.tensor([1])).tolist() == [[0.5, 0.0]]


def test_removed_directions_are_gone() -> None:
    x, _, atoms = _world()
    for directions in (atoms[0], atoms[:3]):
        left = remove_directions(x, directions)
        torch.testing.assert_close(left.norm(dim=1), torch.ones(10, dtype=torch.float64))
        assert float((left @ directions.reshape(-1, 4).T).abs().max()) < 1e-12
        plain = remove_directions(x, directions, normalize=False)
        torch.testing.assert_close(plain + (x - plain), x)
        torch.testing.assert_close(remove_directions(plain, directions, normalize=False), plain)
    assert remove_directions(torch.tensor([[2.0, 0.0]]), torch.tensor([1.0, 0.0])).tolist() == [[0.0, 0.0]]


def test_errors() -> None:
    x, codes, atoms = _world()
    for bad, message in (
        ([6], r"^concepts: got \[6\], expected different indices in \[0, 6\)"),
        ([1, 1], r"^concepts: got \[1, 1\], expected different"),
        ([0.5], r"^concepts: got \[0.5\], expected different"),
        (torch.tensor([[1]]), r"^concepts: got \[\[1\]\], expected different"),
        (torch.tensor(1), r"^concepts: got 1, expected different"),
        ("ab", r"^concepts: got \['a', 'b'\], expected different"),
    ):
        with pytest.raises(ConfigError, match=message):
            ablate(x, codes, atoms, bad)
    with pytest.raises(ConfigError, match=r"^scale: got shape \(3,\)"):
        steer(x, codes, atoms, [1, 2], torch.ones(3))
    with pytest.raises(ConfigError, match=r"^codes: got another number of rows than the 10 of x"):
        ablate(x, codes[:2], atoms, [1])
    with pytest.raises(ConfigError, match=r"^x: got shape \(10, 3\), expected \(rows, 4\)"):
        ablate(x[:, :3], codes, atoms, [1])
    with pytest.raises(ConfigError, match=r"^directions: got shape \(1, 3\)"):
        remove_directions(x, torch.ones(3))
