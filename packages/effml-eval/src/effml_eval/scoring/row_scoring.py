"""Score one batch of token rows: in one call of the model, or in two where several rows share a context.

Logits exist only at the places where a token is scored. Where contexts are shared, each is read once, left-padded, and
its last place scores the first token of all its continuations; those of several tokens then go on from copies of its
keys and values. Of the tokens of m choices behind one context, that saves up to (m - 1) / m. Cost: 2 FLOPs per
parameter and token fed; `Work` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from effml_shared.tensors import left_pad
from torch import Tensor

from effml_eval.scoring.causal_model import CausalModel, right_pad
from effml_eval.scoring.token_boundaries import Row
from effml_eval.scoring.token_scores import score_tokens

__all__ = ["RowScore", "RowScorer", "Work"]

_WORTH = 0.75  # of the tokens at most must be left to read, for the second call of the model to pay
RowScore = tuple[float, bool]  # nats, and whether every token is the likeliest


@dataclass
class Work:
    """What a scorer has done since it was made."""

    forwards: int = 0  # calls of the model
    tokens: int = 0  # fed in them, padding left out
    tokens_saved: int = 0  # not fed, since another row of the batch has them
    halvings: int = 0  # batches that did not fit into memory


class _Targets:
    """The tokens that one call of the model scores, in tensors (n) each: whose they are, where they are predicted."""

    def __init__(self, parts: Sequence[tuple[int, int, int, Sequence[int]]]) -> None:
        """Take (owner, row of the ids, place of the first token's prediction, consecutive tokens)."""
        heads = torch.tensor([(owner, row, first, len(tokens)) for owner, row, first, tokens in parts])
        self.owners, self.rows, places = heads[:, :3].repeat_interleave(heads[:, 3], dim=0).unbind(1)
        before = heads[:, 3].cumsum(0) - heads[:, 3]
        self.places = places + torch.arange(len(places)) - before.repeat_interleave(heads[:, 3])
        self.tokens = torch.tensor(list(chain.from_iterable(tokens for *_, tokens in parts)))


class _Sums:
    """The scores of a batch, added up as they come."""

    def __init__(self, n_rows: int) -> None:
        self.nats = torch.zeros(n_rows, dtype=torch.float64)
        self.greedy = torch.ones(n_rows, dtype=torch.bool)

    def add(self, logits: Tensor, targets: _Targets) -> None:
        """Add the scores by logits (n, vocab) where the targets are predicted."""
        log_probs, greedy = score_tokens(logits, targets.tokens)
        self.nats.index_add_(0, targets.owners, log_probs)
        self.greedy[targets.owners[~greedy]] = False


class RowScorer:
    """Score rows by a model that is in evaluation mode."""

    def __init__(self, model: CausalModel, *, share_prefix: bool) -> None:
        self.model, self.share_prefix = model, share_prefix and model.remembers
        self.work = Work()

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> list[RowScore]:
        """Return the score of each row of a batch.

        Raises:
            ConfigError: a token is none of the model's.
            NonFiniteError: the model returns NaN or plus infinity where a token is scored.
        """
        for row in rows:
            self.model.check_ids(row.tokens)
        sums = _Sums(len(rows))
        inputs = list(dict.fromkeys((row.context, row.read) for row in rows))
        contexts = list(dict.fromkeys(context for context, _ in inputs))
        whole = sum(len(context) + len(read) for context, read in inputs)
        fed = sum(map(len, contexts)) + sum(len(read) for _, read in inputs)
        if self.share_prefix and fed <= _WORTH * whole:
            self._shared(rows, contexts, sums)
        else:
            fed = whole
            self._whole(rows, inputs, sums)
        self.work.tokens += fed
        self.work.tokens_saved += sum(len(row.inputs) for row in rows) - fed
        return list(zip(sums.nats.tolist(), sums.greedy.tolist(), strict=True))

    def _whole(self, rows: Sequence[Row], inputs: Sequence[tuple[tuple[int, ...], ...]], sums: _Sums) -> None:
        """Read every distinct input from its beginning."""
        where = {key: i for i, key in enumerate(inputs)}
        targets = _Targets(
            [(i, where[row.context, row.read], len(row.context) - 1, row.continuation) for i, row in enumerate(rows)]
        )
        ids = right_pad([context + read for context, read in inputs]).to(self.model.device)
        sums.add(self.model.logits_at(ids, targets.rows.to(ids.device), targets.places.to(ids.device)), targets)
        self.work.forwards += 1

    def _shared(self, rows: Sequence[Row], contexts: Sequence[tuple[int, ...]], sums: _Sums) -> None:
        """Read each context once, and then what follows it in each row."""
        device, where = self.model.device, {context: i for i, context in enumerate(contexts)}
        longer = [(i, row) for i, row in enumerate(rows) if row.read]
        endings = {key: i for i, key in enumerate(dict.fromkeys((row.context, row.read) for _, row in longer))}
        ids, mask = left_pad(contexts, 0)
        past = self.model.past(ids.shape[1] + max(len(read) for _, read in endings))
        logits = past.extend(ids.to(device), None if bool(mask.all()) else mask.to(device))
        targets = _Targets([(i, where[row.context], 0, row.continuation[:1]) for i, row in enumerate(rows)])
        sums.add(logits[targets.rows.to(device), 0], targets)
        past.select(torch.tensor([where[context] for context, _ in endings], device=device))
        logits = past.extend(right_pad([read for _, read in endings]).to(device), keep=0)
        targets = _Targets([(i, endings[row.context, row.read], 0, row.continuation[1:]) for i, row in longer])
        sums.add(logits[targets.rows.to(device), targets.places.to(device)], targets)
        self.work.forwards += 2
