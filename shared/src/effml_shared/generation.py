"""Decode from a causal language model: greedy or sampled, batched, left-padded, reproducible row by row.

One prefill of the prompts, then one position per step over a key-value cache, O(1) new memory per step. A draw inverts
the cumulative distribution at a uniform number which, given `seeds`, comes from the row's own generator: then a row's
text depends neither on the batch it is in nor on the device. Filters apply in the order of Hugging Face's `generate`:
temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effml_shared.errors import ConfigError
from effml_shared.tensors import gather_log_probs, widen

__all__ = ["Decoder", "Generation", "draw", "evaluating", "filter_logits", "generate", "make_decoder", "unwrap"]


class Generation(NamedTuple):
    """Rows are prompt-major: the num_return_sequences continuations of a prompt are neighbours. new = steps taken."""

    ids: Tensor  # (rows, prompt + new): the prompts as given, then the continuations, padded after their end
    mask: Tensor  # (rows, new) bool: generated, an end-of-sequence token included
    log_probs: Tensor | None  # (rows, new): of each token under the model; 0 where padded
    sampling_log_probs: Tensor | None  # (rows, new): under the filtered distribution it was drawn from


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Return logits (rows, vocab) divided by the temperature, with -inf at tokens that must not be drawn.

    top_k keeps exactly k tokens (0: all; ties go to the lower id). top_p then keeps a token if less than top_p of the
    remaining mass is on more likely ones. min_p keeps those at least min_p times as likely as the likeliest.

    >>> filter_logits(torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log(), top_p=0.79).isfinite().tolist()
    [[False, True, False, True]]
    """
    logits = widen(logits) / temperature
    if top_k or top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ranked[:, top_k:] = -math.inf
        before = F.pad(ranked.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        ranked = ranked.masked_fill(before >= top_p, -math.inf) if top_p < 1 else ranked
        logits = torch.empty_like(logits).scatter(-1, order, ranked)
    if min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return for each row of logits (rows, vocab) the lowest id whose cumulative probability exceeds uniform (rows)."""
    probs = logits.double().softmax(-1)
    ids = torch.searchsorted(probs.cumsum(-1), uniform[:, None], right=True).squeeze(-1)
    last = (probs > 0).int().cumsum(-1).argmax(-1)  # rounding may leave the sum short of u: then the last id possible
    return torch.minimum(ids, last)


class Decoder(Protocol):
    """A model and what it remembers of its rows."""

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Take in the next tokens (rows, new) and return the logits (rows, vocab) that follow the last of them.

        mask: (rows, new), bool, False at padding, which stands on the left of a row's first tokens; None: none.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        ...

    def fork(self, rows: Tensor) -> Decoder:
        """Return another decoder with these rows, and leave this one as it is."""
        ...


class _TransformerDecoder:
    def __init__(self, model: Any, max_len: int) -> None:
        self.model, self.cache = model, model.new_cache(max_len)

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(ids, attention_mask=mask, cache=self.cache, logits_to_keep=1).logits[:, -1]

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)

    def fork(self, rows: Tensor) -> _TransformerDecoder:
        other = copy.copy(self)
        other.cache = self.cache.fork(rows)
        return other


class _HuggingFaceDecoder:
    """For a causal model of `transformers`, which wants the mask of all tokens, and positions where there is one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self.mask: Tensor | None = None
        self.position: Any = None  # (rows, 1) of the last token, with a mask

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        known: dict[str, Any] = {}
        if mask is not None:
            self.mask = mask.to(ids.dtype)
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        elif self.mask is not None:
            self.mask = F.pad(self.mask, (0, ids.shape[1]), value=1)
            positions = self.position + torch.arange(1, 1 + ids.shape[1], device=ids.device)
        if self.mask is not None:
            known, self.position = {"attention_mask": self.mask, "position_ids": positions}, positions[:, -1:]
        output = self.model(ids, **known, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        if self.mask is not None:
            self.mask, self.position = self.mask[rows], self.position[rows]

    def fork(self, rows: Tensor) -> _HuggingFaceDecoder:
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)  # its layers have state of many kinds
        other.select(rows)
        return other


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module under DDP and `torch.compile`, whose forward pass needs no other rank."""
    inner: Any = model
    while isinstance(inner, nn.parallel.DistributedDataParallel) or "_orig_mod" in getattr(inner, "_modules", ()):
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner._orig_mod
    return inner


def make_decoder(model: nn.Module, max_len: int) -> Decoder:
    """Return a decoder without rows of a `Transformer`, for at most max_len tokens each, or of a Hugging Face model."""
    inner = unwrap(model)  # rows end when they end: ranks need not take equally many steps
    return _TransformerDecoder(inner, max_len) if hasattr(inner, "new_cache") else _HuggingFaceDecoder(inner)


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Put a network into evaluation mode for a while, and afterwards those modules back that were training."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    num_return_sequences: int = 1,
    return_logprobs: bool = False,
) -> Generation:
    """Continue prompts until each has produced an end-of-sequence token, or max_new_tokens.

    Args:
        model: called as a `Transformer` if it has `new_cache`, else as a causal model of Hugging Face's transformers.
        input_ids: (batch, prompt) ids, shorter prompts padded on the left; attention_mask: (batch, prompt), 0 there.
        do_sample, temperature, top_k, top_p, min_p: see `filter_logits`; no sampling or temperature 0 is greedy.
        eos_token_id: one or more ids, each of which ends a row; pad_token_id: what then follows (default: that id).
        seeds: one per row of the result, for a row's own generator. generator: one for all rows, on any device.
        return_logprobs: fill in both log-probabilities. Greedy decoding draws with probability 1.

    Raises:
        ConfigError: an argument is out of range, seeds do not match the rows, or the padding is on the right.
    """
    batch, prompt = input_ids.shape
    rows, device = batch * num_return_sequences, input_ids.device
    for name, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("num_return_sequences", num_return_sequences, num_return_sequences >= 1, "at least 1"),
        ("input_ids", tuple(input_ids.shape), prompt >= 1, "at least one token per row"),
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "0 to 1"),
        ("seeds", f"{len(seeds or ())} of them", seeds is None or len(seeds) == rows, f"one for each of {rows} rows"),
        ("generator", "seeds too", seeds is None or generator is None, "one or the other"),
    ):
        if not fits:
            raise ConfigError(f"{name}: got {value}, expected {expected}")
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ConfigError("attention_mask: got padding on the right, expected prompts padded on the left")
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # without padding, attention needs no mask tensor
    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    pad = pad_token_id if pad_token_id is not None else (ends or [0])[0]

    sampling = do_sample and temperature > 0
    if sampling:  # all draws at once: one transfer to the device, none per step
        if seeds is not None:
            streams = [torch.Generator().manual_seed(seed) for seed in seeds]
            uniform = torch.stack([torch.rand(max_new_tokens, dtype=torch.float64, generator=g) for g in streams], 1)
        else:
            where = "cpu" if generator is None else generator.device
            uniform = torch.rand(max_new_tokens, rows, dtype=torch.float64, generator=generator, device=where)
        uniform = uniform.to(device)
    ids = input_ids.new_full((rows, prompt + max_new_tokens), pad)
    ids[:, :prompt] = input_ids.repeat_interleave(num_return_sequences, dim=0)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    log_probs = torch.zeros(2, rows, max_new_tokens, dtype=torch.float32, device=device) if return_logprobs else None
    live, stop = mask.new_ones(rows), torch.tensor(ends, dtype=ids.dtype, device=device)

    with evaluating(model):
        decoder = make_decoder(model, prompt + max_new_tokens)
        logits = decoder(input_ids, attention_mask)
        if num_return_sequences > 1:
            copies = torch.arange(batch, device=device).repeat_interleave(num_return_sequences)
            decoder.select(copies)
            logits = logits[copies]
        for step in range(max_new_tokens):
            if sampling:
                filtered = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
                token = draw(filtered, uniform[step])
            else:
                token = logits.argmax(-1)
            token = token.where(live, pad)
            ids[:, prompt + step], mask[:, step] = token, live
            if log_probs is not None:
                log_probs[0, :, step] = gather_log_probs(logits, token).where(live, 0)
                log_probs[1, :, step] = gather_log_probs(filtered, token).where(live, 0) if sampling else 0
            live = live & ~torch.isin(token, stop)
            if step + 1 == max_new_tokens or not bool(live.any()):
                break
            logits = decoder(token[:, None])
    new = step + 1
    both = (None, None) if log_probs is None else (log_probs[0, :, :new], log_probs[1, :, :new])
    return Generation(ids[:, : prompt + new], mask[:, :new], *both)
