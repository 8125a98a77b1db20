"""Endless batches whose position is one number, so that a resumed run continues with the very next sample.

Sample `n` depends on the seed and `n` alone: not on batch sizes, which may change at every call, nor on the number of
ranks. Each rank gets a contiguous slice of the global batch, at most one row longer than another's and possibly empty.
Orders are drawn from raw bits, which unlike `permutation` and `randperm` never change between library releases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from effml_shared.data.corpora import DataConfig, read_documents
from effml_shared.data.packing import Batch, PackedDataset, collate_windows
from effml_shared.data.tokenizers import Tokenizer, load_tokenizer
from effml_shared.errors import CheckpointError, ConfigError, DataError
from effml_shared.seeding import derive_seed

__all__ = ["Loader", "Samples", "StreamingLoader", "open_data"]


class Samples(Protocol):
    """What `Loader` asks of a dataset; `PackedDataset` is one."""

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def batch(self, indices: NDArray[np.int64]) -> Batch: ...


class Loader:
    """Serve `dataset` epoch after epoch: sample `n` is entry `n % N` of the permutation of epoch `n // N`."""

    def __init__(
        self, dataset: Samples, *, seed: int = 0, rank: int = 0, world_size: int = 1, shuffle: bool = True
    ) -> None:
        self.dataset, self.seed, self.rank, self.world_size, self.shuffle = dataset, seed, rank, world_size, shuffle
        self.position = 0  # samples consumed, all ranks together
        self.fingerprint = {"seed": seed, "shuffle": shuffle, **dataset.fingerprint}
        self._order = (-1, np.arange(len(dataset)))  # the epoch permuted last

    def next(self, batch_size: int) -> Batch:
        """Return this rank's rows of the next `batch_size` samples, as `collate_windows` describes them."""
        rows = _rows_of(self.rank, self.world_size, batch_size)
        epochs, places = np.divmod(self.position + np.array(rows, np.int64), len(self.dataset))
        for epoch in np.unique(epochs) if self.shuffle else ():
            here = epochs == epoch
            places[here] = self._permutation(int(epoch))[places[here]]
        self.position += batch_size
        return self.dataset.batch(places)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            bits = np.random.PCG64(derive_seed(self.seed, "epoch", epoch)).random_raw(len(self.dataset))
            self._order = epoch, np.argsort(bits, kind="stable")
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it counts, as JSON values."""
        return {"position": self.position, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; CheckpointError if that was with other data or in another order."""
        _check_same(state.get("fingerprint", {}), self.fingerprint)
        self.position = state["position"]


