from __future__ import annotations

import math
from typing import Any

import pytest
from effml_eval.experiments.concept_claims import CLAIMS, KINDS, TWIN, combined, effects, ratio


def _points(**r2: list[float | None]) -> dict[str, list[dict[str, Any]]]:
    return {name.replace("_", "-"): [{"l0": 4.0, "r2": value} for value in values] for name, values in r2.items()}


POINTS = _points(BatchTopK=[0.9, 0.8], TopK=[0.7, 0.9], JumpReLU=[0.8, 0.6], PCA=[0.5, 0.6], k_means=[0.6, 0.5]) | {
    TWIN: [{"l0": 4.0, "r2": 0.95}] * 2
}

NUMBERS: dict[str, list[float | None]] = {
    "stability, strong": [0.9, 0.8],
    "stability, weak": [0.4, 0.5],
    "energy share": [0.6, 0.7],
    "one modality, energy": [0.2, 0.3],
    "degrees to the axis": [80.0, 85.0],
    "errors of the median concept": [45.0, 48.0],
    "linked by bridge": [0.6, 0.5],
    "linked by co-activation": [0.3, 0.0],
}


def test_effects_are_those_of_the_claims() -> None:
    found = effects(POINTS, NUMBERS, 2)
    assert set(found) == {claim.effect for claim in CLAIMS}
    assert found["front"] == [pytest.approx(0.3), pytest.approx(0.2)]  # the other seed's own R2 is no rival
    assert found["best autoencoder"] == [pytest.approx(0.1), pytest.approx(-0.1)]
    assert found["rare are not"] == [pytest.approx(0.5), pytest.approx(0.3)]
    assert found["one modality"] == [0.2, 0.3]
    assert found["bridges"] == [pytest.approx(2.0), math.inf]


def test_what_diverged_leaves_its_claims_unknown() -> None:
    points = {**POINTS, "TopK": [{"l0": None, "r2": None}, {"l0": 4.0, "r2": 0.9}]}
    found = effects(points, {}, 2)
    assert found["best autoencoder"] == [None, pytest.approx(-0.1)]
    assert found["front"] == [pytest.approx(0.3), pytest.approx(0.2)]
    assert all(found[claim.effect] == [None, None] for claim in CLAIMS[2:])
    assert combined(ratio, None, 1.0) is combined(ratio, 1.0, None) is None
    assert set(KINDS) <= set(points)
