"""Verify answers to solution-tree problems: all words must be right, the end included.

An answer that does not end is wrong even where all its words are right, or a policy would never learn to stop; words
after the first `<pad>` are padding of a batch and not looked at.

Source: arXiv 2505.22756, synthetic task.
"""

from __future__ import annotations

from collections.abc import Sequence

from effml_shared.checks import check_count

from effml_rl.solution_tree.attempt import Attempt, cut
from effml_rl.verifiers.verdict import Verdict, check_lengths

__all__ = ["PathVerifier"]


class PathVerifier:
    """Compare completions with gold ones, as a `Verifier`.

    Statuses: `correct`, `wrong`, or `unparseable` where the format fails, which is wrong too.

    Args:
        n_integers: numbers below this are words of the task.

    >>> prompt, gold = "S 9 P 3 C 1 P 4 :", "S 9 A 7 S 2 <pad>"
    >>> verdicts = PathVerifier(20)([prompt] * 2, [gold, "S 9 A 7 S"], [gold] * 2)
    >>> [(verdict.reward, verdict.status) for verdict in verdicts]
    [(1.0, 'correct'), (0.0, 'unparseable')]
    """

    def __init__(self, n_integers: int) -> None:
        check_count("n_integers", n_integers, 1)
        self.n_integers = n_integers

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[str]) -> list[Verdict]:
        """Return one verdict per completion; its answer is the completion without padding.

        Args:
            completions: with special tokens, as `TreeTokenizer.decode` gives them.
            targets: the gold completions, `Example.completion`.

        Raises:
            ConfigError: the three differ in length.
        """
        check_lengths(prompts, completions, targets)
        return [self._verdict(cut(text), target) for text, target in zip(completions, targets, strict=True)]

    def _verdict(self, words: list[str], target: str) -> Verdict:
        answer = " ".join(words)
        if answer == target:
            return Verdict.of(True, answer)
        if Attempt.read(answer, self.n_integers).well_formed:
            return Verdict.of(False, answer)
        return Verdict(0.0, "unparseable", detail=f"got {answer[:80]!r}, expected S s A a S s ... <pad>")
