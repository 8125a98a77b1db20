"""Sample every problem at every temperature and have the answers verified; a stopped sweep goes on where it stood.

Problems are taken in groups, and a group is asked for at all temperatures at once, so that each prompt need be read
only once, as `effml_rl.sampler.Sampler.completions` does. After every group the file is replaced as a whole. If what is
generated depends on prompt, temperature and sample number alone, a continued sweep equals an uninterrupted one.

Cost: temperatures x problems x n completions, 852k at the synthetic grid's 13 x 512 x 128.

Source: arXiv 2505.22756; the grids are those of its official evaluation.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.errors import CheckpointError, ConfigError
from numpy.typing import NDArray

from effml_rl.tree_file import load_tree, save_tree
from effml_rl.verifiers.verdict import Verdict, Verifier, check_verdicts
from effml_rl.wall.correct_matrix import KIND, UNSCORED, CorrectMatrix, check_temperatures

__all__ = ["LANGUAGE_TEMPERATURES", "SYNTHETIC_TEMPERATURES", "Generate", "TemperatureSweep"]

LANGUAGE_TEMPERATURES = (0.001, 0.003, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
"""With 64 samples per problem."""
SYNTHETIC_TEMPERATURES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""With 128 samples per problem, and greedy decoding besides."""

_UNSAMPLED = -2
_log = logging.getLogger(__name__)


class Generate(Protocol):
    """Return for each temperature, of each prompt, n completions: those at temperature 0 are greedy."""

    def __call__(
        self, prompts: Sequence[str], *, temperatures: Sequence[float], n: int
    ) -> Sequence[Sequence[Sequence[str]]]: ...


class TemperatureSweep:
    """Fill a `CorrectMatrix`.

    Args:
        verifier: called with prompts, completions and targets, one each per sample. A verdict without a reward leaves
            its sample unscored; a reward function's number is refused, since it is neither right nor wrong.
        temperatures: increasing. A leading 0 stands for `greedy`, with a warning if n > 1: its samples are all one.
        n: samples per problem and temperature.
        greedy: decode each problem once at temperature 0, too.
        group: problems per call of `generate`.

    Raises:
        ConfigError: temperatures are not increasing, a number is below 1, or `generate` cannot be called.
    """

    def __init__(
        self,
        generate: Generate,
        verifier: Verifier,
        temperatures: Sequence[float] = SYNTHETIC_TEMPERATURES,
        n: int = 128,
        *,
        greedy: bool = False,
        group: int = 64,
    ) -> None:
        if not callable(generate):
            got = type(generate).__name__
            raise ConfigError(f"generate: got a {got}, expected a function such as `Sampler(...).completions`")
        check_count("n", n, 1)
        check_count("group", group, 1)
        grid = [float(temperature) for temperature in temperatures]
        if grid[:1] == [0.0]:
            if n > 1:
                _log.warning("temperature 0 gives one and the same sample %d times: it is drawn once, as `greedy`", n)
            grid, greedy = grid[1:], True
        check_temperatures(grid)
        self.generate, self.verifier, self.temperatures = generate, verifier, grid
        self.n, self.greedy, self.group = n, greedy, group

    def run(self, prompts: Sequence[str], targets: Sequence[Any], path: str | Path | None = None) -> CorrectMatrix:
        """Sample and verify all problems.

        Args:
            targets: one per prompt, of the kind that the verifier takes.
            path: where the matrix is kept; a sweep that stopped there is continued, a finished one returned.

        Raises:
            ConfigError: there are no problems, or not as many targets, completions or verdicts as needed.
            CheckpointError: the file cannot be read or written, or is of another sweep.
        """
        if not len(prompts) or len(prompts) != len(targets):
            raise ConfigError(
                f"targets: got {len(targets)} for {len(prompts)} prompts, expected one per prompt, and some"
            )
        label = hashlib.sha256(json.dumps([list(prompts), list(targets)], default=repr).encode()).hexdigest()[:16]
        tree = self._blank(len(prompts), label)
        if path is not None and Path(path).exists():
            tree = self._stored(path, tree)
        outcomes: NDArray[np.int8] = tree["outcomes"].numpy()
        for start in range(0, len(prompts), self.group):
            rows = slice(start, start + self.group)
            if (outcomes[:, rows] != _UNSAMPLED).all():
                continue
            outcomes[:, rows] = self._sample(prompts[rows], targets[rows], self.temperatures, self.n)
            if self.greedy:
                tree["greedy"].numpy()[rows] = self._sample(prompts[rows], targets[rows], [0.0], 1)[0, :, 0]
            if path is not None:
                save_tree(path, KIND, tree)
        return CorrectMatrix.from_tree(path or "sweep", tree)

    def _blank(self, problems: int, label: str) -> dict[str, Any]:
        shape = (len(self.temperatures), problems, self.n)
        greedy = torch.full((problems,), _UNSAMPLED, dtype=torch.int8) if self.greedy else None
        outcomes = torch.full(shape, _UNSAMPLED, dtype=torch.int8)
        return {"temperatures": self.temperatures, "outcomes": outcomes, "greedy": greedy, "problems": label}

    def _stored(self, path: str | Path, blank: dict[str, Any]) -> dict[str, Any]:
        """Return what is on file if it is of this very sweep."""
        tree = load_tree(path, KIND)
        try:
            fits = (
                all(tree[name] == blank[name] for name in ("temperatures", "problems"))
                and tree["outcomes"].shape == blank["outcomes"].shape
                and (tree["greedy"] is None) == (blank["greedy"] is None)
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: got a matrix without {error}, expected one that a sweep wrote") from None
        if not fits:
            raise CheckpointError(
                f"{path}: got a sweep of other problems, temperatures or n, expected this one or no file"
            )
        return tree

    def _sample(
        self, prompts: Sequence[str], targets: Sequence[Any], temperatures: Sequence[float], n: int
    ) -> NDArray[np.int8]:
        """Return outcomes (temperatures, prompts, n)."""
        completions = self.generate(prompts, temperatures=temperatures, n=n)
        if [[len(samples) for samples in each] for each in completions] != [[n] * len(prompts)] * len(temperatures):
            raise ConfigError(
                f"generate: got other counts of completions, expected {n} for each of {len(prompts)} prompts "
                f"at each of {len(temperatures)} temperatures"
            )
        outcomes = [self._verify(prompts, targets, each) for each in completions]
        return np.array(outcomes, np.int8).reshape(len(temperatures), len(prompts), n)

    def _verify(
        self, prompts: Sequence[str], targets: Sequence[Any], completions: Sequence[Sequence[str]]
    ) -> list[int]:
        """Return the outcomes of all completions at one temperature."""
        n = len(completions[0])
        verdicts = self.verifier(
            [prompt for prompt in prompts for _ in range(n)],
            [completion for samples in completions for completion in samples],
            [target for target in targets for _ in range(n)],
        )
        check_verdicts(verdicts, n * len(prompts))
        return [_outcome(verdict) for verdict in verdicts]


def _outcome(verdict: Verdict) -> int:
    if verdict.status == "scored":
        raise ConfigError(f"verifier: got the number {verdict.reward}, expected verdicts of right or wrong")
    return UNSCORED if verdict.reward is None else int(verdict.status == "correct")
