"""What a verifier says about one completion, and what a verifier is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from effml_shared.errors import ConfigError

__all__ = ["Status", "Verdict", "Verifier", "check_lengths", "check_verdicts"]

Status = Literal[
    "correct",
    "wrong",
    "unparseable",  # nothing that could be an answer
    "timeout",
    "oom",
    "output_limit",
    "runtime_error",
    "syntax_error",
    "sandbox_error",  # the verifier failed, not the completion
    "scored",  # a reward function's number, which is no verdict of right or wrong
    "unscored",  # a reward function had nothing to say
]
_UNSCORABLE = ("sandbox_error", "unscored")


@dataclass(frozen=True)
class Verdict:
    """One completion's reward, and how it came about.

    Attributes:
        reward: None exactly for `sandbox_error` and `unscored`: such a rollout is left out of its group's statistics
            instead of counting as a wrong answer.
        answer: what was compared with the target, None where there was nothing.
        detail: one line for the log.
        isolation: what kept the completion's program in, empty where none ran.

    Raises:
        ConfigError: unknown status, a reward that is not finite, or None for a completion that was judged.
    """

    reward: float | None
    status: Status
    answer: Any = None
    detail: str = ""
    isolation: str = ""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ConfigError(f"status: got {self.status!r}, expected one of {', '.join(get_args(Status))}")
        if (self.reward is None) != (self.status in _UNSCORABLE):
            raise ConfigError(f"reward: got {self.reward} with status {self.status}, expected None iff unscorable")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ConfigError(
                f"reward: got {self.reward}, expected a finite number, or None for an unscored completion"
            )

    @classmethod
    def of(cls, correct: bool, answer: Any = None, detail: str = "", isolation: str = "") -> Verdict:
        """Return reward 1 for a correct answer and 0 for a wrong one.

        >>> Verdict.of(True, 18)
        Verdict(reward=1.0, status='correct', answer=18, detail='', isolation='')
        """
        return cls(float(correct), "correct" if correct else "wrong", answer, detail, isolation)


class Verifier(Protocol):
    """Judges completions; calls from any thread give the same verdicts."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> list[Verdict]:
        """Return one verdict per completion.

        Args:
            prompts, completions, targets: of one length; what a target is, the verifier says.
        """
        ...


def check_lengths(prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]) -> None:
    """Raise a `ConfigError` unless there are as many of each."""
    if not len(prompts) == len(completions) == len(targets):
        got = f"{len(prompts)} prompts, {len(completions)} completions and {len(targets)} targets"
        raise ConfigError(f"verifier: got {got}, expected as many of each")


def check_verdicts(returned: Any, count: int) -> None:
    """Raise a `ConfigError` unless a verifier returned so many verdicts."""
    if not isinstance(returned, Sequence) or not all(isinstance(verdict, Verdict) for verdict in returned):
        raise ConfigError(f"verifier: got {returned!r:.60}, expected {count} verdicts, one per completion")
    if len(returned) != count:
        raise ConfigError(f"verifier: got {len(returned)} verdicts, expected {count}, one per completion")
