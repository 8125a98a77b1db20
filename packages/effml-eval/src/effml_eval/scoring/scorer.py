"""The one protocol through which everything here asks a language model: score, rolling and generate.

A scorer may be anything that answers in the order it was asked: `LMScorer` around a network, a table of known
probabilities, a remote service. Requests are plain values, so that they can be hashed, stored and asked again; answers
hold all that a metric needs later, and what went wrong with this one request (a cut context, a merge of tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError

__all__ = [
    "FINISH_REASONS",
    "Generation",
    "GenerationRequest",
    "RollingScore",
    "SamplingParams",
    "Score",
    "ScoreRequest",
    "Scorer",
]

FINISH_REASONS = ("eos", "stop", "length")  # the end of the text, a stop string, the limit of new tokens


class ScoreRequest(NamedTuple):
    """Ask how likely a continuation is after a context; a plain pair of texts means the same."""

    context: str  # may be empty: then the continuation opens the text
    continuation: str


class Score(NamedTuple):
    """How likely a continuation is."""

    logprob: float  # nats, summed over its tokens
    greedy: bool  # every token is the likeliest one, ties going to the lowest id
    n_tokens: int  # of the continuation
    n_truncated: int = 0  # tokens of the context that did not fit into the model
    boundary_merge: bool = False  # the context's tokens change when the continuation follows it


class RollingScore(NamedTuple):
    """How likely a whole document is, and its sizes, by which sums over documents are divided."""

    logprob: float  # nats, summed over its tokens
    n_tokens: int
    n_bytes: int  # UTF-8
    n_words: int  # pieces between white space


@dataclass(frozen=True, kw_only=True, order=True)
class SamplingParams:
    """How to continue a prompt, and until when; the filters are those of `effml_shared.generation.filter_logits`."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # the text ends before the earliest of them
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, 1)
        check_count("top_k", self.top_k, 0)
        check_range("temperature", self.temperature, 0.0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}, expected more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p: got {self.min_p}, expected 0 to 1")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop: got {self.stop!r}, expected a sequence of strings, none of them empty")
        # One form for what means the same: the earliest stop string ends the text, whatever their order.
        object.__setattr__(self, "stop", tuple(sorted(set(self.stop))))
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, float(getattr(self, name)))


class GenerationRequest(NamedTuple):
    """Ask for one continuation of a prompt."""

    prompt: str  # may be empty
    sampling: SamplingParams = SamplingParams()
    sample: int = 0  # tells several samples of one prompt apart: each has its own random numbers
    seed: int = 0  # base seed of the evaluation


class Generation(NamedTuple):
    """What a model wrote."""

    text: str  # without the stop string and what follows it, and without the end-of-text token
    finish_reason: str  # one of FINISH_REASONS
    n_tokens: int  # drawn from the model until the text was certain, an end-of-text token included
    n_truncated: int = 0  # tokens of the prompt that did not fit into the model


class Scorer(Protocol):
    """Answer requests, each list in its own order."""

    def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        """Return how likely each continuation is after its context."""
        ...

    def rolling(self, documents: Sequence[str]) -> list[RollingScore]:
        """Return how likely each document is as a whole, every one of its tokens being predicted exactly once."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Return what the model writes after each prompt."""
        ...
