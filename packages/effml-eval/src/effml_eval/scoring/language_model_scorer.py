"""Score texts by a causal language model, and let it write: the `Scorer` for networks.

    score(context, continuation) = sum over the continuation's tokens t_i of log softmax(logits_{i-1})[t_i]

in nats, each log-probability in float32 (float64 for a model of that type), the sum in float64. Every request becomes
rows of tokens, cut from the left to what the model can read; `batch_plan` puts them into batches, and `row_scoring`
reads those, a context once for all its continuations.

A batch that does not fit into memory is halved until it does. Its name is kept in `too_large`: a resumed evaluation
that puts the names back makes the same halves, and so gets the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.generation import evaluating
from effml_shared.seeding import capture, restore

from effml_eval.scoring.batch_plan import cut, plan_rows
from effml_eval.scoring.causal_model import CausalModel
from effml_eval.scoring.prompt_continuation import Continuation, PromptRow, continue_prompts
from effml_eval.scoring.request_hash import canonical_json, sample_seed
from effml_eval.scoring.rolling_windows import rolling_windows
from effml_eval.scoring.row_scoring import RowScore, RowScorer, Work
from effml_eval.scoring.scorer import Generation, GenerationRequest, RollingScore, SamplingParams, Score
from effml_eval.scoring.token_boundaries import Row, SplitPair, fit, split_pair
from effml_eval.scoring.tokenizer_adapter import TokenizerAdapter

__all__ = ["LMScorer"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class LMScorer:
    """Answer requests by a model; between calls the model, its modes and all random state are as they were.

    Args:
        model: a `Transformer`, a causal model of Hugging Face, or any module from ids (batch, seq) to logits or an
            object with `.logits`; on its own device, in its own type.
        tokenizer: of `effml_shared.data` or of transformers.
        max_length: the most tokens the model reads at once; None: what its config says, else 2048.
        batch_tokens: rows times the longest of them, in one batch.
        dtype: compute under autocast in bfloat16 or float16; None: as the model is.
        prefix_token_id: what the first token of a text is conditioned on; None: the tokenizer's BOS, else its EOS.
        strict_boundary: see `token_boundaries`.
        rolling_context: the least context of a token of a document but in its first window; see `rolling_windows`.
        share_prefix: read a context once for all its continuations, where the model can remember it.

    Raises:
        ConfigError: an argument is out of range, the model is not causal, or the tokenizer is of no known kind.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        batch_tokens: int = 16384,
        dtype: torch.dtype | None = None,
        prefix_token_id: int | None = None,
        strict_boundary: bool = False,
        rolling_context: int = 1,
        share_prefix: bool = True,
    ) -> None:
        self.model, self.tokenizer = CausalModel(model), TokenizerAdapter(tokenizer)
        self.max_length = max_length if max_length is not None else self.model.max_length or 2048
        check_count("max_length", self.max_length, 1)
        check_count("batch_tokens", batch_tokens, 1)
        check_choice("dtype", dtype, (None, torch.bfloat16, torch.float16))
        if not 1 <= rolling_context <= self.max_length:
            raise ConfigError(f"rolling_context: got {rolling_context}, expected 1 to max_length={self.max_length}")
        self.batch_tokens, self.dtype, self.rolling_context = batch_tokens, dtype, rolling_context
        self.prefix_token_id = self.tokenizer.prefix_id(prefix_token_id)
        self.strict_boundary = strict_boundary
        self._score_batch = RowScorer(self.model, share_prefix=share_prefix)
        ends: Any = getattr(getattr(self.model.model, "generation_config", None), "eos_token_id", None)
        self.end_ids = self.tokenizer.end_ids(ends)
        self.too_large: set[str] = set()  # names of batches to halve at once

    @property
    def work(self) -> Work:
        """What has been done so far."""
        return self._score_batch.work

    @property
    def settings(self) -> dict[str, Any]:
        """What changes numbers beside the requests and the weights: equal settings, equal answers."""
        names = ("max_length", "batch_tokens", "prefix_token_id", "strict_boundary", "rolling_context")
        return {
            **{name: getattr(self, name) for name in names},
            "share_prefix": self._score_batch.share_prefix,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "end_ids": list(self.end_ids),
        }

    def plan(
        self, requests: Sequence[tuple[str, str]] | Sequence[str] | Sequence[GenerationRequest]
    ) -> list[list[int]]:
        """Return the batches in which requests of one kind are answered, as indices in the order they are run.

        Asking for the requests of one batch alone gives the numbers that asking for all gives. So whoever resumes an
        evaluation plans all requests, and then leaves out the batches of which every answer is known.
        """
        if not requests:
            return []
        if isinstance(requests[0], str):
            return self._plan_documents(requests)  # type: ignore[arg-type]
        if isinstance(requests[0], GenerationRequest):
            return self._plan_prompts(requests)  # type: ignore[arg-type]
        pairs: Any = requests
        return plan_rows([self._row(pair)[0] for pair in pairs], self.batch_tokens)

    def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        """Return how likely each continuation is after its context, pairs of texts.

        Raises:
            ConfigError: a continuation is empty or does not fit into the model, or a token is none of the model's.
            NonFiniteError: the model returns NaN or plus infinity.
        """
        rows = [self._row(request) for request in requests]
        with self._quiet():
            scores = self._score_rows([row for row, _, _ in rows])
        return [
            Score(*score, row.n_scored, n_truncated, merge)
            for score, (row, n_truncated, merge) in zip(scores, rows, strict=True)
        ]

    def rolling(self, documents: Sequence[str]) -> list[RollingScore]:
        """Return how likely each document is, each by itself; an empty one has 0 nats.

        Raises:
            ConfigError: a token is none of the model's.
            NonFiniteError: the model returns NaN or plus infinity.
        """
        if isinstance(documents, str):
            raise ConfigError("documents: got one text, expected a list of texts")
        answers: dict[int, RollingScore] = {}
        with self._quiet():
            for batch in self._plan_documents(documents):
                rows = [self._windows(documents[i]) for i in batch]
                scores = iter(self._score_rows([row for windows in rows for row in windows]))
                for i, windows in zip(batch, rows, strict=True):
                    text = documents[i]
                    nats = sum((next(scores)[0] for _ in windows), 0.0)
                    sizes = len(text.encode(errors="replace")), len(text.split())
                    answers[i] = RollingScore(nats, sum(row.n_scored for row in windows), *sizes)
        return [answers[i] for i in range(len(documents))]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Return what the model writes after each prompt; a sample depends on its request alone.

        Raises:
            ConfigError: max_new_tokens leaves no room for a prompt, or a token is none of the model's.
            NonFiniteError: the model returns NaN or plus infinity.
        """
        prompts = [self._prompt(request) for request in requests]
        answers: dict[int, Generation] = {}
        with self._quiet():
            for batch in self._plan_prompts(requests):
                rows = list(dict.fromkeys(prompts[i][0] for i in batch))
                written = dict(zip(rows, self._write(rows, requests[batch[0]].sampling), strict=True))
                answers.update((i, Generation(*written[prompts[i][0]], prompts[i][1])) for i in batch)
        return [answers[i] for i in range(len(requests))]

    def score_token_pairs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Return what `score` returns, for contexts and continuations that are token ids already, none empty.

        Raises:
            ConfigError, NonFiniteError: as `score`.
        """
        if not all(len(context) and len(continuation) for context, continuation in pairs):
            raise ConfigError("pairs: got one without tokens on one side, expected at least one on each")
        split = [SplitPair(tuple(context), tuple(continuation), False) for context, continuation in pairs]
        rows = [fit(pair, self.max_length) for pair in split]
        with self._quiet():
            scores = self._score_rows([row for row, _ in rows])
        return [Score(*score, row.n_scored, cut) for score, (row, cut) in zip(scores, rows, strict=True)]

    def _row(self, request: tuple[str, str]) -> tuple[Row, int, bool]:
        context, continuation = request
        if not isinstance(context, str) or not isinstance(continuation, str):
            raise ConfigError(f"requests: got {request!r}, expected pairs of texts")
        strict, prefix_id = self.strict_boundary, self.prefix_token_id
        pair = split_pair(self.tokenizer, context, continuation, prefix_id=prefix_id, strict=strict)
        return *fit(pair, self.max_length), pair.boundary_merge

    def _windows(self, document: str) -> list[Row]:
        slots = (self.prefix_token_id, *self.tokenizer.encode(document))
        windows = rolling_windows(len(slots) - 1, self.max_length, self.rolling_context)
        return [Row(slots[window.start : window.stop], window.n_scored) for window in windows]

    def _prompt(self, request: GenerationRequest) -> tuple[PromptRow, int]:
        room = self.max_length - request.sampling.max_new_tokens
        if room < 1:
            limit = f"less than max_length={self.max_length}, to leave room for a prompt"
            raise ConfigError(f"max_new_tokens: got {request.sampling.max_new_tokens}, expected {limit}")
        tokens = self.tokenizer.encode(request.prompt, opened=True) or (self.prefix_token_id,)
        self.model.check_ids(tokens)
        seed = sample_seed(request) if request.sampling.temperature > 0 else 0
        return PromptRow(tokens[-room:], seed), max(0, len(tokens) - room)

    def _plan_documents(self, documents: Sequence[str]) -> list[list[int]]:
        lengths = [1 + len(self.tokenizer.encode(document)) for document in documents]
        order = sorted(range(len(documents)), key=lambda i: (-lengths[i], documents[i]))
        return [order[stretch] for stretch in cut([lengths[i] for i in order], self.batch_tokens)]

    def _plan_prompts(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        members: dict[SamplingParams, dict[PromptRow, list[int]]] = {}
        for i, request in enumerate(requests):
            members.setdefault(request.sampling, {}).setdefault(self._prompt(request)[0], []).append(i)
        batches = []
        for sampling in sorted(members):
            order = sorted(members[sampling], key=lambda row: (-len(row.tokens), row))
            stretches = cut([len(row.tokens) + sampling.max_new_tokens for row in order], self.batch_tokens)
            batches += [[i for row in order[stretch] for i in members[sampling][row]] for stretch in stretches]
        return batches

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Compute without gradients, in evaluation mode, and leave modes and random state as they were."""
        model, state = self.model.model, capture()
        autocast = torch.autocast(self.model.device.type, self.dtype) if self.dtype is not None else nullcontext()
        try:
            with torch.no_grad(), evaluating(model), autocast:
                yield
        finally:
            restore(state)

    def _halving(self, items: list[Item], run: Callable[[list[Item]], list[Answer]]) -> list[Answer]:
        """Run a batch, or if it does not fit into memory its halves."""
        if not self.too_large or _name(items) not in self.too_large:
            try:
                return run(items)
            except RuntimeError as error:
                if len(items) == 1 or not _out_of_memory(error):
                    raise
            self.too_large.add(_name(items))
            self.work.halvings += 1
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
        half = (len(items) + 1) // 2
        return self._halving(items[:half], run) + self._halving(items[half:], run)

    def _write(self, rows: list[PromptRow], sampling: SamplingParams) -> list[Continuation]:
        options: dict[str, Any] = {"sampling": sampling, "end_ids": self.end_ids}
        return self._halving(rows, partial(continue_prompts, self.model, self.tokenizer, **options))

    def _score_rows(self, rows: Sequence[Row]) -> list[RowScore]:
        scores: dict[int, RowScore] = {}
        for batch in plan_rows(rows, self.batch_tokens):
            scores.update(zip(batch, self._halving([rows[i] for i in batch], self._score_batch), strict=True))
        return [scores[i] for i in range(len(rows))]


def _name(items: Sequence[Any]) -> str:
    return hashlib.sha256(canonical_json(items).encode()).hexdigest()


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
