"""Shuffled activations of a model that is run while a dictionary learns from them: nothing is ever stored.

Inputs come in blocks, each of which is run through the model when it is needed. Of the rows of block g a random part,
`mix`, waits for round g + 1; the rest is shuffled with what waited from block g - 1 and served in round g. So every row
is served once, neighbours in a text are two blocks apart, and any moment depends on two blocks alone: to resume, these
are computed again, and a checkpoint holds some numbers and no rows.

State: (1 + mix) blocks of rows. Cost beside the model's: 2 copies of each row. What is dropped: rows longer than
`norm_cap` times the median of their block, as the first token's often are, which would rule the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from effml_shared import distributed
from effml_shared.checks import check_count, check_range
from effml_shared.data.loader import Loader, Samples
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.seeding import derive_seed
from torch import Tensor

__all__ = ["ActivationBuffer"]


class ActivationBuffer:
    """Serve batches of rows, with a position that a run resumes from exactly.

    Under `torchrun` every rank runs the model on inputs of its own and serves its share of each batch; what is served
    depends on the number of ranks.

    Args:
        activations: rows (n, d) of a batch of inputs, such as a `ModuleActivations`; the same at every call.
        inputs: what the batches are drawn from, such as a `PackedDataset`; an epoch takes each once.
        block_inputs: inputs of a block, per rank: blocks of some hundred thousand rows mix well.
        forward_inputs: inputs that go through the model at once.
        mix: the part of a block that waits for the next one; 0: blocks are served one by one.
        norm_cap: see above; None: nothing is dropped.
        rescale: multiply all rows by one number, so that the mean of |x|^2 is d over the first block.
        seed: of the order.

    Attributes:
        scale: what rows were multiplied by, None before the first; for whatever is measured later.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        activations: Callable[[Any], Tensor],
        inputs: Samples,
        *,
        block_inputs: int = 1024,
        forward_inputs: int = 32,
        mix: float = 0.5,
        norm_cap: float | None = 10.0,
        rescale: bool = False,
        seed: int = 0,
    ) -> None:
        check_count("block_inputs", block_inputs, 1)
        check_count("forward_inputs", forward_inputs, 1)
        check_range("mix", mix, 0.0, 1.0)
        if norm_cap is not None and not norm_cap > 1:
            raise ConfigError(f"norm_cap: got {norm_cap}, expected a number above 1, or None")
        self.activations, self.block_inputs, self.forward_inputs = activations, block_inputs, forward_inputs
        self.mix, self.norm_cap, self.seed = mix, norm_cap, seed
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self._inputs = Loader(inputs, seed=seed, rank=self.rank, world_size=self.world_size)
        self.scale: float | None = None if rescale else 1.0
        options = {"block_inputs": block_inputs, "mix": mix, "norm_cap": norm_cap, "rescale": rescale}
        self.fingerprint = {**self._inputs.fingerprint, **options, "world_size": self.world_size}
        self._round, self._offset = 0, 0  # rounds begun, rows served of the last one
        self._rows: Tensor | None = None
        self._waiting: Tensor | None = None

    def next(self, batch_size: int) -> dict[str, Tensor]:
        """Return `{"x": (rows, d)}`, this rank's share of the next batch_size rows.

        Raises:
            ConfigError: the inputs of a block have no rows.
        """
        check_count("batch_size", batch_size, 1)
        wanted = batch_size * (self.rank + 1) // self.world_size - batch_size * self.rank // self.world_size
        pieces: list[Tensor] = []
        while wanted or not pieces:
            if self._rows is None or self._offset == len(self._rows):
                self._begin_round()
                continue
            pieces.append(self._rows[self._offset : self._offset + wanted])
            self._offset += len(pieces[-1])
            wanted -= len(pieces[-1])
        return {"x": torch.cat(pieces)}

    def _begin_round(self) -> None:
        now, later = self._block(self._round)
        rows = now if self._waiting is None else torch.cat([self._waiting, now])
        self._rows = rows[self._order("round", self._round, len(rows)).to(rows.device)]
        self._waiting, self._round, self._offset = later, self._round + 1, 0

    def _block(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a block that are served in its own round, and those that wait."""
        self._inputs.position = index * self.block_inputs * self.world_size
        parts = []
        for start in range(0, self.block_inputs, self.forward_inputs):
            count = min(self.forward_inputs, self.block_inputs - start)
            parts.append(self.activations(self._inputs.next(count * self.world_size)))
        rows = torch.cat(parts)
        if rows.ndim != 2 or not len(rows):
            raise ConfigError(f"activations: got shape {tuple(rows.shape)} of a block, expected (n, d) with n >= 1")
        if self.norm_cap is not None:
            norms = rows.norm(dim=1)
            rows = rows[norms <= self.norm_cap * norms.median()]
        if self.scale is None:
            squares, n_rows = distributed.reduce_sum(float(rows.double().square().sum()), float(len(rows)))
            if not squares:
                raise ConfigError("activations: got nothing but zeros in the first block, expected rows to rescale")
            self.scale = math.sqrt(rows.shape[1] * n_rows / squares)
        rows = rows[self._order("block", index, len(rows)).to(rows.device)] * self.scale
        waiting = math.floor(self.mix * len(rows))
        return rows[waiting:], rows[:waiting]

    def _order(self, name: str, index: int, size: int) -> Tensor:
        bits = np.random.PCG64(derive_seed(self.seed, name, index, self.rank)).random_raw(size)
        return torch.from_numpy(np.argsort(bits, kind="stable"))

    def state_dict(self) -> dict[str, Any]:
        """Return where each rank is, as JSON values; every rank must call this."""
        places = [0.0] * (2 * self.world_size)
        places[2 * self.rank : 2 * self.rank + 2] = [float(self._round), float(self._offset)]
        ranks = np.array(distributed.reduce_sum(*places), np.int64).reshape(-1, 2).tolist()
        return {"ranks": ranks, "scale": self.scale, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, by running the model on two blocks again.

        Raises:
            CheckpointError: that was with other inputs, options or another number of ranks.
        """
        saved = state.get("fingerprint", {})
        for name, value in self.fingerprint.items():
            if saved.get(name) != value:
                use = "resume with the same data, or start a new run"
                raise CheckpointError(
                    f"data {name}: got {value!r}, expected {saved.get(name)!r} of the checkpoint: {use}"
                )
        begun, offset = state["ranks"][self.rank]
        self.scale = state["scale"]
        self._rows = self._waiting = None
        self._round, self._offset = max(begun - 1, 0), 0
        if begun:
            self._waiting = self._block(begun - 2)[1] if begun > 1 else None
            self._begin_round()
            self._offset = offset
