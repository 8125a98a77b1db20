"""Fine-tuning, reinforcement-learning and test problems of one solution-tree world, kept together in one file.

A prompt of the RL problems never occurs in the fine-tuning ones, a test prompt in neither, and neither set repeats one.
The world's tables are part of the file: problems of one world are wrong answers in another.

Source: arXiv 2505.22756, synthetic task: 200,000 / 128 / 512. That test prompts are kept out of the RL ones, and that
what is taken out is replaced, is our own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.errors import CheckpointError, ConfigError

from effml_rl.solution_tree.examples import Examples
from effml_rl.solution_tree.tables import Tables
from effml_rl.solution_tree.task import SolutionTreeTask
from effml_rl.tree_file import load_tree, save_tree

__all__ = ["SolutionTreeDataset"]

_KIND = "solution-tree dataset 1"
_PARTS = ("sft", "rl", "test")
_SETTINGS = tuple(field.name for field in fields(SolutionTreeTask) if field.name != "world")
_EXHAUSTED = 100  # draws per problem wanted; with fewer new prompts than that, there are hardly any left


@dataclass(frozen=True, eq=False)
class SolutionTreeDataset:
    """A world and its three sets of problems.

    >>> tiny = SolutionTreeTask(n_states=6, n_actions=6, n_contexts=6, n_problem=6, len_range=(2, 3), n_irrelevant=0)
    >>> [len(part) for part in SolutionTreeDataset.make(tiny, 100, 32, 96).parts()]
    [100, 32, 96]
    """

    task: SolutionTreeTask
    sft: Examples
    rl: Examples
    test: Examples

    @classmethod
    def make(
        cls, task: SolutionTreeTask, n_sft: int = 200_000, n_rl: int = 128, n_test: int = 512
    ) -> SolutionTreeDataset:
        """Draw the three sets.

        Raises:
            ConfigError: the world has not so many different prompts.
        """
        for name, count in (("n_sft", n_sft), ("n_rl", n_rl), ("n_test", n_test)):
            check_count(name, count, 0)
        sft = task.sample(n_sft, "sft")
        taken = set(_keys(task, sft))
        return cls(task, sft, _new(task, n_rl, "rl", taken), _new(task, n_test, "test", taken))

    def parts(self) -> tuple[Examples, Examples, Examples]:
        """Return fine-tuning, RL and test problems."""
        return self.sft, self.rl, self.test

    def save(self, path: str | Path) -> None:
        """Write world and problems to one safetensors file.

        Raises:
            CheckpointError: the file cannot be written.
        """
        smallest = np.min_scalar_type(-self.task.tables.n_integers)  # 11 MB in place of 83 MB
        tree = {
            "settings": {name: getattr(self.task, name) for name in _SETTINGS},
            "tables": _tensors(self.task.tables),
            **{name: _tensors(part, smallest) for name, part in zip(_PARTS, self.parts(), strict=True)},
        }
        save_tree(path, _KIND, tree)

    @classmethod
    def load(cls, path: str | Path) -> SolutionTreeDataset:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or something else.
        """
        tree = load_tree(path, _KIND)
        try:
            tables = Tables(**{name: tensor.numpy() for name, tensor in tree["tables"].items()})
            task = SolutionTreeTask(**tree["settings"], world=tables)
            parts = ({k: v.numpy().astype(np.int64) for k, v in tree[name].items()} for name in _PARTS)
            return cls(task, *(Examples(**part) for part in parts))
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{path}: got contents that do not fit together ({error})") from None


def _new(task: SolutionTreeTask, n: int, split: str, taken: set[bytes]) -> Examples:
    """Return the first n problems of a split whose prompts are not taken, and take them."""
    found, start = task.sample(0, split), 0
    while len(found) < n:
        if start > _EXHAUSTED * n:
            raise ConfigError(f"n_{split}: got {n}, expected no more than the {len(found)} new prompts of {start}")
        drawn = task.sample(n, split, start=start)
        start += n
        rows: list[int] = []
        for row, key in enumerate(_keys(task, drawn)):
            if key not in taken and len(found) + len(rows) < n:
                taken.add(key)
                rows.append(row)
        found = found.join(drawn.select(np.array(rows, np.int64)))
    return found


def _keys(task: SolutionTreeTask, examples: Examples) -> list[bytes]:
    """Return the prompts as short byte strings, equal where the prompts are."""
    ids, _ = examples.prompts(task.tokenizer)
    return [row.tobytes() for row in ids.to(torch.int32).numpy()]


def _tensors(record: Tables | Examples, dtype: np.dtype[Any] | None = None) -> dict[str, torch.Tensor]:
    arrays = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: torch.from_numpy(array.astype(dtype or array.dtype)) for name, array in arrays.items()}
