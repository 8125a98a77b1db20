"""A map of a dictionary: atoms as points in the plane, so that atoms of large cosine lie close together.

A t-SNE over the graph of nearest atoms. From P, symmetric, uniform over the edges of that graph and of sum 1,

    dL/dy_i = 4 sum_j (e p_ij q_ij - q_ij^2 / Z) (y_i - y_j)    q_ij = 1 / (1 + |y_i - y_j|^2)    Z = sum_{i != j} q_ij

is followed from the two principal components; e exaggerates attraction at first. Repulsion needs all pairs, but it is a
slope: with the potential V(y) = sum_j 1 / (1 + |y - y_j|^2) it is -grad V / 2, and Z = sum_i V(y_i) - C. V is a
convolution, taken on a grid by FFT: within some percent of the sum. Nothing is drawn at random: the same atoms on one
machine give the same map.

Cost: 2 C^2 d FLOPs for the graph, then per step O(k C) along it and O(G^2 log G) on at most G = 1300 padded cells a
side: some 5 to 10 s for 10,000 atoms on one core. Memory: the grid, and 8 million cosines at a time.
Source: t-SNE by van der Maaten and Hinton (JMLR 2008); the grid after arXiv 1712.09005, linear and with differences of
V in place of its polynomials; uniform affinities after arXiv 2007.08902.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from effml_shared.checks import check_count
from numpy.typing import NDArray
from torch import Tensor

from effml_eval.concepts.code_entries import BLOCK, check_matrix

__all__ = ["NearestAtoms", "atom_map", "nearest_atoms", "repulsion"]

Points = NDArray[np.float64]

EXAGGERATION = 12.0
START = 0.01  # deviation
CELL = 0.35  # of the grid, in units of the kernel's width
CELLS = (48, 640)  # fewest and most along a side


class NearestAtoms(NamedTuple):
    """The nearest other atoms of every atom, nearest first.

    Fields:
        indices: (C, k) int64.
        cosines: (C, k).
    """

    indices: Tensor
    cosines: Tensor


def nearest_atoms(dictionary: Tensor, count: int) -> NearestAtoms:
    """Return the `count` atoms of largest cosine to each atom (C, d), at most C - 1; of atoms of norm 0 it is 0.

    >>> nearest_atoms(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), 1).indices.tolist()
    [[2], [2], [0]]
    """
    check_count("count", count, 1)
    atoms = torch.nn.functional.normalize(check_matrix("dictionary", dictionary), dim=1)
    found = []
    for start in range(0, len(atoms), size := max(1, 2 * BLOCK // max(1, len(atoms)))):
        cosines = atoms[start : start + size] @ atoms.T
        rows = torch.arange(len(cosines), device=atoms.device)
        cosines[rows, rows + start] = -torch.inf
        found.append(cosines.topk(min(count, len(atoms) - 1), dim=1))
    return NearestAtoms(torch.cat([part.indices for part in found]), torch.cat([part.values for part in found]))


def atom_map(dictionary: Tensor, nearest: NearestAtoms | None = None, *, steps: int = 400) -> Tensor:
    """Return places (C, 2) float32 of atoms (C, d), centred, the principal axis along x, within [-1, 1].

    Args:
        nearest: the graph, if it is known; None: 15 nearest atoms each.
        steps: of descent, a third of them exaggerated.

    Raises:
        ConfigError: this is no matrix of finite numbers, or has no rows.

    >>> atom_map(torch.eye(4)).shape
    torch.Size([4, 2])
    """
    check_count("steps", steps, 1)
    atoms = check_matrix("dictionary", dictionary)
    check_count("dictionary: number of atoms", len(atoms), 1)
    if len(atoms) == 1:
        return torch.zeros(1, 2)
    indices = (nearest or nearest_atoms(atoms, 15)).indices.cpu().numpy()
    indices = indices[:, : max(2, len(atoms) // 4)]  # if all were neighbours, the graph would say nothing
    places = _descend(_principal_components(atoms), indices, steps)
    places = places - (places.max(0) + places.min(0)) / 2
    return torch.from_numpy(places / np.abs(places).max()).float()


def _principal_components(atoms: Tensor) -> Points:
    """Return starting points (C, 2) of deviation `START`, told apart by a spiral a hundred times finer."""
    unit = torch.nn.functional.normalize(atoms.double(), dim=1).cpu()
    centred = unit - unit.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :2]
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    points = (centred @ directions).numpy()
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    turn = np.arange(len(points)) * np.pi * (3 - np.sqrt(5))
    spiral = np.sqrt(np.arange(len(points)) / len(points))[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    return START * (points / max(float(points[:, 0].std()), 1e-12) + 0.01 * spiral)


def _descend(y: Points, nearest: NDArray[np.int64], steps: int) -> Points:
    from scipy.sparse import csr_array

    count, k = nearest.shape
    graph = csr_array((np.ones(nearest.size), nearest.ravel(), np.arange(count + 1) * k), shape=(count, count))
    graph = (graph + graph.T).tocoo()
    i, j, p = graph.row, graph.col, graph.data / graph.data.sum()
    velocity, gains = np.zeros_like(y), np.ones_like(y)
    for step in range(steps):
        early = 3 * step < steps
        exaggeration = EXAGGERATION if early else 1.0
        rate = count / 4 / exaggeration  # slopes scale with 1 / C; at twice this rate attraction alone would overshoot
        apart = y[i] - y[j]
        pull = exaggeration * p / (1 + (apart**2).sum(1))
        attraction = np.stack([np.bincount(i, pull * apart[:, axis], count) for axis in (0, 1)], 1)
        push, normaliser = repulsion(y)
        slope = 4 * (attraction - push / normaliser)
        gains = np.where(velocity * slope < 0, gains + 0.2, gains * 0.8).clip(0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * slope
        y = y + velocity
        y = y - y.mean(0)
        if early:  # exaggerated, a graph without clusters would shrink to a point
            y = y * max(1.0, START / float(y.std()))
    centred = y @ np.linalg.svd(y, full_matrices=False)[2].T
    return centred * np.where(np.abs(centred.min(0)) > centred.max(0), -1.0, 1.0)


def repulsion(y: Points) -> tuple[Points, float]:
    """Return sum_j q_ij^2 (y_i - y_j), (C, 2), and Z for points (C, 2), both on a grid: right to some percent."""
    from scipy import fft

    low = y.min(0)
    span = float((y.max(0) - low).max())
    cells = int(np.clip(np.ceil(span / CELL), *CELLS))
    side = span / cells or CELL
    width = cells + 6  # a margin of points around, so that slopes can be taken
    at = (y - low) / side + 2
    corner = at.astype(np.int64)
    part = at - corner
    corners = [
        ((corner[:, 0] + dx) * width + corner[:, 1] + dy, np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1]))
        for dx in (0, 1)
        for dy in (0, 1)
    ]
    density = np.sum([np.bincount(place, weight, width * width) for place, weight in corners], 0).reshape(width, width)
    size = fft.next_fast_len(2 * width, real=True)
    offsets = np.minimum(np.arange(size), size - np.arange(size)) * side
    kernel = fft.rfft2(1 / (1 + offsets[:, None] ** 2 + offsets**2))
    # Spreading points over corners, and reading back from them, blurs twice; here that is divided out.
    blur = np.sinc(fft.fftfreq(size))[:, None] * np.sinc(fft.rfftfreq(size))
    kernel /= blur**4
    potential = fft.irfft2(fft.rfft2(density, (size, size)) * kernel, (size, size))[:width, :width]
    fields = [potential, *(-0.5 * _slope(potential, side, axis) for axis in (0, 1))]
    at_points = [sum(field.ravel()[place] * weight for place, weight in corners) for field in fields]
    own = _own_potential(part, fft.irfft2(kernel, (size, size)))
    least = len(y) * (len(y) - 1) / (1 + 2 * span**2)  # no pair is further apart than the diagonal
    return np.stack(at_points[1:], 1), max(float((at_points[0] - own).sum()), least)


def _slope(field: Points, side: float, axis: int) -> Points:
    """Return the derivative of a field by differences of the fourth order; wrong only in the margin."""
    near, far = (np.roll(field, -step, axis) - np.roll(field, step, axis) for step in (1, 2))
    return (8 * near - far) / (12 * side)


def _own_potential(part: Points, kernel: Points) -> Points:
    """Return what a point, spread over the four corners of its cell, adds to the potential at itself."""
    same = part**2 + (1 - part) ** 2  # the share of pairs of corners that agree in x, and in y
    once = same.sum(1) - 2 * same.prod(1)
    return same.prod(1) * kernel[0, 0] + once * kernel[0, 1] + (1 - same).prod(1) * kernel[1, 1]
