"""Continue prompts in one batch until each text ends: by a token, a stop string, or its length.

`effml_shared.generation.generate` draws, each row from its own seed by inverting the distribution in float64. It knows
tokens only; so it is given, in place of the model, one that watches the texts: when the end of a row is certain, all
its next logits but that of the end-of-text token are minus infinity, and the row ends. The batch ends with its last
row. Cost beside the model's: one decoding of the last few tokens per row and step, and only if there are stop strings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from effml_shared.errors import NonFiniteError
from effml_shared.generation import generate
from effml_shared.tensors import left_pad, widen
from effml_shared.transformer import TransformerOutput
from torch import Tensor

from effml_eval.scoring.causal_model import CausalModel, Past
from effml_eval.scoring.scorer import SamplingParams
from effml_eval.scoring.stop_strings import StopStrings, find_stop
from effml_eval.scoring.tokenizer_adapter import TokenizerAdapter

__all__ = ["Continuation", "PromptRow", "continue_prompts"]


class PromptRow(NamedTuple):
    """The tokens of a prompt and the seed of one sample of it; greedy samples share seed 0."""

    tokens: tuple[int, ...]
    seed: int


class Continuation(NamedTuple):
    """What `Generation` says of a text, but for its prompt."""

    text: str
    finish_reason: str
    n_tokens: int


class _WatchedModel:
    """A model with `new_cache`, as far as `generate` asks for one."""

    def __init__(self, model: CausalModel, watch: StopStrings, end_id: int | None) -> None:
        self.model, self.watch, self.end_id = model, watch, end_id
        self.written: list[list[int]] | None = None  # the prompts are the first thing it reads and are no part of it
        self.decided: dict[int, int] = {}  # row -> tokens after which its end was certain

    def new_cache(self, max_len: int | None = None) -> Past:
        return self.model.past(max_len)

    def __call__(self, ids: Tensor, *, attention_mask: Tensor | None, cache: Past, logits_to_keep: int) -> Any:
        logits = cache.extend(ids, attention_mask, logits_to_keep)
        if not bool(widen(logits).logsumexp(-1).isfinite().all()):
            raise NonFiniteError("logits: got NaN or infinity while generating, expected finite numbers")
        if self.written is None:
            self.written = []
        elif self.watch.stop:
            self.written = self.written or [[] for _ in range(len(ids))]
            for row, token in enumerate(ids[:, 0].tolist()):
                self.written[row].append(token)
                if row not in self.decided and self.watch.decided(self.written[row]):
                    self.decided[row] = len(self.written[row])
            if self.decided and self.end_id is not None and self.end_id < logits.shape[-1]:
                logits = logits.clone()
                logits[list(self.decided)] = -math.inf
                logits[list(self.decided), :, self.end_id] = 0
        return TransformerOutput(logits=logits)


@torch.no_grad()
def continue_prompts(
    model: CausalModel,
    tokenizer: TokenizerAdapter,
    rows: Sequence[PromptRow],
    sampling: SamplingParams,
    end_ids: Sequence[int] = (),
) -> list[Continuation]:
    """Continue each row; samples of one prompt, if they stand together and are as many for each, share its reading.

    Args:
        end_ids: each of them ends a text.

    Raises:
        NonFiniteError: the model returns NaN or plus infinity.
    """
    prompts = list(dict.fromkeys(row.tokens for row in rows))
    times = len(rows) // len(prompts)
    if [row.tokens for row in rows] != [prompt for prompt in prompts for _ in range(times)]:
        prompts, times = [row.tokens for row in rows], 1
    ids, mask = left_pad(prompts, 0)
    ends = [end for end in end_ids if model.vocab_size is None or end < model.vocab_size]
    watched: Any = _WatchedModel(model, StopStrings(tokenizer, sampling.stop), next(iter(ends), None))
    drawn = generate(
        watched,
        ids.to(model.device),
        mask.to(model.device),
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        eos_token_id=ends or None,
        pad_token_id=0,  # an id that every model has
        seeds=[row.seed for row in rows] if sampling.temperature > 0 else None,
        num_return_sequences=times,
    )
    new, real = drawn.ids[:, ids.shape[1] :].cpu(), drawn.mask.cpu()
    return [
        _finish(tokenizer, new[i][real[i]].tolist()[: watched.decided.get(i)], sampling.stop, ends)
        for i in range(len(rows))
    ]


def _finish(tokenizer: TokenizerAdapter, ids: list[int], stop: Sequence[str], ends: Sequence[int]) -> Continuation:
    ended = bool(ids) and ids[-1] in ends
    text = tokenizer.decode(ids[:-1] if ended else ids)
    place = find_stop(text, stop)
    if place is not None:
        return Continuation(text[:place], "stop", len(ids))
    return Continuation(text, "eos" if ended else "length", len(ids))
