"""Generative perplexity: how likely a causal judge finds generated text.

    nats(x) = -sum_{i >= 1} log judge(x_i | x_<i),   up to and including the first end-of-sequence token after x_0.

The first token has no context and is not scored; an end of sequence that stands there only opens the text. Two
averages are in use and differ: `"corpus"` is exp(all nats / all tokens) (MDLM), `"mean"` averages exp(nats / tokens)
over samples (FlexMDM's script), which one bad sample can dominate. The entropy of the judge's tokens comes along, since
repetition lowers perplexity without making text better.

Cost: one forward pass of the judge; log-probabilities of batch_size samples at a time, in float32.
Source: arXiv 2406.07524 and its evaluation code, where GPT-2 large is the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError, require
from effml_shared.tensors import gather_log_probs
from torch import Tensor

from effml_diffusion.text_quality import token_entropy

__all__ = ["GenerativePerplexity", "generative_perplexity", "load_judge"]


@dataclass(frozen=True)
class GenerativePerplexity:
    """The judgement of a set of samples."""

    perplexity: float  # aggregated as asked
    nats: Tensor  # (samples,) float64: of the tokens scored
    n_tokens: Tensor  # (samples,) int64: how many that were
    entropy: Tensor  # (samples,) float64, nats: of the frequencies of the judge's tokens


def load_judge(name: str = "gpt2-large", device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """Load a causal model of Hugging Face and its tokenizer, for `generative_perplexity`.

    Raises:
        MissingExtra: transformers is not installed.
    """
    transformers = require("transformers", extra="effml-diffusion[hf]", purpose="to load a judge")
    model = transformers.AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    return model, transformers.AutoTokenizer.from_pretrained(name)


@torch.no_grad()
def generative_perplexity(
    samples: Tensor | Sequence[str] | Sequence[Sequence[int]],
    judge: Callable[..., Any],
    *,
    tokenizer: Any = None,
    eos_id: int | None = None,
    aggregate: str = "corpus",
    max_length: int = 1024,
    batch_size: int = 8,
) -> GenerativePerplexity:
    """Score samples by a causal judge.

    Args:
        samples: texts, or ids in the judge's vocabulary: (samples, seq), or rows of any length.
        judge: called with ids (batch, seq) and `attention_mask`; returns logits (batch, seq, vocab) or an object with
            `.logits`. Put it into evaluation mode yourself.
        tokenizer: the judge's, with an `encode`, for texts.
        eos_id: ends a sample; None: the tokenizer's, if it has one.
        aggregate: `"corpus"` or `"mean"`.
        max_length: samples are cut there.

    Raises:
        ConfigError: texts come without a tokenizer, or no sample has a token to score.
    """
    check_choice("aggregate", aggregate, ("corpus", "mean"))
    check_count("max_length", max_length, 2)
    check_count("batch_size", batch_size, 1)
    if isinstance(samples, str) or (isinstance(samples, Tensor) and samples.ndim != 2):
        got = "one text" if isinstance(samples, str) else f"shape {tuple(samples.shape)}"
        raise ConfigError(f"samples: got {got}, expected a list of texts or ids (samples, seq)")
    if eos_id is None:  # as transformers or as effml_shared.data call it
        eos_id = getattr(tokenizer, "eos_token_id", getattr(tokenizer, "eos_id", None))
    rows = [_ids(sample, tokenizer)[:max_length] for sample in samples]
    device = next((p.device for p in judge.parameters()), None) if isinstance(judge, torch.nn.Module) else None
    found = [_score(rows[i : i + batch_size], judge, eos_id, device) for i in range(0, len(rows), batch_size)]
    if not found or not any(int(n.sum()) for _, n, _ in found):
        raise ConfigError("samples: got nothing to score, expected at least one sample of two tokens")
    nats, n_tokens, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    scored = n_tokens > 0
    if aggregate == "corpus":
        perplexity = (nats.sum() / n_tokens.sum()).exp()
    else:
        perplexity = (nats[scored] / n_tokens[scored]).exp().mean()
    return GenerativePerplexity(float(perplexity), nats, n_tokens, entropy)


def _ids(sample: Any, tokenizer: Any) -> Tensor:
    if isinstance(sample, str):
        if tokenizer is None:
            raise ConfigError("tokenizer: got None for texts, expected that of the judge")
        sample = tokenizer.encode(sample)
    return torch.as_tensor(sample, dtype=torch.int64).cpu()


def _score(
    rows: list[Tensor], judge: Callable[..., Any], eos_id: int | None, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nats, tokens scored and entropies of some samples, each (rows,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, with whatever id
    if ids.shape[1] < 2:
        return torch.zeros(len(rows), dtype=torch.float64), torch.zeros_like(lengths), token_entropy(ids, ids < 0)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    if eos_id is not None:
        ends = (ids[:, 1:] == eos_id).int()
        real[:, 1:] &= ends.cumsum(1) - ends == 0  # no end before it
    on_device = ids.to(device)
    output = judge(on_device, attention_mask=real.long().to(device))
    logits = output if isinstance(output, Tensor) else output.logits
    log_probs = gather_log_probs(logits[:, :-1], on_device[:, 1:]).double().cpu()
    scored = real[:, 1:]
    return -log_probs.where(scored, 0.0).sum(1), scored.sum(1), token_entropy(ids, real)
