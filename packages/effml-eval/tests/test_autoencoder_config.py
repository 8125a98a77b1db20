"""Fields out of range are named."""

import pytest
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_shared.errors import ConfigError


def test_size_by_number_or_by_expansion():
    assert SAEConfig(d_in=8, n_concepts=20, k=4).concepts == 20
    assert SAEConfig(d_in=8, expansion=2.5, k=4).concepts == 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"n_concepts, expansion: got None and None"),
        ({"n_concepts": 4, "expansion": 2.0}, r"expected exactly one"),
        ({"expansion": 0.0}, r"n_concepts: got 0"),
        ({"expansion": float("nan")}, r"expansion: got nan"),
        ({"n_concepts": 16, "k": 17}, r"k: got 17"),
        ({"n_concepts": 16, "k": 0}, r"k: got 0"),
        ({"n_concepts": 16, "k": -1, "kind": "topk"}, r"k: got -1"),
        ({"n_concepts": 16, "k": 1.5, "kind": "topk"}, r"k: got 1.5, expected an integer"),
        ({"n_concepts": 16, "k": 0.5, "kind": "matching_pursuit"}, r"k: got 0.5"),
        ({"n_concepts": 16, "kind": "matching_pursuit", "normalize": "none"}, r"normalize: got 'none'"),
        ({"n_concepts": 16, "kind": "l1"}, r"kind: got 'l1'"),
        ({"n_concepts": 16, "k": 2, "normalize": "unit"}, r"normalize: got 'unit'"),
        ({"n_concepts": 16, "k": 2, "kernel": "box"}, r"kernel: got 'box'"),
        ({"n_concepts": 16, "k": 2, "aux_alpha": -1.0}, r"aux_alpha: got -1.0"),
        ({"n_concepts": 16, "k": 2, "dead_after": 0}, r"dead_after: got 0"),
        ({"n_concepts": 16, "k": 2, "bandwidth": 0.0}, r"bandwidth: got 0.0"),
        ({"n_concepts": 16, "k": 2, "l0_target": 0.0}, r"l0_target: got 0.0"),
        ({"n_concepts": 16, "k": 2, "k_start": 8}, r"k_start, k_steps: got 8 and 0"),
        ({"n_concepts": 16, "k": 2, "k_steps": 5}, r"k_start, k_steps: got None and 5"),
        ({"n_concepts": 16, "k": 2, "k_start": 17, "k_steps": 5}, r"k_start: got 17"),
        ({"n_concepts": 16, "k": 2, "k_start": 0, "k_steps": 5}, r"k_start: got 0"),
        ({"n_concepts": 16, "kind": "relu", "k_start": 8, "k_steps": 5}, r"k_start: got 8 for relu"),
        ({"n_concepts": 16, "k": 2, "threshold_decay": 1.0}, r"threshold_decay: got 1.0"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SAEConfig(d_in=8, **fields)


def test_k_goes_in_a_line_to_its_end():
    config = SAEConfig(d_in=8, n_concepts=64, k=4.5, k_start=64, k_steps=10)
    assert [config.k_at(step) for step in (0, 2, 9, 10, 99)] == pytest.approx([64, 52.1, 10.45, 4.5, 4.5])
    rounded = SAEConfig(d_in=8, n_concepts=64, kind="topk", k=1, k_start=6, k_steps=4)
    assert [rounded.k_at(step) for step in range(6)] == [6, 5, 4, 2, 1, 1]
    assert SAEConfig(d_in=8, n_concepts=64, k=4).k_at(0) == 4
