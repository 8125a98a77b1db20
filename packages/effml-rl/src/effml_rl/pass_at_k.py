"""How often k samples contain, or agree on, a correct answer.

From n samples of which c are correct, pass@k = 1 - C(n-c, k) / C(n, k) is the unbiased estimate of the probability that
at least one of k fresh samples is correct (arXiv 2107.03374, section 2.1). maj@k takes a vote among the answers (arXiv
2203.11171).

Cost: two binomial coefficients per distinct (n, c); a vote takes at most k calls of the equality per class of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.sample_statistics import hits_at_k
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["coverage", "majority_at_k", "pass_at_k"]


def pass_at_k(n: int | Tensor, correct: int | Sequence[int] | Tensor, k: int) -> Tensor:
    """Return the estimate for each problem, float64, of the shape of correct; average it over problems.

    Args:
        n: samples, of all problems or per problem (scored ones, where a verifier failed on some).
        correct: how many of them are correct.
        k: at most the smallest n.

    Raises:
        ConfigError: k > n, not 0 <= correct <= n, or something is no integer.

    >>> pass_at_k(10, [0, 3, 10], k=5).tolist()
    [0.0, 0.9166666666666666, 1.0]
    """
    counts = torch.as_tensor(correct)
    estimate = hits_at_k(_plain(torch.as_tensor(n)), _plain(counts), k)
    return torch.from_numpy(estimate).to(counts.device)


def _plain(counts: Tensor) -> NDArray[Any]:
    """Return an array, of float64 if the counts are wrongly floats: some of these types are unknown to numpy."""
    counts = counts.detach().cpu()
    return (counts.double() if counts.is_floating_point() else counts).numpy()


def coverage(correct: Sequence[int] | Tensor, more_than: int = 0) -> float:
    """Return the share of problems with more than `more_than` correct samples; a margin discounts lucky hits.

    >>> coverage([0, 1, 3, 128]), coverage([0, 1, 3, 128], more_than=2)
    (0.75, 0.5)
    """
    check_count("more_than", more_than, 0)
    counts = torch.as_tensor(correct)
    if not counts.numel():
        raise ConfigError("correct: got no problems, expected at least one")
    return float((counts > more_than).double().mean())


def majority_at_k(
    answers: Sequence[Any],
    gold: Any,
    k: int | None = None,
    *,
    equal: Callable[[Any, Any], bool] | None = None,
    subsets: int | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Return 1 if the commonest of k answers to a problem is the gold one, else 0; or the average of that.

    An answer joins the first class whose first member it equals (a tolerance is not transitive); ties go to the class
    that appeared first. Without any answer the vote is wrong.

    Args:
        answers: one per sample, in the order of sampling; None where none could be parsed.
        gold: the right answer.
        k: the first k samples vote. None: all.
        equal: the verifier's equality of two answers (default `==`), called as equal(answer, reference).
        subsets: average over this many random choices of k samples in place of the first k.
        generator: of those choices.
    """
    k = len(answers) if k is None else k
    check_count("k", k, 1)
    if k > len(answers):
        raise ConfigError(f"k: got {k}, expected at most the number of samples, {len(answers)}")
    if gold is None:
        raise ConfigError("gold: got None, expected the right answer")
    same = equal if equal is not None else lambda answer, reference: bool(answer == reference)
    if subsets is None:
        return float(_vote(answers[:k], gold, same))
    check_count("subsets", subsets, 1)
    wins = 0
    for _ in range(subsets):
        chosen = torch.randperm(len(answers), generator=generator)[:k].sort().values
        wins += _vote([answers[i] for i in chosen.tolist()], gold, same)
    return wins / subsets


def _vote(answers: Sequence[Any], gold: Any, equal: Callable[[Any, Any], bool]) -> bool:
    classes: list[list[Any]] = []
    for answer in answers:
        if answer is None:
            continue
        for members in classes:
            if equal(answer, members[0]):
                members.append(answer)
                break
        else:
            classes.append([answer])
    return bool(classes) and equal(max(classes, key=len)[0], gold)
