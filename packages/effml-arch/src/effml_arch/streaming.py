"""Read a continuation while it is being written: one prompt, pieces of text as soon as they are certain, stop strings.

The tokens are those of `effml_shared.generation.generate` for one row and its seed. A piece is held back while it may
still change or never be shown: the bytes of an unfinished character, and an ending that may become a stop string. Cost
per token: one decoding step, and decoding the new text once more as a whole. The consumer may stop at any time, which
frees the cache; a time limit is an `if` in its loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from effml_shared.checks import check_count, check_range
from effml_shared.data.tokenizers import Tokenizer
from effml_shared.errors import ConfigError
from effml_shared.generation import draw, filter_logits
from torch import Tensor, nn

__all__ = ["settled", "stream_text"]


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield what follows a prompt, piece by piece; joined, the text up to its end or the first stop string.

    Args:
        model: a `Transformer` or another model that has `new_cache`, on any device.
        tokenizer: its `eos_id` ends the text and is not part of it.
        prompt: at least one token.
        stop: strings before the earliest of which the text ends.
        temperature, top_k, top_p, min_p: see `effml_shared.generation.filter_logits`; temperature 0 is greedy.
        seed: of the row, as in `generate(..., seeds=[seed])`.

    Raises:
        ConfigError: at the call, an argument is out of range.
    """
    if not hasattr(model, "new_cache"):
        raise ConfigError(f"model: got a {type(model).__name__}, expected one with new_cache, as a Transformer")
    ids = [int(token) for token in tokenizer.encode(prompt)]
    if not ids:
        raise ConfigError("prompt: got no tokens, expected at least one")
    if isinstance(stop, str) or not all(stop):
        raise ConfigError(f"stop: got {stop!r}, expected a sequence of strings, none of them empty")
    check_count("max_new_tokens", max_new_tokens, 1)
    check_count("top_k", top_k, 0)
    check_range("temperature", temperature, 0.0)
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise ConfigError(f"min_p: got {min_p}, expected 0 to 1")
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return _pieces(_tokens(model, ids, max_new_tokens, filters, seed), tokenizer, tuple(stop))


def _tokens(model: Any, prompt: list[int], max_new_tokens: int, filters: dict[str, Any], seed: int) -> Iterator[int]:
    device = next(model.parameters()).device
    uniform = torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
    cache, ids = model.new_cache(len(prompt) + max_new_tokens), torch.tensor([prompt], device=device)
    for step in range(max_new_tokens):
        logits = _next_logits(model, ids, cache)
        if filters["temperature"]:
            ids = draw(filter_logits(logits, **filters), uniform[step : step + 1])[:, None]
        else:
            ids = logits.argmax(-1, keepdim=True)
        yield int(ids)


@torch.no_grad()
def _next_logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    training = [module for module in model.modules() if module.training]
    model.eval()  # between two tokens the model is its owner's
    try:
        return model(ids, cache=cache, logits_to_keep=1).logits[:, -1]
    finally:
        for module in training:
            module.training = True


def _pieces(tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
    ids: list[int] = []
    shown, text = 0, ""
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        found = [place for place in (text.find(string) for string in stop) if place >= 0]
        if found:
            if min(found) > shown:
                yield text[shown : min(found)]
            return
        end = settled(text, stop)
        if end > shown:
            yield text[shown:end]
            shown = end
    if len(text) > shown:
        yield text[shown:]


def settled(text: str, stop: Sequence[str]) -> int:
    """Return how many characters of a growing text are certain: not in an unfinished character or stop string.

    >>> settled("one t", ["two"]), settled("caf\\ufffd", []), settled("done", ["two"])
    (4, 3, 4)
    """
    whole = text.rstrip("\ufffd")
    begun = (n for string in stop for n in range(min(len(string) - 1, len(whole)), 0, -1) if whole.endswith(string[:n]))
    return len(whole) - max(begun, default=0)
