"""The solution-tree task: name the actions that lead along given problem states, and the states they lead through.

    prompt: s_0, p_0, then c_i, p_{i+1} per step, then noise       answer: s_0, then a_i, s_{i+1} = T[s_i, a_i] per step

The problem states determine every action, p_{i+1} = M[p_i, a_i]: that is the plan. The states follow from T: that is
its execution. In fine-tuning data ("sft") actions are also likely given the state and the context, which tempts a model
to learn shortcuts; in "rl" and "test" both are uniform and the shortcuts are worth nothing.

Problem i of a split follows from the seed, the split and i alone: more problems begin with the same ones, and any
range can be drawn by itself. Cost: one uniform number per entry, no Python loop over problems.

Source: arXiv 2505.22756, synthetic task; numbering problems is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed
from numpy.typing import NDArray

from effml_rl.solution_tree.examples import Examples
from effml_rl.solution_tree.path_verifier import PathVerifier
from effml_rl.solution_tree.tables import Integers, Probabilities, Tables
from effml_rl.solution_tree.tree_tokenizer import TreeTokenizer

__all__ = ["SPLITS", "SolutionTreeTask"]

SPLITS = ("sft", "rl", "test")


@dataclass(frozen=True)
class SolutionTreeTask:
    """Problems of one world.

    Raises:
        ConfigError: a size, range or concentration is impossible, or `world` has other sizes.

    >>> task = SolutionTreeTask(n_states=6, n_actions=6, n_contexts=6, n_problem=6, len_range=(2, 3), n_irrelevant=0)
    >>> example = task.sample(1, "test")[0]
    >>> example.prompt
    'S 5 P 0 C 3 P 3 C 4 P 5 C 3 P 4 :'
    >>> task.verifier([example.prompt], [example.completion], [example.completion])[0].reward
    1.0
    """

    n_states: int = 20
    n_actions: int = 20
    n_contexts: int = 20
    n_problem: int = 20  # problem states
    len_range: tuple[int, int] = (5, 10)  # fewest and most actions of a path, all equally likely
    n_irrelevant: int = 10  # noise integers per prompt
    alpha: float = 0.3  # concentration of the actions per state in fine-tuning data
    beta: float = 0.3  # concentration of the contexts per action in fine-tuning data
    seed: int = 0  # of tables and problems
    world: Tables | None = field(default=None, repr=False, compare=False)  # tables to use; None: drawn from the seed

    def __post_init__(self) -> None:
        check_count("n_irrelevant", self.n_irrelevant, 0)
        span = self.len_range
        if not isinstance(span, Sequence) or len(span) != 2 or not all(type(end) is int for end in span):
            raise ConfigError(f"len_range: got {span!r}, expected two integers (fewest, most)")
        if not 1 <= span[0] <= span[1]:
            raise ConfigError(f"len_range: got {span!r}, expected 1 <= fewest <= most")
        object.__setattr__(self, "len_range", tuple(span))
        sizes = {name: getattr(self, name) for name in ("n_states", "n_actions", "n_contexts", "n_problem")}
        if found := {name: getattr(self.tables, name) for name in sizes if getattr(self.tables, name) != sizes[name]}:
            raise ConfigError(f"world: got {found}, expected the sizes of the task, {sizes}")

    @cached_property
    def tables(self) -> Tables:
        """What actions do, and the skewed distributions."""
        if self.world is not None:
            return self.world
        return Tables.draw(
            n_states=self.n_states,
            n_actions=self.n_actions,
            n_contexts=self.n_contexts,
            n_problem=self.n_problem,
            alpha=self.alpha,
            beta=self.beta,
            seed=self.seed,
        )

    @cached_property
    def tokenizer(self) -> TreeTokenizer:
        """The vocabulary: nine symbols and as many integers as the largest size."""
        return TreeTokenizer(self.tables.n_integers)

    @cached_property
    def verifier(self) -> PathVerifier:
        """Rewards 1 for exactly the right completion, which is the target; else 0."""
        return PathVerifier(self.tables.n_integers)

    @property
    def prompt_length(self) -> int:
        """Words of the longest prompt."""
        return 4 * self.len_range[1] + 5 + 2 * self.n_irrelevant

    @property
    def completion_length(self) -> int:
        """Words of the longest completion, its end included."""
        return 4 * self.len_range[1] + 3

    def sample(self, n: int, split: str = "test", *, start: int = 0, seed: int | None = None) -> Examples:
        """Return problems start, ..., start + n - 1 of a split.

        Args:
            split: `"sft"` with skewed actions and contexts; `"rl"` or `"test"` with uniform ones.
            seed: other problems of the same world; None: the task's own.

        Raises:
            ConfigError: the split is unknown or a number negative.
        """
        check_choice("split", split, SPLITS)
        check_count("n", n, 0)
        check_count("start", start, 0)
        longest = self.len_range[1]
        width = 3 + 2 * longest + self.n_irrelevant
        key = derive_seed(self.seed if seed is None else seed, "solution tree", split)
        uniform = np.random.Generator(np.random.PCG64(key).advance(start * width)).random((n, width))
        first, rest = uniform[:, :3], uniform[:, 3:]
        lengths = self.len_range[0] + _below(first[:, 0], longest - self.len_range[0] + 1)
        return self._walk(
            lengths,
            _below(first[:, 1], self.n_states),
            _below(first[:, 2], self.n_problem),
            rest[:, :longest],
            rest[:, longest : 2 * longest],
            _below(rest[:, 2 * longest :], self.tables.n_integers),
            skewed=split == "sft",
        )

    def _walk(
        self,
        lengths: Integers,
        state: Integers,
        problem: Integers,
        action_draws: Probabilities,
        context_draws: Probabilities,
        irrelevant: Integers,
        *,
        skewed: bool,
    ) -> Examples:
        tables = self.tables
        prior, likelihood = tables.action_prior.cumsum(1), tables.context_given_action.cumsum(1)
        states, problems = [state], [problem]
        actions: list[Integers] = []
        contexts: list[Integers] = []
        for i in range(action_draws.shape[1]):
            if skewed:
                action = _pick(prior[state], action_draws[:, i])
                context = _pick(likelihood[action], context_draws[:, i])
            else:
                action = _below(action_draws[:, i], self.n_actions)
                context = _below(context_draws[:, i], self.n_contexts)
            state, problem = tables.transitions[state, action], tables.problem_moves[problem, action]
            for column, value in ((actions, action), (contexts, context), (states, state), (problems, problem)):
                column.append(value)
        stacked = [np.stack(columns, axis=1) for columns in (states, actions, problems, contexts)]
        for array in stacked:
            first = lengths + array.shape[1] - len(actions)  # of the entries beyond the path
            array[np.arange(array.shape[1]) >= first[:, None]] = -1
        return Examples(stacked[0], stacked[1], stacked[2], stacked[3], irrelevant)


def _below(uniform: NDArray[np.float64], count: int) -> Integers:
    """Turn uniform numbers in [0, 1) to integers below `count`."""
    return np.minimum((uniform * count).astype(np.int64), count - 1)


def _pick(cumulative: Probabilities, uniform: NDArray[np.float64]) -> Integers:
    """Draw from one distribution per row, (rows, choices) cumulated, with one uniform number each."""
    return np.minimum((uniform[:, None] >= cumulative).sum(1), cumulative.shape[1] - 1)