class StreamingLoader:
    """Tokenise and pack documents as they are read: for what does not fit in memory.

    `documents()` starts the same documents from the beginning. A stream that ends starts again and its windows run on
    across the border. Sample `n` is drawn from `shuffle_buffer` windows that are held back; 1 keeps the order. Every
    rank reads the whole stream and keeps its rows: no rank waits for another, and reading costs as much on each.
    Resuming reads again, without tokenising, what the epoch had consumed, and compares its hash.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[str]],
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1,
    ) -> None:
        if seq_len < 2 or shuffle_buffer < 1:
            raise ConfigError(f"seq_len, shuffle_buffer: got {seq_len}, {shuffle_buffer}, expected integers >= 2 and 1")
        self.documents, self.tokenizer, self.seq_len = documents, tokenizer, seq_len
        self.seed, self.rank, self.world_size, self.shuffle_buffer = seed, rank, world_size, shuffle_buffer
        self.position = 0  # samples consumed, all ranks together
        order = {"seed": seed, "shuffle_buffer": shuffle_buffer}
        self.fingerprint = {**order, "seq_len": seq_len, "tokenizer": tokenizer.name}
        self._rest = np.empty((2, 0), np.int64)  # ids and the documents they belong to, not yet in a window
        self._held: list[NDArray[np.int64]] = []  # windows (2, seq) that wait for their draw
        self._start()

    def next(self, batch_size: int) -> Batch:
        """Return this rank's rows of the next `batch_size` samples; DataError if the stream is empty or damaged."""
        rows = _rows_of(self.rank, self.world_size, batch_size)
        windows = [window for row, window in enumerate(self._draw() for _ in range(batch_size)) if row in rows]
        return collate_windows(*np.array(windows, np.int64).reshape(-1, 2, self.seq_len).swapaxes(0, 1))

    def _draw(self) -> NDArray[np.int64]:
        while len(self._held) < self.shuffle_buffer:
            self._held.append(self._window())
        at = derive_seed(self.seed, "draw", self.position) % self.shuffle_buffer
        self._held[at], self._held[-1] = self._held[-1], self._held[at]
        self.position += 1
        return self._held.pop()

    def _window(self) -> NDArray[np.int64]:
        while self._rest.shape[1] < self.seq_len:
            ids = np.append(self.tokenizer.encode(self._read()), self.tokenizer.eos_id).astype(np.int64)
            owner = np.full_like(ids, self._rest[1, -1:].sum() + 1)  # one more than the last; none sums to 0
            self._rest = np.concatenate([self._rest, [ids, owner]], axis=1)
        window, self._rest = self._rest[:, : self.seq_len], self._rest[:, self.seq_len - 1 :]
        return window

    def _start(self) -> None:
        self._stream, self._consumed, self._digest = iter(self.documents()), 0, hashlib.sha256()

    def _read(self) -> str:
        for text in self._stream:
            self._consumed += 1
            self._digest.update(f"{text}\0".encode(errors="replace"))
            return text
        if not self._consumed:
            raise DataError("got a stream without documents, expected at least one")
        self._start()
        return self._read()

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values and the int64 tensors `rest` `(2, tokens)` and `held` `(windows, 2, seq)`."""
        read = {"documents": self._consumed, "digest": self._digest.hexdigest()}
        held = np.array(self._held, np.int64).reshape(-1, 2, self.seq_len)
        tensors = {"rest": torch.from_numpy(self._rest.copy()), "held": torch.from_numpy(held)}
        return {"position": self.position, "fingerprint": self.fingerprint, **read, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; CheckpointError if what was read by then has changed."""
        _check_same(state.get("fingerprint", {}), self.fingerprint)
        self._start()
        for _ in range(state["documents"]):
            self._read()
        _check_same(state, {"digest": self._digest.hexdigest()})
        self.position, self._rest, self._held = state["position"], state["rest"].numpy(), [*state["held"].numpy()]


def _rows_of(rank: int, world_size: int, batch_size: int) -> range:
    if batch_size < 1 or not 0 <= rank < world_size:
        got = f"{batch_size} for rank {rank} of {world_size}"
        raise ConfigError(f"batch_size: got {got}, expected an integer >= 1 for a rank in [0, world_size)")
    return range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


def _check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            use = "resume with the same data, or start a new run"
            raise CheckpointError(f"data {name}: got {value!r}, expected {saved.get(name)!r} of the checkpoint: {use}")


def open_data(
    config: DataConfig, *, rank: int = 0, world_size: int = 1
) -> tuple[Loader | StreamingLoader, PackedDataset]:
    """Return an endless loader of the training part and the held-out part, which holds the tokenizer too.

    Raises:
        DataError: corpus or tokenizer cannot be read, or a part is too small for one window.
    """
    tokenizer = load_tokenizer(config.tokenizer, eos_token=config.eos_token)
    first = replace(config, max_bytes=min(config.max_bytes or 1 << 26, 1 << 26)) if config.streaming else config
    held_out = PackedDataset(read_documents(first, "held_out"), tokenizer, config.seq_len)
    share: dict[str, Any] = {"seed": config.seed, "rank": rank, "world_size": world_size}
    if not config.streaming:
        train = PackedDataset(read_documents(config, "train"), tokenizer, config.seq_len)
        return Loader(train, **share), held_out
    documents = partial(read_documents, config, "train")
    share["shuffle_buffer"] = config.shuffle_buffer
    return StreamingLoader(documents, tokenizer, config.seq_len, **share), held_out
