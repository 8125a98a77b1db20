"""Mixtures of document sources by repeat counts, in an order that follows from a seed.

A source of N documents repeated r = w + f times, w whole and 0 <= f < 1, is in the mixture w times whole; the fraction
f adds documents drawn without replacement, or whole shards, which are N consecutive documents cut into equal parts.
Repeats without a fraction are exact either way.

Source: arXiv 2504.07912, whose pretraining mixtures repeat or subsample the shards of a corpus.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed

__all__ = ["MixtureBuilder"]


@dataclass(frozen=True)
class MixtureBuilder:
    """Repeat sources and shuffle their union.

    Raises:
        ConfigError: there is no source, a repeat count is not a number > 0, or a setting is out of range.

    >>> sources = {"prose": ["a", "b", "c", "d"], "code": ["A", "B"]}
    >>> MixtureBuilder({"prose": 0.5, "code": 2}).documents(sources)
    ['B', 'A', 'a', 'b', 'B', 'A']
    """

    repeats: Mapping[str, float]  # per source
    unit: str = "examples"  # what a fraction of a source is counted in, or "shards"
    shards: int = 10  # that every source is cut into
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.repeats:
            raise ConfigError("repeats: got no source, expected at least one")
        for name, repeat in self.repeats.items():
            if not (isinstance(repeat, int | float) and 0 < repeat < math.inf):
                raise ConfigError(f"repeats.{name}: got {repeat!r}, expected a number > 0")
        check_choice("unit", self.unit, ("examples", "shards"))
        check_count("shards", self.shards, 1)

    def documents(self, sources: Mapping[str, Sequence[Any]]) -> list[Any]:
        """Return the mixture of sources of any records; what has no repeat count is not in it.

        Raises:
            ConfigError: a source is missing or empty.
        """
        union = [sources[name][i] for name, i in self.places({name: len(sources[name]) for name in sources})]
        return [union[i] for i in self._order(len(union), "order")]

    def places(self, sizes: Mapping[str, int]) -> list[tuple[str, int]]:
        """Return source and index of every document of the mixture, source by source, given how many each has."""
        for name in self.repeats:
            if not sizes.get(name):
                raise ConfigError(f"repeats.{name}: got a source that is missing or empty among {list(sizes)}")
        return [(name, i) for name, repeat in self.repeats.items() for i in self._repeated(name, repeat, sizes[name])]

    def _repeated(self, name: str, repeat: float, size: int) -> list[int]:
        whole, fraction = divmod(repeat, 1)
        if fraction and self.unit == "shards" and self.shards > size:
            raise ConfigError(
                f"shards: got {self.shards} of the {size} documents of {name}, expected no more than those"
            )
        return [*range(size)] * int(whole) + (self._part(name, fraction, size) if fraction else [])

    def _part(self, name: str, fraction: float, size: int) -> list[int]:
        count = self.shards if self.unit == "shards" else size
        drawn = self._order(count, "part", name)[: max(1, round(fraction * count))]
        return [i for unit in drawn for i in range(size * unit // count, size * (unit + 1) // count)]

    def _order(self, count: int, *purpose: str) -> list[int]:
        bits = np.random.PCG64(derive_seed(self.seed, "mixture", *purpose)).random_raw(count)
        return np.argsort(bits, kind="stable").tolist()
