"""Sample completions of prompts in groups: one prefill per prompt, a draw of one's own per row, rows that end leave.

A prompt is read once, whatever the number of its samples and temperatures; then one position per step over a key-value
cache. A token is drawn by inverting the cumulative distribution at the uniform number that belongs to its row and step
(`effml_rl.random_streams`): it depends on (seed, draw, the prompt's tokens, the sample's number), not on what else is
sampled. All temperatures share these numbers. So a prompt that is given twice gets the same completions twice; more of
them are asked for with n, and others with another draw.

Logits come from `effml_rl.native_rows` where it serves (plain Transformers and Llamas of at most 10^8 weights, in
float32 on a CPU with a C compiler), else from `effml_rl.torch_rows`. With the first, completions and log-probabilities
are bit by bit the same in every batch. With the second they are not: products of one to three rows round differently
from those of more (MKL's sgemm), and attention sums over keys in groups that padding shifts. Log-probabilities then
agree to 1e-5 in float32, and a token is another one only if its uniform number lies that close to a bound.

`sampler_logps` are of the whole distribution at the sampling temperature, log softmax(z / T) in float32 or wider.
Top-k, top-p and min-p (in this order, see `effml_shared.generation.filter_logits`) only restrict what is drawn, so that
exp(logp - sampler_logp) compares equal things. Temperature 0 takes the likeliest token, with log-probability 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from operator import index
from typing import Any

import numpy as np
import torch
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.generation import evaluating, unwrap
from effml_shared.tensors import left_pad, widen
from numpy.typing import NDArray
from torch import Tensor, nn

from effml_rl.native_rows import NativeRows, native_rows, one_torch_thread
from effml_rl.random_streams import stream_keys, uniforms
from effml_rl.rollout_batch import RolloutBatch
from effml_rl.token_draws import draw_tokens
from effml_rl.torch_rows import TorchRows

__all__ = ["Sampler"]


class Sampler:
    """Draw completions from a causal language model: a `Transformer`, its like, or one of Hugging Face.

    Args:
        model: may be wrapped by DDP, `torch.compile` or peft. Its weights are read anew by every call, in evaluation
            mode; afterwards it is in the mode it was in.
        tokenizer: turns strings into ids and back, `encode` and `decode`; what special tokens it adds are kept.
        eos_token_id: one or more ids, each of which ends a completion; None: the tokenizer's own; (): none.
        pad_token_id: fills up prompts and completions; None: the tokenizer's own, else an end, else 0.
        temperature, top_p, top_k, min_p: see the module; `generate` may override the temperature.
        max_new_tokens: a completion that has not ended by then is cut off, and `truncated`.
        max_rows: completions and prompts in memory at a time: no result depends on it, but for rounding; None: all.
        keep_end: whether `texts` includes the end token, as verifiers want it that look for it.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        max_rows: int | None = None,
        keep_end: bool = False,
    ) -> None:
        _check_decodes(model)
        check_range("temperature", temperature, 0.0)
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p: got {top_p}, expected more than 0 and at most 1")
        if not 0 <= min_p <= 1:
            raise ConfigError(f"min_p: got {min_p}, expected 0 to 1")
        check_count("top_k", top_k, 0)
        check_count("max_new_tokens", max_new_tokens, 1)
        if max_rows is not None:
            check_count("max_rows", max_rows, 1)
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.temperature = temperature
        self.filters: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        self.max_new_tokens, self.max_rows, self.keep_end = max_new_tokens, max_rows, keep_end
        end = _special(tokenizer, "eos") if eos_token_id is None else eos_token_id
        ends: Any = () if end is None else [end] if hasattr(end, "__index__") else end
        pad = _special(tokenizer, "pad") if pad_token_id is None else pad_token_id
        try:
            self.eos_token_ids = [index(i) for i in ends]
            self.pad_token_id = index(pad) if pad is not None else (self.eos_token_ids or [0])[0]
        except TypeError:
            got = f"{eos_token_id!r} and {pad_token_id!r}"
            raise ConfigError(f"eos_token_id, pad_token_id: got {got}, expected token ids") from None
        check_count("pad_token_id", self.pad_token_id, 0)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], n: int = 8, *, temperature: float | None = None, draw: int = 0
    ) -> RolloutBatch:
        """Return n completions of every prompt, prompt by prompt.

        Args:
            draw: tells calls with the same prompts apart, such as the training step.

        Raises:
            ConfigError: there are no prompts, one is empty, of ids that the model does not have or too long for it, or
                is a string where there is no tokenizer; n or the temperature is out of range.
            NonFiniteError: the model's logits are NaN.
        """
        return self.generate_each(prompts, [self.temperature if temperature is None else temperature], n, draw)[0]

    @torch.no_grad()
    def generate_each(
        self, prompts: Sequence[str | Sequence[int]], temperatures: Sequence[float], n: int = 8, draw: int = 0
    ) -> list[RolloutBatch]:
        """Return what `generate` would at each of these temperatures, reading every prompt once."""
        check_count("n", n, 1)
        if not len(temperatures):
            raise ConfigError("temperatures: got none, expected at least one")
        for temperature in temperatures:
            check_range("temperature", temperature, 0.0)
        encoded = self._encoded(prompts)
        place = {prompt: number for number, prompt in enumerate(dict.fromkeys(encoded))}
        source = np.array([place[prompt] for prompt in encoded])
        keys = np.stack([stream_keys(self.seed, draw, prompt, np.arange(n)) for prompt in encoded])
        # By prompt, temperature and sample, so that the rows of a prompt are decoded together.
        shape = (len(encoded), len(temperatures), n)
        rows = _Rows(
            np.broadcast_to(source[:, None, None], shape).reshape(-1),
            np.broadcast_to(keys[:, None], shape).reshape(-1),
            np.broadcast_to(np.array(temperatures)[:, None], shape).reshape(-1),
            self,
        )
        with evaluating(self.model):
            native = native_rows(unwrap(self.model), self.max_new_tokens)
            if native is not None:
                with one_torch_thread():
                    self._complete(rows, list(place), native)
            else:
                rest = TorchRows(self.model, self.max_new_tokens, self.pad_token_id, rows.ids.device)
                self._complete(rows, list(place), rest)
        if not bool(rows.logps.isfinite().all()):
            raise NonFiniteError("model: got logits that are NaN or infinite, expected finite ones")
        prompt_ids, prompt_mask = left_pad(encoded, self.pad_token_id)
        numbers = torch.arange(len(rows.ids), device=rows.ids.device).view(shape)
        return [rows.batch(chosen.flatten(), prompt_ids, prompt_mask, n) for chosen in numbers.unbind(1)]

    def texts(self, batch: RolloutBatch) -> list[str]:
        """Return the completions as text, without padding, and without the end token unless `keep_end`.

        Raises:
            ConfigError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError("tokenizer: got none, expected one for texts")
        ids, masks = batch.completion_ids.tolist(), batch.completion_mask.tolist()
        kept = [[i for i, counted in zip(*row, strict=True) if counted] for row in zip(ids, masks, strict=True)]
        if not self.keep_end:
            kept = [row[:-1] if row[-1] in self.eos_token_ids else row for row in kept]
        return [self.tokenizer.decode(row) for row in kept]

    def completions(
        self, prompts: Sequence[str | Sequence[int]], *, temperatures: Sequence[float], n: int = 8, draw: int = 0
    ) -> list[list[list[str]]]:
        """Return for each temperature, of each prompt, the texts of n completions."""
        found = [self.texts(batch) for batch in self.generate_each(prompts, temperatures, n, draw)]
        return [[texts[start : start + n] for start in range(0, len(texts), n)] for texts in found]

    def _encoded(self, prompts: Sequence[str | Sequence[int]]) -> list[tuple[int, ...]]:
        """Return the ids of every prompt, checked."""
        if isinstance(prompts, str) or not hasattr(prompts, "__len__") or not len(prompts):
            raise ConfigError(f"prompts: got {prompts!r:.60}, expected a list of at least one prompt")
        config = getattr(unwrap(self.model), "config", None)
        context, vocab_size = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
        bound = vocab_size - 1 if isinstance(vocab_size, int) else 2**31
        if self.pad_token_id > bound:
            raise ConfigError(f"pad_token_id: got {self.pad_token_id}, expected at most {bound}")
        encoded = []
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str) and self.tokenizer is None:
                raise ConfigError(
                    f"prompts: got a string and no tokenizer, expected a tokenizer or ids: {prompt[:40]!r}"
                )
            ids: Any = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            try:
                row = tuple(map(index, ids))
            except TypeError:
                raise ConfigError(f"prompts: got {prompt!r:.60}, expected strings or sequences of ids") from None
            if not row:
                raise ConfigError(f"prompts: got no tokens in number {number}, expected at least one")
            if min(row) < 0 or max(row) > bound:
                raise ConfigError(f"prompts: got ids {min(row)} to {max(row)}, expected 0 to {bound}")
            if isinstance(context, int) and len(row) + self.max_new_tokens - 1 > context:
                raise ConfigError(
                    f"prompts: got one of {len(row)} tokens and max_new_tokens={self.max_new_tokens}, "
                    f"expected together at most the model's context of {context}"
                )
            encoded.append(row)
        return encoded

    def _complete(self, rows: _Rows, prompts: list[tuple[int, ...]], decoder: NativeRows | TorchRows) -> None:
        """Decode all rows, at most `max_rows` at a time."""
        limit = self.max_rows or len(rows.source)
        for first in range(0, len(prompts), limit):
            prefilled = decoder.prefill(prompts[first : first + limit])
            queue = np.flatnonzero((rows.source >= first) & (rows.source < first + limit))
            while len(queue):
                now, queue = queue[:limit], queue[limit:]
                place = torch.from_numpy(rows.source[now] - first).to(prefilled.device)
                decoder.start(place)
                active, logits = torch.from_numpy(now).to(prefilled.device), prefilled[place]
                for step in range(self.max_new_tokens):
                    ids, ended = rows.draw(active, logits, step)
                    kept = None
                    if bool(ended.any()):
                        rows.end(active[ended], step + 1)
                        kept = (~ended).nonzero().squeeze(1)
                        active, ids = active[kept], ids[kept]
                    if step + 1 == self.max_new_tokens or not len(active):
                        break
                    logits = decoder.step(ids, kept)


class _Rows:
    """What is known of every completion: where it comes from, and what has been drawn."""

    def __init__(
        self, source: NDArray[np.int64], keys: NDArray[np.uint64], temperatures: NDArray[np.float64], sampler: Sampler
    ) -> None:
        parameter = next(sampler.model.parameters(), torch.empty(0))
        device, shape = parameter.device, (len(source), sampler.max_new_tokens)
        self.source = source  # which of the distinct prompts
        self.uniform = torch.from_numpy(uniforms(keys, sampler.max_new_tokens)).to(device)
        self.temperature = torch.tensor(temperatures, dtype=widen(parameter[:0]).dtype, device=device)
        self.filters = sampler.filters
        self.ends = torch.tensor(sampler.eos_token_ids, dtype=torch.int64, device=device)
        self.ids = torch.full(shape, sampler.pad_token_id, dtype=torch.int64, device=device)
        self.logps = self.temperature.new_zeros(shape)
        self.lengths = torch.full(shape[:1], sampler.max_new_tokens, dtype=torch.int64, device=device)
        self.ended = torch.zeros(shape[:1], dtype=torch.bool, device=device)

    def draw(self, active: Tensor, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Draw token `step` of the active rows from logits (active, vocab): ids, and which rows end with it."""
        ids, logps = draw_tokens(logits, self.temperature[active], self.uniform[active, step], **self.filters)
        self.ids[active, step], self.logps[active, step] = ids, logps
        return ids, torch.isin(ids, self.ends)

    def end(self, chosen: Tensor, length: int) -> None:
        """Note that rows have ended, after so many tokens."""
        self.lengths[chosen], self.ended[chosen] = length, True

    def batch(self, chosen: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, n: int) -> RolloutBatch:
        """Return the chosen rows, n of each prompt (prompts, P), cut to the longest completion."""
        lengths = self.lengths[chosen]
        longest, group = int(lengths.max()), torch.arange(len(prompt_ids)).repeat_interleave(n)
        return RolloutBatch(
            prompt_ids=prompt_ids[group].to(lengths.device),
            prompt_mask=prompt_mask[group].to(lengths.device),
            completion_ids=self.ids[chosen, :longest],
            completion_mask=torch.arange(longest, device=lengths.device) < lengths[:, None],
            truncated=~self.ended[chosen],
            group_index=group.to(lengths.device),
            sampler_logps=self.logps[chosen, :longest],
        )


def _check_decodes(model: Any) -> None:
    """Raise a `ConfigError` unless a model can be called with a cache."""
    inner: Any = unwrap(model)
    if not hasattr(inner, "new_cache"):
        parameters = signature(getattr(inner, "forward", lambda: None)).parameters
        if "past_key_values" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            got = type(inner).__name__
            raise ConfigError(f"model: got a {got}, expected a Transformer or a causal language model of transformers")


def _special(tokenizer: Any, name: str) -> int | None:
    """Return the id of a tokenizer's special token, by Hugging Face's name or effml's, if it has one."""
    ids = (getattr(tokenizer, f"{name}{ending}", None) for ending in ("_token_id", "_id"))
    return next((i for i in ids if i is not None), None)
