from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effml_diffusion.diffusion_transformer import DiffusionTransformer
from effml_diffusion.diffusion_transformer_config import PRESETS, DiffusionTransformerConfig
from effml_shared.config import load_config, to_yaml
from effml_shared.errors import ConfigError


def count(config: DiffusionTransformerConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiffusionTransformer(config).parameters())


@pytest.mark.parametrize(
    ("name", "plain", "with_gap_head"),
    [("bracket", 3_608_452, 3_708_037), ("text-small", 169_627_218, 170_417_491), ("sudoku", 28_558_091, None)],
)
def test_presets_have_the_papers_parameters(name: str, plain: int, with_gap_head: int | None) -> None:
    assert count(PRESETS[name]()) == plain
    if with_gap_head is not None:
        assert count(PRESETS[name](gap_head="expectation", pad_id=3)) == with_gap_head


def test_leaving_conditioning_away_saves_exactly_its_parameters() -> None:
    shape: dict[str, Any] = {"n_layers": 3, "d_model": 48, "n_heads": 4, "cond_dim": 20, "vocab_size": 7}
    none, time = (count(DiffusionTransformerConfig(conditioning=kind, **shape)) for kind in ("none", "time"))
    layers, d, c, v = 3, 48, 20, 7
    assert time - none == layers * 6 * d * (c + 1) + 2 * d * (c + 1) + (257 * c + c**2 + c)
    assert none == v * d + layers * (12 * d**2 + 7 * d) + d + (d + 1) * v


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "beta"}, r"^conditioning: got 'beta', expected one of 'none', 'zero', 'time', "),
        ({"gap_head": "yes"}, r"^gap_head: got 'yes', expected one of 'none', 'expectation', 'distribution'$"),
        ({"causal": True}, r"^causal: got True, expected False$"),
        ({"tied": True}, r"^tied: got True, expected False$"),
        ({"norm_position": "post"}, r"^norm_position: got 'post', expected one of 'pre'$"),
        ({"position": "alibi"}, r"^position: got 'alibi', expected one of 'rope', 'none'$"),
        ({"cond_dim": 0}, r"^cond_dim: got 0, "),
        ({"time_scale": float("nan")}, r"^time_scale: got nan, "),
        ({"length_conditioning": True, "max_length": 4}, r"^length_conditioning: got True, expected another"),
        ({"length_conditioning": True, "conditioning": "time"}, r"^max_length: got None, "),
        ({"max_length": 0}, r"^max_length: got 0, "),
        ({"gap_head": "expectation", "pad_id": 1}, r"^max_length: got None, "),
        ({"gap_head": "expectation", "max_length": 4}, r"^pad_id: got None, expected an id below vocab_size=256$"),
        ({"gap_head": "expectation", "max_length": 4, "pad_id": 256}, r"^pad_id: got 256, "),
        ({"coordinates": ((0, 1), (0,))}, r"^coordinates: got axes of \[1, 2\] places"),
        ({"coordinates": ((),)}, r"^coordinates: got axes of \[0\] places"),
        ({"coordinates": ((0, -1),)}, r"^coordinates: got "),
        ({"coordinates": ((0, "1"),)}, r"^coordinates: got "),
        ({"coordinates": (0, 1)}, r"^coordinates: got \(0, 1\), expected one tuple of places for each axis$"),
        ({"n_heads": 3}, r"^n_heads: got 3, "),
    ],
)
def test_bad_fields_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusionTransformerConfig(**options)


def test_coordinates_and_gaps_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^coordinates: got some beside a gap_head"):
        PRESETS["bracket"](gap_head="expectation", coordinates=((0, 1),))


def test_survives_yaml(tmp_path: Path) -> None:
    config = DiffusionTransformerConfig(coordinates=((0, 0, 1), (0, 1, 0)), conditioning="zero")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(DiffusionTransformerConfig(), yaml=tmp_path / "config.yaml") == config
