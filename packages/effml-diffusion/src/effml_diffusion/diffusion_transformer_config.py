"""Shape and variant of a `DiffusionTransformer`, and the papers' networks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.layers import TransformerConfig

from effml_diffusion.insertion_head import INSERTION_HEADS

__all__ = ["PRESETS", "DiffusionTransformerConfig"]


@dataclass(frozen=True, kw_only=True)
class DiffusionTransformerConfig(TransformerConfig):
    """Shape and variant of a `DiffusionTransformer`; fields of `TransformerConfig` with other defaults, and its own.

    >>> DiffusionTransformerConfig(conditioning="alpha", gap_head="expectation", pad_id=255)
    Traceback (most recent call last):
    effml_shared.errors.ConfigError: max_length: got None, expected the longest text for gap_head or length_conditioning
    """

    causal: bool = False  # always
    norm: str = "layer"
    norm_eps: float = 1e-5
    mlp: str = "gelu_tanh"
    mlp_bias: bool = True
    vocab_rows: int | None = None  # rows of embedding and head; None: vocab_size, in which mask and padding count
    conditioning: str = "none"  # what t is: time | alpha | sigma; zero: always 0 (MDLM, PRISM); none: no adaLN
    cond_dim: int = 128  # channels of the embedding of t
    time_scale: float = 1.0  # factor of t (and of length / max_length) before the sinusoids; image models have 1000
    length_conditioning: bool = False  # tell length / max_length as well
    max_length: int | None = None  # tokens of the longest text
    gap_head: str = "none"  # none | expectation | distribution, see `effml_diffusion.insertion_head`
    pad_id: int | None = None  # the id whose embedding the terminal slot has; with a gap_head
    coordinates: tuple[Any, ...] = ()  # (axes, positions) ints, embedded and added; OmegaConf 2.3 nests no tuple types

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("conditioning", self.conditioning, ("none", "zero", "time", "alpha", "sigma"))
        check_choice("gap_head", self.gap_head, ("none", *INSERTION_HEADS))
        for name, value, expected in (("causal", self.causal, False), ("tied", self.tied, False)):
            if value != expected:
                raise ConfigError(f"{name}: got {value}, expected {expected}")
        check_choice("norm_position", self.norm_position, ("pre",))
        check_choice("position", self.position, ("rope", "none"))
        check_count("cond_dim", self.cond_dim, 1)
        check_range("time_scale", self.time_scale, 0.0)
        if self.length_conditioning and self.conditioning == "none":
            raise ConfigError("length_conditioning: got True, expected another conditioning than 'none' with it")
        if self.max_length is not None:
            check_count("max_length", self.max_length, 1)
        elif self.length_conditioning or self.gap_head != "none":
            raise ConfigError("max_length: got None, expected the longest text for gap_head or length_conditioning")
        if self.gap_head != "none" and (self.pad_id is None or not 0 <= self.pad_id < self.vocab_size):
            raise ConfigError(f"pad_id: got {self.pad_id}, expected an id below vocab_size={self.vocab_size}")
        if not all(isinstance(axis, tuple | list) for axis in self.coordinates):
            raise ConfigError(f"coordinates: got {self.coordinates}, expected one tuple of places for each axis")
        object.__setattr__(self, "coordinates", tuple(map(tuple, self.coordinates)))  # YAML has lists
        lengths = {len(axis) for axis in self.coordinates}
        places = [place for axis in self.coordinates for place in axis]
        if len(lengths) > 1 or 0 in lengths or not all(isinstance(place, int) and place >= 0 for place in places):
            raise ConfigError(f"coordinates: got axes of {sorted(lengths)} places, expected equally many, from 0 up")
        if self.coordinates and self.gap_head != "none":
            raise ConfigError("coordinates: got some beside a gap_head, whose texts have no fixed places")

    @property
    def rows(self) -> int:
        return self.vocab_size if self.vocab_rows is None else self.vocab_rows

    @property
    def conditioned(self) -> bool:
        return self.conditioning != "none"


PRESETS: dict[str, Callable[..., DiffusionTransformerConfig]] = {
    # FlexMDM on bracket sequences (arXiv 2509.01025): mask 0, padding 3.
    "bracket": partial(
        DiffusionTransformerConfig,
        n_layers=4,
        d_model=256,
        n_heads=4,
        vocab_size=4,
        conditioning="time",
        cond_dim=64,
        resid_dropout=0.1,
        max_length=64,
        pad_id=3,
    ),
    # FlexMDM on OpenWebText: the ids of GPT-2 and the mask. With a gap head, padding takes an id of its own.
    "text-small": partial(
        DiffusionTransformerConfig,
        n_layers=12,
        d_model=768,
        n_heads=12,
        vocab_size=50_258,
        conditioning="alpha",
        cond_dim=128,
        resid_dropout=0.05,
        max_length=1024,
    ),
    # Remasking of Sudokus, 89 tokens with ends of lines: mask 0, digits, end of line 10.
    "sudoku": partial(
        DiffusionTransformerConfig,
        n_layers=8,
        d_model=512,
        n_heads=8,
        vocab_size=11,
        conditioning="zero",
        cond_dim=128,
    ),
}
"""The papers' networks by name; `PRESETS["bracket"](gap_head="expectation")` changes fields."""
