"""Where a context ends and its continuation begins, in tokens.

White space at the end of the context moves to the continuation, since tokenizers join a space to the word behind it.
Then the continuation is what the tokens of both texts together have beyond those of the context. Where the two texts
share a token, the context's own tokens are no prefix of those of both: the case is marked, and its conventional answer
(of EleutherAI's lm-evaluation-harness) keeps the context's own tokens and the rest of both together, which may skip or
repeat characters; `strict` encodes the continuation by itself instead.
"""

from __future__ import annotations

from typing import NamedTuple

from effml_shared.errors import ConfigError

from effml_eval.scoring.tokenizer_adapter import TokenizerAdapter

__all__ = ["Row", "SplitPair", "fit", "split_pair"]


class SplitPair(NamedTuple):
    """The tokens of a request; neither part is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    boundary_merge: bool


class Row(NamedTuple):
    """Consecutive tokens, of which a model reads all but the last and predicts the last n_scored."""

    tokens: tuple[int, ...]
    n_scored: int  # 1 to len(tokens) - 1

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.tokens[:-1]

    @property
    def context(self) -> tuple[int, ...]:
        return self.tokens[: -self.n_scored]

    @property
    def continuation(self) -> tuple[int, ...]:
        return self.tokens[-self.n_scored :]

    @property
    def read(self) -> tuple[int, ...]:
        """The continuation but for its last token, which is only predicted."""
        return self.tokens[-self.n_scored : -1]


def split_pair(
    tokenizer: TokenizerAdapter, context: str, continuation: str, *, prefix_id: int, strict: bool = False
) -> SplitPair:
    """Encode a context and its continuation.

    A context without tokens is replaced by the prefix token, unless the continuation itself begins with that one.

    Raises:
        ConfigError: the continuation is empty, or the tokenizer makes nothing of it.
    """
    if not continuation:
        raise ConfigError(f"continuation: got an empty text after {context[-40:]!r}, expected at least one character")
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before = tokenizer.encode(kept, opened=True) if kept else ()
    if before:
        whole = tokenizer.encode(kept + continuation, opened=True)
        merge = whole[: len(before)] != before
        after = whole[len(before) :]
        if not after or (merge and strict):
            after = tokenizer.encode(continuation)
    else:
        merge, before, after = False, (prefix_id,), tokenizer.encode(continuation)
        if len(after) > 1 and after[0] == prefix_id:
            after = after[1:]
    if not after:
        raise ConfigError(f"continuation: got {continuation!r}, which has no tokens, expected at least one")
    return SplitPair(before, after, merge)


def fit(pair: SplitPair, max_length: int) -> tuple[Row, int]:
    """Cut the context from the left until the model can read all but the last token; return how many were cut too.

    >>> fit(SplitPair((1, 2, 3), (4, 5), False), max_length=3)
    (Row(tokens=(2, 3, 4, 5), n_scored=2), 1)

    Raises:
        ConfigError: the continuation alone does not fit.
    """
    if len(pair.continuation) > max_length:
        raise ConfigError(f"continuation: got {len(pair.continuation)} tokens, expected at most {max_length=}")
    tokens = pair.context + pair.continuation
    cut = max(0, len(tokens) - (max_length + 1))
    return Row(tokens[cut:], len(pair.continuation)), cut
