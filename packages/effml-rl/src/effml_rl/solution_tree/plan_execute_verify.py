"""Plan, execute, verify: what exactly a model can do of a solution-tree problem.

    plan       share of steps i < min(L, L^) with a^_i = a_i                  success: all, and L^ = L
    execute    share of those steps with s^_{i+1} = T[s^_i, a^_i]             success: all
    verify     area under the ROC curve of a score of answers, right against wrong ones

(hats: the model's). Execution is judged by the model's own previous state and action, so that a wrong plan may be
carried out faultlessly. Shares are 0 where there is no whole step; they count where the format fails, too. An answer is
right if and only if it is well-formed, starts in s_0, and plan and execution succeed.

Source: the skills of arXiv 2505.22756; their exact definition on the synthetic task is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike

from effml_rl.solution_tree.attempt import Attempt
from effml_rl.solution_tree.examples import Example
from effml_rl.solution_tree.tables import Tables

__all__ = ["Skills", "corruptions", "skills", "verify_score"]


class Skills(NamedTuple):
    """How one answer fares."""

    plan: float
    execute: float
    well_formed: bool
    starts_right: bool
    plan_success: bool
    execute_success: bool

    @property
    def correct(self) -> bool:
        """Whether the answer is right: the same as the verifier's verdict."""
        return self.well_formed and self.starts_right and self.plan_success and self.execute_success


def skills(tables: Tables, example: Example, text: str) -> Skills:
    """Judge a completion, given with special tokens.

    >>> tables = Tables.draw(n_states=4, n_actions=3, n_contexts=2, n_problem=3, alpha=1.0, beta=1.0, seed=0)
    >>> after = int(tables.transitions[1, 2])
    >>> example = Example((1, after), (2,), (0, int(tables.problem_moves[0, 2])), (1,))
    >>> skills(tables, example, example.completion).correct
    True
    """
    attempt = Attempt.read(text, tables.n_integers)
    steps = min(len(example.actions), len(attempt.actions))
    planned = [attempt.actions[i] == example.actions[i] for i in range(steps)]
    executed = [_follows(tables, attempt.states[i], attempt.actions[i], attempt.states[i + 1]) for i in range(steps)]
    return Skills(
        plan=sum(planned) / max(steps, 1),
        execute=sum(executed) / max(steps, 1),
        well_formed=attempt.well_formed,
        starts_right=attempt.states[:1] == example.states[:1],
        plan_success=all(planned) and len(attempt.actions) == len(example.actions),
        execute_success=all(executed) and steps > 0,
    )


def _follows(tables: Tables, state: int, action: int, after: int) -> bool:
    known = state < tables.n_states and action < tables.n_actions  # an integer of the vocabulary may be neither
    return known and int(tables.transitions[state, action]) == after


def corruptions(tables: Tables, example: Example, n: int, rng: np.random.Generator) -> list[str]:
    """Return gold completions with one wrong state or action each: candidates that a verifier should refuse.

    Raises:
        ConfigError: there is only one state and one action, so that nothing can be wrong.
    """
    spans = {"S": tables.n_states, "A": tables.n_actions}
    words = example.completion.split()
    places = [i for i in range(0, len(words) - 1, 2) if spans[words[i]] > 1]
    if not places:
        raise ConfigError("tables: got one state and one action, expected something that can be wrong")
    wrong = []
    for place in rng.choice(places, n).tolist():
        span, right = spans[words[place]], int(words[place + 1])
        other = (right + 1 + int(rng.integers(span - 1))) % span
        wrong.append(" ".join([*words[: place + 1], str(other), *words[place + 2 :]]))
    return wrong


def verify_score(scores: ArrayLike, correct: ArrayLike | Sequence[bool]) -> float:
    """Return the probability that a right answer scores above a wrong one, a tie counting half.

    Args:
        scores: (answers,), such as the mean log-probability of an answer's tokens under the model.
        correct: (answers,) bool.

    Returns:
        NaN where all answers are right or all wrong.

    Raises:
        ConfigError: the two differ in shape, or a score is NaN.

    >>> verify_score([0.1, 0.4, 0.4, 0.9], [False, False, True, True])
    0.875
    """
    values, right = np.asarray(scores, np.float64), np.asarray(correct, bool)
    if values.ndim != 1 or values.shape != right.shape or np.isnan(values).any():
        raise ConfigError(f"scores: got {values.shape} for {right.shape} answers, expected one number per answer")
    ordered = np.sort(values[~right])
    below, up_to = (np.searchsorted(ordered, values[right], side=side) for side in ("left", "right"))
    pairs = int(right.sum()) * len(ordered)
    return float((below + up_to).sum() / (2 * pairs)) if pairs else float("nan")
