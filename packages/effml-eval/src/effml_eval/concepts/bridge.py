"""Bridges between image and text concepts: which pairs carry the similarity of matching images and captions.

    G_ij = (1/N) sum_n z_ni^image z_nj^text      B = G * (D D^T), elementwise
    sum_ij B_ij = mean_n <y_n^image, y_n^text>

with codes z of N pairs, atoms d_i (rows of D) and reconstructions y = z D. The sum is an identity: B splits the mean
similarity of reconstructed pairs into its concept pairs exactly. `pair_similarity` adds up the right-hand side on its
own, as a check of it. Scaling atoms against their codes leaves B unchanged.

State: G in the dictionary's type, float32 or wider: dense (4 C^2 bytes) up to `DENSE_UP_TO` concepts; above, only the
pairs that ever fired together, as sorted keys i C + j with their sums (12 bytes each). Work per pair of rows with k
active concepts each: k^2 additions and 2 k d multiplications, never more than about `BLOCK` products at once; or 2 C^2
for dense codes.
Source: arXiv 2504.11695, section 5, formula as others summarise it; the options are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor

from effml_eval.concepts.code_entries import (
    BLOCK,
    FLOATS,
    Codes,
    Entries,
    add_up,
    check_codes,
    check_matrix,
    check_pairs,
    decode,
    entries,
    row_chunks,
    unit_rows,
)

__all__ = ["DENSE_UP_TO", "BridgeAccumulator", "BridgeEdges", "bridge_edges", "bridge_matrix"]

DENSE_UP_TO = 16_384
GRAMS = ("raw", "cosine")


class BridgeEdges(NamedTuple):
    """Concept pairs by falling score.

    Fields:
        image: (edges) int64, image concept.
        text: (edges) int64, text concept.
        score: (edges), all above 0.
    """

    image: Tensor
    text: Tensor
    score: Tensor


class BridgeAccumulator:
    """Accumulate co-activations of matching images and captions over batches.

    Args:
        dictionary: atoms (C, d), not normalised.
        layout: `"dense"`, `"sparse"`, or `"auto"` by the number of concepts.

    Attributes:
        rows: pairs seen.
        dictionary: in float32 or wider.

    >>> meter = BridgeAccumulator(torch.eye(2))
    >>> meter.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]]))
    >>> meter.matrix().tolist(), meter.pair_similarity
    ([[6.0, 0.0], [0.0, 0.0]], 6.0)
    """

    def __init__(self, dictionary: Tensor, *, layout: str = "auto") -> None:
        check_choice("layout", layout, ("auto", "dense", "sparse"))
        self.dictionary = check_matrix("dictionary", dictionary)
        n = len(self.dictionary)
        check_count("dictionary: number of atoms", n, 1)
        self.layout = ("dense" if n <= DENSE_UP_TO else "sparse") if layout == "auto" else layout
        self.rows = 0
        self._weight = self._pairs = 0.0
        like = self.dictionary
        self._sums = like.new_zeros(2, n, dtype=torch.float64)  # of codes, by modality
        self._squares = like.new_zeros(2, n, dtype=torch.float64)
        self._dense = like.new_zeros((n, n) if self.layout == "dense" else (0, 0))
        self._stored = _Stored(like)

    @property
    def pair_similarity(self) -> float:
        """Mean <y_n^image, y_n^text> of reconstructed pairs; NaN without pairs."""
        return self._pairs / self._weight if self._weight else math.nan

    def update(self, image_codes: Codes, text_codes: Codes, weights: Tensor | None = None) -> None:
        """Add pairs: row n of both codes (N, C) belongs together.

        Args:
            weights: (N) >= 0 of each pair, such as 1 / number of captions of its image; None: all 1.

        Raises:
            ConfigError: the sets differ in rows or concepts, or something is not finite.
        """
        n = len(self.dictionary)
        rows = check_pairs(image_codes, text_codes)
        check_codes("image_codes", image_codes, n)
        if weights is None:
            weights = self.dictionary.new_ones(rows, dtype=torch.float64)
        elif weights.shape != (rows,) or not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ConfigError(f"weights: got shape {tuple(weights.shape)}, expected ({rows},) of finite numbers >= 0")
        weights = weights.to(self.dictionary.device, torch.float64)
        size = max(
            1, BLOCK // max(n if isinstance(z, Tensor) else self.dictionary.shape[1] for z in (image_codes, text_codes))
        )
        parts = zip(row_chunks(image_codes, size), row_chunks(text_codes, size), weights.split(size), strict=True)
        for image, text, weight in parts:
            self._add(image, text, weight)
        self.rows += rows

    def _add(self, image: Codes, text: Codes, weight: Tensor) -> None:
        products = (decode(image, self.dictionary) * decode(text, self.dictionary)).sum(1, dtype=torch.float64)
        self._pairs += float(products @ weight)
        self._weight += float(weight.sum())
        listed = []
        for side, codes in enumerate((image, text)):
            found = entries(codes)
            values = found.values.double() * weight[found.rows]
            self._sums[side].index_add_(0, found.concepts, values)
            self._squares[side].index_add_(0, found.concepts, values * found.values)
            listed.append(found)
        if self.layout == "dense" and isinstance(image, Tensor) and isinstance(text, Tensor):
            dtype = self._dense.dtype
            weighted = widen(image.detach()).to(dtype) * weight[:, None].to(dtype)
            self._dense.addmm_(weighted.T, widen(text.detach()).to(dtype))
            return
        for keys, values in _products(listed[0], listed[1], weight, len(self.dictionary)):
            if self.layout == "dense":
                self._dense.view(-1).index_add_(0, keys, values.to(self._dense.dtype))
            else:
                self._stored.add(keys, values.to(self._dense.dtype))

    def coactivation(self, *, center: bool = False, normalize: bool = False) -> Tensor:
        """Return G (C, C), dense or as a coalesced sparse COO tensor, rows being image concepts.

        Args:
            center: subtract the product of means: a cross-covariance. Sparse, only where a pair fired together.
            normalize: divide by the deviations of both (with `center`, a cross-correlation) or by their root mean
                squares; concepts that have none get 0.

        Raises:
            ConfigError: no pair was seen.
        """
        if not self._weight:
            raise ConfigError("bridge: got no pairs (or none of weight above 0), expected some before reading it")
        means, squares = self._sums / self._weight, self._squares / self._weight
        spread = (squares - means.square() if center else squares).clamp(min=0)
        # What is left of a constant's variance after rounding is no variance.
        inverse = torch.where(spread > 1e-12 * squares, spread.rsqrt(), 0.0) if normalize else None
        if self.layout == "dense":
            gamma = self._dense / self._weight
            dtype = gamma.dtype
            if center:
                gamma.addmm_(means[0][:, None].to(dtype), means[1][None].to(dtype), alpha=-1.0)
            if inverse is not None:
                gamma.mul_(inverse[0][:, None].to(dtype)).mul_(inverse[1].to(dtype))
            return gamma
        i, j, values = self._stored.read(len(self.dictionary))
        values = values.double() / self._weight
        if center:
            values = values - means[0][i] * means[1][j]
        if inverse is not None:
            values = values * inverse[0][i] * inverse[1][j]
        return self._coo(i, j, values)

    def matrix(self, *, gram: str = "raw", center: bool = False, normalize: bool = False) -> Tensor:
        """Return B (C, C), dense or as a coalesced sparse COO tensor, rows being image concepts.

        Args:
            gram: products of atoms as they are, or `"cosine"`: of atoms of norm 1, without rescaling their codes (the
                sum of B is then no longer the pair similarity).
            center: see `coactivation`.
            normalize: see `coactivation`.

        Raises:
            ConfigError: no pair was seen, or a cosine of an atom of norm 0 is asked for.
        """
        check_choice("gram", gram, GRAMS)
        atoms = self.dictionary if gram == "raw" else unit_rows("dictionary", self.dictionary)
        gamma = self.coactivation(center=center, normalize=normalize)
        if self.layout == "dense":
            size = max(1, BLOCK // len(atoms))
            for part, rows in zip(gamma.split(size), atoms.split(size), strict=True):
                part.mul_(rows @ atoms.T)
            return gamma
        i, j = gamma.indices()
        size = max(1, BLOCK // atoms.shape[1])
        products = [(atoms[a] * atoms[b]).sum(1) for a, b in zip(i.split(size), j.split(size), strict=True)]
        return self._coo(i, j, gamma.values() * torch.cat([self.dictionary.new_zeros(0), *products]))

    def edges(self, top: int, *, gram: str = "raw", center: bool = False, normalize: bool = False) -> BridgeEdges:
        """Return the `top` strongest bridges; see `matrix` and `bridge_edges`."""
        return bridge_edges(self.matrix(gram=gram, center=center, normalize=normalize), top)

    def _coo(self, i: Tensor, j: Tensor, values: Tensor) -> Tensor:
        n = len(self.dictionary)
        values = values.to(self._dense.dtype)
        return torch.sparse_coo_tensor(torch.stack([i, j]), values, (n, n), is_coalesced=True, check_invariants=False)


def bridge_matrix(
    image_codes: Codes,
    text_codes: Codes,
    dictionary: Tensor,
    *,
    gram: str = "raw",
    center: bool = False,
    normalize: bool = False,
    layout: str = "auto",
) -> Tensor:
    """Return B (C, C) of all pairs at once; see `BridgeAccumulator`.

    Raises:
        ConfigError: the sets differ in rows or concepts, are empty, or something is not finite.
    """
    meter = BridgeAccumulator(dictionary, layout=layout)
    meter.update(image_codes, text_codes)
    return meter.matrix(gram=gram, center=center, normalize=normalize)


def bridge_edges(matrix: Tensor, top: int) -> BridgeEdges:
    """Return the `top` largest positive entries of a bridge matrix, dense or sparse; of equals, by row and column.

    Raises:
        ConfigError: `top` is below 1, or this is no matrix.

    >>> bridge_edges(torch.tensor([[0.0, 2.0], [3.0, -1.0]]), 5)
    BridgeEdges(image=tensor([1, 0]), text=tensor([0, 1]), score=tensor([3., 2.]))
    """
    check_count("top", top, 1)
    if not isinstance(matrix, Tensor) or matrix.dtype not in FLOATS or matrix.ndim != 2:
        got = f"{matrix.dtype} of shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ConfigError(f"matrix: got {got}, expected floating numbers (image concepts, text concepts)")
    scores = matrix.coalesce().values() if matrix.is_sparse else matrix.flatten()
    least = scores.topk(min(top, len(scores))).values.amin().item() if len(scores) else 0.0
    places = ((scores >= least) & (scores > 0)).nonzero()[:, 0]
    places = places[scores[places].argsort(descending=True, stable=True)[:top]]
    if matrix.is_sparse:
        image, text = matrix.coalesce().indices()[:, places]
    else:
        image, text = places // matrix.shape[1], places % matrix.shape[1]
    return BridgeEdges(image, text, scores[places])


class _Stored:
    """Sums by key, sorted. Additions wait until they are as many as what they are merged into."""

    def __init__(self, like: Tensor) -> None:
        self._keys = torch.zeros(0, dtype=torch.int64, device=like.device)
        self._values = like.new_zeros(0)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._count = 0

    def add(self, keys: Tensor, values: Tensor) -> None:
        keys, values = add_up(keys, values)
        self._waiting.append((keys, values))
        self._count += len(keys)
        if self._count > max(BLOCK, len(self._keys)):
            self._merge()

    def read(self, n_concepts: int) -> tuple[Tensor, Tensor, Tensor]:
        self._merge()
        return self._keys // n_concepts, self._keys % n_concepts, self._values

    def _merge(self) -> None:
        keys, values = zip((self._keys, self._values), *self._waiting, strict=True)
        self._keys, self._values = add_up(torch.cat(keys), torch.cat(values))
        self._waiting, self._count = [], 0


def _products(image: Entries, text: Entries, weight: Tensor, n_concepts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield keys i C + j and weighted products of all active pairs of every row, at most about `BLOCK` at a time."""
    counts = text.rows.bincount(minlength=len(weight))
    starts = counts.cumsum(0) - counts
    repeats = counts[image.rows]  # how many text concepts each active image concept meets
    pieces = 1 + int(repeats.sum()) // BLOCK
    for part in torch.arange(len(image.rows), device=repeats.device).tensor_split(pieces):
        left = part.repeat_interleave(repeats[part])
        ends = repeats[part].cumsum(0)
        within = torch.arange(len(left), device=left.device) - (ends - repeats[part]).repeat_interleave(repeats[part])
        right = starts[image.rows[left]] + within
        keys = image.concepts[left] * n_concepts + text.concepts[right]
        products = image.values[left].double() * text.values[right] * weight[image.rows[left]]
        yield keys, products
