from __future__ import annotations

import pytest
import torch
from effml_eval.concepts.matching import match_dictionaries
from effml_eval.concepts.stability import energy_stability, stability, stability_null
from effml_shared.errors import ConfigError
from torch import Tensor


def _unit(count: int, dim: int, seed: int) -> Tensor:
    draw = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(draw, dim=1)


def test_rows_in_another_order_and_of_other_norms_are_the_same_dictionary() -> None:
    a = _unit(20, 5, 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(20, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert stability(a, (a * scale)[order]) == pytest.approx(1)
    assert stability(torch.eye(4), torch.eye(4)) == 1
    b = _unit(20, 5, 1)
    assert stability(a, b * scale) == pytest.approx(stability(a, b))


def test_an_opposite_atom_is_another_concept() -> None:
    assert stability(torch.eye(1), -torch.eye(1)) == -1


@pytest.mark.parametrize(
    ("count", "dim", "mean"),
    [
        (256, 64, 0.327),
        (512, 64, 0.354),
        (512, 512, 0.128),
        pytest.param(1024, 256, 0.194, marks=pytest.mark.slow),
    ],
)
def test_random_dictionaries_match_as_well_as_is_known(count: int, dim: int, mean: float) -> None:
    stream = torch.Generator().manual_seed(1000)
    pairs = [
        stability_null(_unit(count, dim, seed), _unit(count, dim, 99), kind="random", draws=2, generator=stream)
        for seed in range(4)
    ]
    assert float(torch.cat(pairs).mean()) == pytest.approx(mean, abs=0.003)  # one pair differs by as much


def test_a_rotation_keeps_the_angles_and_nothing_else() -> None:
    a = _unit(64, 16, 0)
    null = stability_null(a, a, draws=4, generator=torch.Generator().manual_seed(1))
    again = stability_null(a, a, draws=4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(null, again)
    random = stability_null(a, a, kind="random", draws=4, generator=torch.Generator().manual_seed(1))
    assert float(null.mean()) == pytest.approx(float(random.mean()), abs=0.05)
    assert null.max() < 0.7
    # One dimension leaves a rotation only the sign of all atoms: half of them match, or all.
    line = stability_null(torch.ones(4, 1), torch.ones(4, 1), draws=8, generator=torch.Generator().manual_seed(0))
    assert set(line.tolist()) == {-1.0, 1.0}


def test_the_strong_concepts_are_averaged_after_all_are_matched() -> None:
    a = torch.eye(6, dtype=torch.float64)
    b = a.clone()
    b[3:, 3:] = _unit(3, 3, 5)  # the weak atoms of run B are others
    energy = torch.tensor([3.0, 2.0, 1.0, 0.3, 0.2, 0.1])
    matching = match_dictionaries(a, b[[5, 1, 4, 0, 2, 3]])
    assert energy_stability(matching, energy, 3) == pytest.approx(1)
    assert energy_stability(matching, -energy, 3) == pytest.approx(float(matching.similarity[3:].mean()))
    assert energy_stability(matching, energy, 6) == pytest.approx(matching.stability)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"^b: got 2 atoms beside 3"):
        stability(torch.eye(3), torch.eye(3)[:2])
    assert stability(torch.eye(3), torch.eye(3)[:2], rectangular=True) == 1
    with pytest.raises(ConfigError, match=r"^energy: got shape \(2,\), expected \(3,\)"):
        energy_stability(match_dictionaries(torch.eye(3), torch.eye(3)), torch.ones(2), 1)
    with pytest.raises(ConfigError, match=r"^kind: got 'shuffle'"):
        stability_null(torch.eye(3), torch.eye(3), kind="shuffle")
    with pytest.raises(ConfigError, match=r"^draws: got 0"):
        stability_null(torch.eye(3), torch.eye(3), draws=0)
