"""Problems of the solution-tree task with their solutions: as numbers, as text, as token ids.

    prompt       S s0 P p0  C c0 P p1  ...  C c_{L-1} P p_L   I r1 ... I r_R  :      4 L + 5 + 2 R words
    completion   S s0  A a0 S s1  ...  A a_{L-1} S s_L  <pad>                        4 L + 3 words

Many problems are arrays, -1 beyond a path's length, so that a set of 200,000 is made and encoded without a Python loop
over rows; one problem is an `Example`.

Source: arXiv 2505.22756, synthetic task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_rl.solution_tree.tables import Integers
from effml_rl.solution_tree.tree_tokenizer import TreeTokenizer

__all__ = ["Example", "Examples"]


@dataclass(frozen=True)
class Example:
    """One problem: a path of L actions, what is shown of it, and what is to be found.

    >>> Example((9, 2), (7,), (3, 4), (1,), (5,)).prompt
    'S 9 P 3 C 1 P 4 I 5 :'
    >>> Example((9, 2), (7,), (3, 4), (1,), (5,)).completion
    'S 9 A 7 S 2 <pad>'
    """

    states: tuple[int, ...]  # L + 1; only the first is shown
    actions: tuple[int, ...]  # L; not shown
    problem_states: tuple[int, ...]  # L + 1, shown
    contexts: tuple[int, ...]  # L, shown
    irrelevant: tuple[int, ...] = ()  # shown

    @property
    def prompt(self) -> str:
        """What the model is given."""
        steps = [f"C {c} P {p}" for c, p in zip(self.contexts, self.problem_states[1:], strict=True)]
        noise = [f"I {number}" for number in self.irrelevant]
        return " ".join([f"S {self.states[0]} P {self.problem_states[0]}", *steps, *noise, ":"])

    @property
    def completion(self) -> str:
        """The only right answer, its end included."""
        steps = [f"A {a} S {s}" for a, s in zip(self.actions, self.states[1:], strict=True)]
        return " ".join([f"S {self.states[0]}", *steps, "<pad>"])


@dataclass(frozen=True, eq=False)
class Examples:
    """Problems as arrays; entries beyond a path's length are -1.

    Raises:
        ConfigError: shapes do not fit each other.
    """

    states: Integers  # (problems, longest + 1)
    actions: Integers  # (problems, longest)
    problem_states: Integers  # (problems, longest + 1)
    contexts: Integers  # (problems, longest)
    irrelevant: Integers  # (problems, irrelevant integers)

    def __post_init__(self) -> None:
        shapes = [getattr(self, field.name).shape for field in fields(self)]
        rows, longest = shapes[1] if len(shapes[1]) == 2 else (-1, -1)
        if shapes[:4] != [(rows, longest + 1), (rows, longest)] * 2 or len(shapes[4]) != 2 or shapes[4][0] != rows:
            raise ConfigError(f"examples: got arrays of {shapes}, expected one row per problem, states one longer")

    def __len__(self) -> int:
        return len(self.actions)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Example:
        length = int(self.lengths[i])
        rows = (getattr(self, field.name)[i].tolist() for field in fields(self))
        states, actions, problem_states, contexts, irrelevant = map(tuple, rows)
        steps = slice(length)
        return Example(states[: length + 1], actions[steps], problem_states[: length + 1], contexts[steps], irrelevant)

    @property
    def lengths(self) -> Integers:
        """(problems,): actions per path."""
        return (self.actions >= 0).sum(1)

    def select(self, rows: Integers | slice) -> Examples:
        """Return some of the problems."""
        return Examples(*(getattr(self, field.name)[rows] for field in fields(self)))

    def join(self, other: Examples) -> Examples:
        """Return these problems and then the others, of the same sizes."""
        return Examples(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))

    def prompts(self, tokenizer: TreeTokenizer) -> tuple[Tensor, Tensor]:
        """Return prompts, padded on the left, and where they are no padding: ids int64 and mask bool, (problems, P)."""
        rows, lengths = self._prompt_rows(tokenizer)
        columns = np.arange(rows.shape[1]) - (rows.shape[1] - lengths)[:, None]
        kept = columns >= 0
        ids = np.where(kept, np.take_along_axis(rows, columns.clip(min=0), axis=1), tokenizer.pad_id)
        return torch.from_numpy(ids), torch.from_numpy(kept)

    def completions(self, tokenizer: TreeTokenizer) -> Tensor:
        """Return completions, padded on the right, int64 (problems, 4 longest + 3)."""
        return torch.from_numpy(self._completion_rows(tokenizer))

    def sequences(self, tokenizer: TreeTokenizer) -> Tensor:
        """Return prompts with their completions, padded on the right, int64 (problems, length of the longest)."""
        prompt, lengths = self._prompt_rows(tokenizer)
        completion = self._completion_rows(tokenizer)
        rows = np.pad(prompt, ((0, 0), (0, completion.shape[1])), constant_values=tokenizer.pad_id)
        np.put_along_axis(rows, lengths[:, None] + np.arange(completion.shape[1]), completion, axis=1)
        return torch.from_numpy(rows)

    def _prompt_rows(self, tokenizer: TreeTokenizer) -> tuple[Integers, Integers]:
        """Return prompts padded on the right, and their lengths."""
        number = tokenizer.first_integer
        count, noise = self.irrelevant.shape
        lengths = 4 * self.lengths + 5 + 2 * noise
        longest = self.actions.shape[1]
        rows = np.full((count, 4 * longest + 5 + 2 * noise), tokenizer.pad_id, np.int64)
        rows[:, 0], rows[:, 1] = tokenizer.state, self.states[:, 0] + number
        rows[:, 2], rows[:, 3] = tokenizer.problem, self.problem_states[:, 0] + number
        steps = np.empty((count, longest, 4), np.int64)
        steps[..., 0], steps[..., 1] = tokenizer.context, self.contexts + number
        steps[..., 2], steps[..., 3] = tokenizer.problem, self.problem_states[:, 1:] + number
        steps[self.actions < 0] = tokenizer.pad_id
        rows[:, 4 : 4 + 4 * longest] = steps.reshape(count, 4 * longest)
        tail = np.full((count, 2 * noise + 1), tokenizer.colon, np.int64)
        tail[:, 0:-1:2], tail[:, 1::2] = tokenizer.irrelevant, self.irrelevant + number
        np.put_along_axis(rows, (lengths - tail.shape[1])[:, None] + np.arange(tail.shape[1]), tail, axis=1)
        return rows, lengths

    def _completion_rows(self, tokenizer: TreeTokenizer) -> Integers:
        number, (count, longest) = tokenizer.first_integer, self.actions.shape
        rows = np.full((count, 4 * longest + 3), tokenizer.pad_id, np.int64)
        rows[:, 0], rows[:, 1] = tokenizer.state, self.states[:, 0] + number
        steps = np.empty((count, longest, 4), np.int64)
        steps[..., 0], steps[..., 1] = tokenizer.action, self.actions + number
        steps[..., 2], steps[..., 3] = tokenizer.state, self.states[:, 1:] + number
        steps[self.actions < 0] = tokenizer.pad_id
        rows[:, 2:-1] = steps.reshape(count, 4 * longest)
        return rows
