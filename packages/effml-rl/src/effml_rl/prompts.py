"""Prompts with their targets, in shuffled epochs, as data of `effml_shared.loop.Loop`.

Sample n depends on the seed and n alone, so that its position is one number in a checkpoint, and each rank gets a
contiguous slice of a step's prompts, which may be empty: see `effml_shared.data.Loader`, which does the counting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from effml_shared import distributed
from effml_shared.data import Batch, Loader
from effml_shared.errors import ConfigError, DataError
from numpy.typing import NDArray

__all__ = ["Prompt", "PromptData"]


class Prompt(NamedTuple):
    """What is asked, and what a verifier compares the answer with."""

    prompt: str | Sequence[int]  # text, or token ids
    target: Any = None

    @classmethod
    def of(cls, record: Any) -> Prompt:
        """Return the prompt of a record: a text, a (prompt, target) pair, or a mapping with `prompt` among its keys.

        A mapping's other columns are the target: a dict of them, or the value itself if there is only `target`.

        >>> Prompt.of({"prompt": "1 + 1 =", "target": "2"})
        Prompt(prompt='1 + 1 =', target='2')
        >>> Prompt.of({"prompt": "1 + 1 =", "answer": "2", "level": 1}).target
        {'answer': '2', 'level': 1}
        """
        if isinstance(record, str):
            return cls(record)
        if isinstance(record, Mapping) and "prompt" in record:
            columns = {name: value for name, value in record.items() if name != "prompt"}
            if not columns:
                return cls(record["prompt"])
            return cls(record["prompt"], columns["target"] if columns.keys() == {"target"} else columns)
        if isinstance(record, tuple) and len(record) == 2:
            return cls(*record)
        got = f"a mapping of {sorted(record)}" if isinstance(record, Mapping) else f"a {type(record).__name__}"
        raise ConfigError(f"record: got {got}, expected a text, a (prompt, target) pair or a mapping with 'prompt'")

    @classmethod
    def all_of(cls, records: Iterable[Any]) -> list[Prompt]:
        """Return the prompts of records; ConfigError for a single text, whose letters are no records."""
        if isinstance(records, str) or not isinstance(records, Iterable):
            raise ConfigError(f"prompts: got {records!r:.60}, expected a list of records")
        return [cls.of(record) for record in records]


class PromptData:
    """Serve prompts epoch after epoch.

    Args:
        records: see `Prompt.of`; all are kept in memory.
        seed: of the order.
        shuffle: False serves them in the order given.
        rank, world_size: which share; by default this process's.

    Raises:
        DataError: there is none. ConfigError: one is not a record.

    >>> data = PromptData([("1 + 1 =", "2"), ("1 + 2 =", "3")], shuffle=False)
    >>> [prompt.target for prompt in data.next(3)]
    ['2', '3', '2']
    """

    def __init__(
        self,
        records: Iterable[Any],
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.prompts = Prompt.all_of(records)
        if not self.prompts:
            raise DataError("records: got none, expected at least one prompt")
        self._loader = Loader(
            _Places(self.prompts),
            seed=seed,
            shuffle=shuffle,
            rank=distributed.rank() if rank is None else rank,
            world_size=distributed.world_size() if world_size is None else world_size,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def next(self, batch_size: int) -> list[Prompt]:
        """Return this rank's share of the next `batch_size` prompts."""
        return [self.prompts[place] for place in self._loader.next(batch_size)["places"].tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it counts."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; CheckpointError if it is one in other prompts or another order."""
        self._loader.load_state_dict(state)


class _Places:
    """A dataset of numbers: a batch of it is where its prompts stand."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        digest = hashlib.sha256()
        for text, _ in prompts:
            digest.update((text if isinstance(text, str) else repr([int(i) for i in text])).encode() + b"\0")
        self._length = len(prompts)
        self.fingerprint: dict[str, Any] = {"prompts": self._length, "digest": digest.hexdigest()}

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: NDArray[Any]) -> Batch:
        return {"places": torch.from_numpy(indices)}
