"""Which samples of which problems were right, at every temperature: what the whole analysis is computed from.

One byte per sample, in one safetensors file: 13 temperatures, 512 problems and 128 samples are 0.85 MB.

Source: arXiv 2505.22756, the evaluation of coverage and precision over temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from effml_shared.errors import CheckpointError, ConfigError
from numpy.typing import NDArray

from effml_rl.tree_file import load_tree, save_tree

__all__ = ["KIND", "UNSCORED", "CorrectMatrix", "Counts", "check_paired"]

KIND = "correct matrix 1"
UNSCORED = -1

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CorrectMatrix:
    """Outcomes of n samples per problem and temperature.

    Raises:
        ConfigError: shapes do not fit, an outcome is unknown, or temperatures are not increasing and above 0.

    >>> outcomes = np.array([[[1, 0], [1, 1]], [[0, 0], [1, -1]]], np.int8)
    >>> matrix = CorrectMatrix(np.array([0.5, 1.0]), outcomes)
    >>> matrix.correct.tolist(), matrix.scored.tolist()
    ([[1, 2], [0, 1]], [[2, 2], [2, 1]])
    """

    temperatures: NDArray[np.float64]  # (temperatures,)
    outcomes: NDArray[np.int8]  # (temperatures, problems, n): 1 right, 0 wrong, -1 could not be scored
    greedy: NDArray[np.int8] | None = None  # (problems,): the one sample that there is at temperature 0
    problems: str = ""  # which problems these are; "" for unknown

    def __post_init__(self) -> None:
        temperatures, outcomes = np.asarray(self.temperatures, np.float64), np.asarray(self.outcomes)
        if outcomes.dtype == bool:
            outcomes = outcomes.astype(np.int8)
        if outcomes.ndim != 3 or temperatures.ndim != 1 or len(temperatures) != len(outcomes) or not outcomes.size:
            shapes = f"outcomes of {outcomes.shape} at temperatures of {temperatures.shape}"
            raise ConfigError(
                f"outcomes: got {shapes}, expected (temperatures, problems, n) at (temperatures,), none empty"
            )
        check_temperatures(temperatures.tolist())
        if self.greedy is not None and np.shape(self.greedy) != outcomes.shape[1:2]:
            raise ConfigError(
                f"greedy: got {np.shape(self.greedy)}, expected one outcome for {outcomes.shape[1]} problems"
            )
        parts = {"outcomes": outcomes} | ({} if self.greedy is None else {"greedy": np.asarray(self.greedy)})
        for name, part in parts.items():
            if part.dtype != np.int8 or part.min() < UNSCORED or part.max() > 1:
                raise ConfigError(f"{name}: got {part.dtype} in [{part.min()}, {part.max()}], expected int8 -1, 0 or 1")
        object.__setattr__(self, "temperatures", temperatures)
        object.__setattr__(self, "outcomes", outcomes)
        object.__setattr__(self, "greedy", parts.get("greedy"))

    @property
    def n_problems(self) -> int:
        return self.outcomes.shape[1]

    @property
    def n(self) -> int:
        """Samples per problem and temperature."""
        return self.outcomes.shape[2]

    @property
    def correct(self) -> Counts:
        """(temperatures, problems): right samples."""
        return (self.outcomes == 1).sum(2)

    @property
    def scored(self) -> Counts:
        """(temperatures, problems): samples with a verdict."""
        return (self.outcomes != UNSCORED).sum(2)

    def index(self, temperature: float) -> int:
        """Return the row of a temperature.

        Raises:
            ConfigError: it is not on the grid.
        """
        (found,) = np.nonzero(np.isclose(self.temperatures, temperature, rtol=1e-9, atol=0))
        if not len(found):
            raise ConfigError(f"temperature: got {temperature}, expected one of {self.temperatures.tolist()}")
        return int(found[0])

    def select(self, problems: NDArray[Any] | Sequence[int]) -> CorrectMatrix:
        """Return the matrix of some problems, given by numbers or (problems,) bool, such as the solvable ones.

        Raises:
            ConfigError: there is no such problem, or none is selected.
        """
        rows = np.asarray(problems)
        rows = np.flatnonzero(rows) if rows.dtype == bool and rows.shape == (self.n_problems,) else rows
        if rows.ndim != 1 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise ConfigError(
                f"problems: got {rows.dtype} of {rows.shape}, expected numbers or ({self.n_problems},) bool"
            )
        if rows.min() < 0 or rows.max() >= self.n_problems:
            raise ConfigError(f"problems: got one not in [0, {self.n_problems}), expected existing ones")
        greedy = None if self.greedy is None else self.greedy[rows]
        label = self.problems and f"{self.problems} {rows.tolist()}"
        return CorrectMatrix(self.temperatures, self.outcomes[:, rows], greedy, label)

    def halves(self) -> tuple[CorrectMatrix, CorrectMatrix]:
        """Split the samples of every problem: even ones and odd ones, n // 2 of each.

        Raises:
            ConfigError: there is only one sample per problem.
        """
        if self.n < 2:
            raise ConfigError(f"n: got {self.n}, expected at least 2 samples to split")
        even = self.n // 2 * 2
        first, second = (self.outcomes[:, :, start:even:2] for start in (0, 1))
        return (
            CorrectMatrix(self.temperatures, first, self.greedy, self.problems),
            CorrectMatrix(self.temperatures, second, self.greedy, self.problems),
        )

    def save(self, path: str | Path) -> None:
        """Write the matrix to a file.

        Raises:
            CheckpointError: the file cannot be written.
        """
        save_tree(path, KIND, self.tree())

    def tree(self) -> dict[str, Any]:
        """Return what a file of the matrix holds."""
        greedy = None if self.greedy is None else torch.from_numpy(np.ascontiguousarray(self.greedy))
        return {
            "temperatures": self.temperatures.tolist(),
            "outcomes": torch.from_numpy(np.ascontiguousarray(self.outcomes)),
            "greedy": greedy,
            "problems": self.problems,
        }

    @classmethod
    def load(cls, path: str | Path) -> CorrectMatrix:
        """Read what `save` or a finished `TemperatureSweep` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, something else, or of a sweep that is not finished.
        """
        return cls.from_tree(path, load_tree(path, KIND))

    @classmethod
    def from_tree(cls, path: str | Path, tree: Any) -> CorrectMatrix:
        """Rebuild what `tree` returned; `path` is named in errors."""
        try:
            greedy = None if tree["greedy"] is None else tree["greedy"].numpy()
            return cls(np.array(tree["temperatures"], np.float64), tree["outcomes"].numpy(), greedy, tree["problems"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: got no whole matrix ({error}), expected one that is finished") from None


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Raise a ConfigError unless temperatures are finite, above 0 and increasing."""
    pairs = zip([0.0, *temperatures], temperatures, strict=False)
    if not temperatures or not all(low < high < float("inf") for low, high in pairs):
        raise ConfigError(f"temperatures: got {list(temperatures)}, expected increasing finite numbers above 0")


def check_paired(before: CorrectMatrix, after: CorrectMatrix) -> None:
    """Raise a ConfigError unless two matrices are of the same problems with as many samples."""
    if before.n_problems != after.n_problems or (
        before.problems and after.problems and before.problems != after.problems
    ):
        sizes = f"{before.n_problems} and {after.n_problems} problems"
        raise ConfigError(f"after: got other problems than before ({sizes}), expected the same ones, in one order")
    if before.n != after.n:
        raise ConfigError(
            f"after: got {after.n} samples per problem, expected {before.n} as before: coverage grows with n"
        )
