"""One face for the causal models that can be asked for logits, with or without a memory of what they have read.

Three kinds are told apart by what they accept: those with `new_cache` (a `Transformer` and its relatives), those that
take `past_key_values` (the causal models of Hugging Face's transformers), and any other module that maps ids
(batch, seq) to logits (batch, seq, vocab). The first two read a prefix once and continue it in many ways; the last one
reads everything again for every new token, at O(seq^2) tokens for a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from effml_shared.errors import ConfigError
from effml_shared.generation import unwrap
from torch import Tensor, nn

__all__ = ["CausalModel", "Past", "right_pad"]


def right_pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return rows of ids, left-aligned, as (batch, longest) int64; id 0 fills up: no causal model sees what follows.

    >>> right_pad([[1, 2, 3], [4]]).tolist()
    [[1, 2, 3], [4, 0, 0]]
    """
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
    return ids


class Past(Protocol):
    """What a model remembers of the tokens it has read."""

    def extend(self, ids: Tensor, mask: Tensor | None = None, keep: int = 1) -> Tensor:
        """Read new tokens (batch, new) and return the logits of the last `keep` (0: of all), (batch, keep, vocab).

        mask: (batch, new), False at padding on the left; later tokens may be padded on the right, without a mask.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Make row i what row rows[i] was."""
        ...


class CausalModel:
    """Ask a model for logits.

    Raises:
        ConfigError: the model is known to look at what follows a token.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = unwrap(model)
        if not callable(model):
            raise ConfigError(f"model: got a {type(model).__name__}, expected a module from ids to logits")
        config: Any = getattr(self.model, "config", None)
        if getattr(config, "causal", True) is False or getattr(config, "is_encoder_decoder", False) is True:
            raise ConfigError(f"model: got a {type(model).__name__} that is not causal, expected one that is")
        self.accepts = frozenset(inspect.signature(getattr(self.model, "forward", self.model)).parameters)
        self.own_cache = hasattr(self.model, "new_cache")
        self.hugging_face = not self.own_cache and {"past_key_values", "attention_mask"} <= self.accepts
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocab_size = _count(text_config, "vocab_size")  # ids it can read, if it says so
        self.max_length = _count(text_config, "max_position_embeddings")  # tokens it was made for, if it says so

    @property
    def remembers(self) -> bool:
        """Whether a prefix, once read, can be continued without reading it again."""
        return self.own_cache or self.hugging_face

    @property
    def device(self) -> torch.device:
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise a `ConfigError` for an id that the model is known not to have, which would fault on a GPU."""
        if self.vocab_size is not None and ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            expected = f"0 to {self.vocab_size - 1}: is it the model's tokenizer?"
            raise ConfigError(f"token ids: got {min(ids)} to {max(ids)}, expected {expected}")

    def logits_at(self, ids: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Return the logits (n, vocab) of ids (batch, seq) at these rows and places (n), ids padded on the right.

        Where the model's head is a module that maps hidden states (batch, seq, dim), it is handed those n alone.
        """
        picked = False

        def pick(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            nonlocal picked
            picked = len(inputs) == 1 and inputs[0].ndim == 3 and inputs[0].shape[:2] == ids.shape
            return (inputs[0][rows, places][None],) if picked else None

        find = getattr(self.model, "get_output_embeddings", lambda: getattr(self.model, "lm_head", None))
        compiled = getattr(self.model, "_compiled_call_impl", None) is not None  # each new hook would compile it again
        head = None if compiled else find()
        handle = head.register_forward_pre_hook(pick) if isinstance(head, nn.Module) else None
        first = 0 if handle is not None or "logits_to_keep" not in self.accepts else int(places.min())
        options: dict[str, Any] = {"logits_to_keep": ids.shape[1] - first} if first else {}
        if self.hugging_face:
            options["use_cache"] = False
        try:
            output = self.model(ids, **options)
        finally:
            if handle is not None:
                handle.remove()
        if picked:
            return _logits(output, 1, len(rows))[0]
        return _logits(output, len(ids), ids.shape[1] - first)[rows, places - first]

    def past(self, max_len: int | None = None) -> Past:
        """Return an empty memory, for at most max_len tokens."""
        if self.own_cache:
            return _OwnPast(self.model, max_len)
        return _HuggingFacePast(self) if self.hugging_face else _Rereading(self)


def _logits(output: Any, batch: int, seq: int) -> Tensor:
    """Return the logits in a model's output, whose shape is checked."""
    logits: Any = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 3 or shape[:2] != (batch, seq):
        raise ConfigError(f"model: got logits of shape {shape}, expected ({batch}, {seq}, vocab)")
    return logits


def _count(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


class _OwnPast:
    def __init__(self, model: Any, max_len: int | None) -> None:
        self.model, self.cache = model, model.new_cache(max_len)

    def extend(self, ids: Tensor, mask: Tensor | None = None, keep: int = 1) -> Tensor:
        output = self.model(ids, attention_mask=mask, cache=self.cache, logits_to_keep=keep)
        return _logits(output, len(ids), keep or ids.shape[1])

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)


class _HuggingFacePast:
    """These models want the mask of all tokens at every call, and positions where padding shifts them."""

    def __init__(self, model: CausalModel) -> None:
        self.model = model
        self.cache: Any = None
        self.mask: Any = None

    def extend(self, ids: Tensor, mask: Tensor | None = None, keep: int = 1) -> Tensor:
        new = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
        self.mask = new if self.mask is None else torch.cat([self.mask, new], dim=1)
        options: dict[str, Any] = {"attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
        if "position_ids" in self.model.accepts:
            # Padding on the right of a short continuation may stand beyond the last position that a model knows.
            last = None if self.model.max_length is None else self.model.max_length - 1
            options["position_ids"] = (self.mask.cumsum(1) - 1).clamp(0, last)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.model.accepts:
            options["logits_to_keep"] = keep
        output = self.model.model(ids, **options)
        self.cache = output.past_key_values
        all_there = "logits_to_keep" not in self.model.accepts or keep == 0
        return _logits(output, len(ids), ids.shape[1] if all_there else keep)[:, -keep:]

    def select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]


class _Rereading:
    """Remember the tokens themselves; padding is left out, so that the model needs to know nothing of it."""

    def __init__(self, model: CausalModel) -> None:
        self.model = model
        self.rows: list[list[int]] = []

    def extend(self, ids: Tensor, mask: Tensor | None = None, keep: int = 1) -> Tensor:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        new = [row[shown].tolist() for row, shown in zip(ids, real, strict=True)]
        self.rows = [[*before, *more] for before, more in zip(self.rows or [[] for _ in new], new, strict=True)]
        count = keep or ids.shape[1]
        ends = torch.tensor([len(row) for row in self.rows], device=ids.device)
        places = (ends[:, None] - count + torch.arange(count, device=ids.device)).clamp(min=0)
        rows = torch.arange(len(new), device=ids.device).repeat_interleave(count)
        logits = self.model.logits_at(right_pad(self.rows).to(ids.device), rows, places.flatten())
        return logits.unflatten(0, (len(new), count))

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]
