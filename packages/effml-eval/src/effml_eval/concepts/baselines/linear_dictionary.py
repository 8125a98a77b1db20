"""What the baselines have in common: atoms, an offset, and codes that decode linearly.

x_hat = z D + offset
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.code_entries import Codes, check_matrix, decode
from effml_eval.sae.sparse_codes import SparseCodes

__all__ = ["LinearDictionary", "check_fit", "largest_codes"]


@dataclass(frozen=True)
class LinearDictionary:
    """Atoms (C, d) and what is added to every reconstruction.

    Attributes:
        dictionary: (C, d).
        offset: (d), 0 where the method has none.
    """

    dictionary: Tensor
    offset: Tensor

    def encode(self, x: Tensor) -> Codes:
        """Return the codes (N, C) of new embeddings (N, d)."""
        raise NotImplementedError

    def decode(self, codes: Codes) -> Tensor:
        """Return embeddings (N, d) from codes (N, C)."""
        return decode(codes, self.dictionary) + self.offset

    def _checked(self, x: Any) -> Tensor:
        return check_matrix("x", x, columns=self.dictionary.shape[1]).to(self.dictionary)


def check_fit(x: Any, n_concepts: int, *, at_most: str) -> Tensor:
    """Return data (N, d) in float32 or wider, enough of it for that many concepts.

    Args:
        at_most: `"rows"`, or `"rank"` where there can be no more concepts than dimensions either.

    Raises:
        ConfigError: the data is no finite matrix, or too small.
    """
    x = check_matrix("x", x)
    check_count("n_concepts", n_concepts, 1)
    most = len(x) if at_most == "rows" else min(x.shape)
    if n_concepts > most:
        raise ConfigError(f"n_concepts: got {n_concepts} for data of shape {tuple(x.shape)}, expected at most {most}")
    return x


def largest_codes(codes: Tensor, k: int) -> SparseCodes:
    """Keep the k codes of largest magnitude in every row of dense codes (N, C): what a dense method does at L0 = k.

    Raises:
        ConfigError: k is not a number from 1 to C, or a code is not finite.
    """
    codes = check_matrix("codes", codes)
    check_count("k", k, 1)
    if k > codes.shape[1]:
        raise ConfigError(f"k: got {k} of {codes.shape[1]} concepts, expected at most as many")
    indices = codes.abs().topk(k, dim=1).indices
    return SparseCodes(codes.gather(1, indices), indices, codes.shape[1])
