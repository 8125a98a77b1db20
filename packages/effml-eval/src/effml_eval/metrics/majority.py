"""maj@k: how often the commonest answer among k of a problem's n samples is correct, exactly and without bias.

The expectation is over all C(n, k) subsets, ties broken at random; samples without an answer (None) are drawn but do
not vote. Let classes h have sizes c_h. A class g wins with v votes, shared among 1 + t classes, if the k - v other
samples leave every other class with at most v votes and t of them with exactly v:

    maj@k = sum_{g correct} sum_v sum_t  P(g has v, t tie at v, none above, total k) / (1 + t)

A random k-subset has the class counts of independent Binomial(c_h, k/n) variables given that they add up to k, so the
joint probability is a coefficient of a product of small polynomials in (total, ties): no enumeration of subsets, no
Monte Carlo, and all terms are positive, so nothing cancels. Classes smaller than v can neither tie nor win at v, and
are one class of idle samples there.

Cost: O(n k^2 log k) multiplications per problem at most.
Source: maj@k arXiv 2203.11171; the exact expectation is derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from numpy.typing import NDArray
from scipy import special

from effml_eval.metrics.equivalence import exact_equal, is_correct

__all__ = ["answer_classes", "maj_at_k"]


def maj_at_k(
    answers: Sequence[Any],
    gold: Any,
    k: int,
    *,
    equal: Callable[[Any, Any], bool] = exact_equal,
    first_k: bool = False,
) -> float:
    """Return the probability that a vote among k samples of one problem is right.

    Args:
        answers: one per sample, in the order of sampling; None where there is none.
        gold: the right answer, or a list of right answers.
        k: at most the number of samples.
        equal: called as equal(answer, reference).
        first_k: the first k samples alone vote, in place of every subset.

    Raises:
        ConfigError: k is larger than the number of samples, or there is no gold answer.

    >>> [round(maj_at_k(list("AAABBC"), "A", k), 6) for k in (1, 3, 6)]
    [0.5, 0.6, 1.0]
    """
    check_count("k", k, 1)
    if k > len(answers):
        raise ConfigError(f"k: got {k}, expected at most the number of samples, {len(answers)}")
    votes = answers[:k] if first_k else answers
    classes = answer_classes(votes, equal)
    sizes = [len(members) for members in classes]
    right = [is_correct(votes[members[0]], gold, equal) for members in classes]
    if not classes:
        is_correct(None, gold, equal)  # an absent gold answer is an error whatever was answered
        return 0.0
    if k == len(votes):
        top = [correct for size, correct in zip(sizes, right, strict=True) if size == max(sizes)]
        return sum(top) / len(top)
    return min(1.0, sum(_win(g, sizes, len(votes), k) for g, correct in enumerate(right) if correct))


def answer_classes(answers: Sequence[Any], equal: Callable[[Any, Any], bool] = exact_equal) -> list[list[int]]:
    """Return the positions of equal answers, class by class in order of appearance, None left out.

    An answer joins the first class whose first member it equals: a tolerance need not be transitive.

    >>> answer_classes(["1", None, "2", "1"])
    [[0, 3], [2]]
    """
    classes: list[list[int]] = []
    for position, answer in enumerate(answers):
        if answer is None:
            continue
        for members in classes:
            if equal(answer, answers[members[0]]):
                members.append(position)
                break
        else:
            classes.append([position])
    return classes


def _win(g: int, sizes: Sequence[int], n: int, k: int) -> float:
    """Return the probability that class g wins the vote of a random k-subset of n samples."""
    share = k / n
    total = 0.0
    for v in range(1, min(sizes[g], k) + 1):
        rivals = [size for h, size in enumerate(sizes) if h != g and size >= v]
        idle = n - sizes[g] - sum(rivals)
        ways = _binomial(idle, share, k - v)[None]  # (ties, total of the others)
        for size in rivals:
            rows = min(len(ways), (k - v) // v) + 1  # no more classes than that reach v
            extended = np.zeros((rows, k - v + 1))
            for votes, probability in enumerate(_binomial(size, share, min(v, k - v))):
                tied = int(votes == v)
                kept = min(len(ways), rows - tied)
                extended[tied : tied + kept, votes:] += probability * ways[:kept, : k - v + 1 - votes]
            ways = extended
        own = _binomial(sizes[g], share, v)[v]
        total += own * float((ways[:, k - v] / np.arange(1, len(ways) + 1)).sum())
    return float(total / _binomial(n, share, k)[k])


def _binomial(size: int, share: float, most: int) -> NDArray[np.float64]:
    """Return P(0), ..., P(most) of a binomial distribution."""
    counts = np.arange(most + 1)
    # size trials have no more than size successes; xlogy makes 0 * log(0) zero
    logs = (
        -np.log1p(size)
        - special.betaln(np.maximum(size - counts, 0) + 1.0, counts + 1.0)
        + special.xlogy(counts, share)
        + special.xlog1py(np.maximum(size - counts, 0), -share)
    )
    return np.where(counts <= size, np.exp(logs), 0.0)
