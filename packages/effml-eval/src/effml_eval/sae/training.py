"""Train a sparse autoencoder on the one loop, or by hand with its `Step`; runs resume exactly.

A step is: forward, backward, removal of what normalisation would undo, clipping, optimizer, projection, threshold and
firing counters. State in a checkpoint: model with its buffers, optimizer, position of the data. Cost besides that of
the model: clipping and Adam pass over 2 C d parameters, some 40 bytes each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from effml_shared import distributed
from effml_shared.checkpoint import Checkpoints
from effml_shared.checks import check_count, check_range
from effml_shared.data.loader import Loader
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from effml_shared.loop import Budget, Data, Hook, Loop
from effml_shared.schedules import Clock, Plan, cosine
from numpy.typing import NDArray
from torch import Tensor, nn

from effml_eval.concepts.firing import Firing
from effml_eval.concepts.reconstruction import Reconstruction
from effml_eval.sae.autoencoder import SAEOutput, SparseAutoencoder
from effml_eval.sae.sparse_codes import SparseCodes

__all__ = ["DictionaryStep", "EmbeddingRows", "SAETrainingConfig", "TrainResult", "train_sae"]

_CALIBRATION = 16  # batches on which a threshold is measured


@dataclass
class SAETrainingConfig:
    """How a sparse autoencoder is trained."""

    steps: int = 10_000
    batch_size: int = 1024  # rows per step, over all ranks
    lr: float | None = None  # at its peak; None: 2e-4 / sqrt(C / 16384)
    betas: tuple[float, float] | None = None  # of Adam; None: (0.9, 0.999), for jumprelu (0, 0.999)
    warmup: float = 0.03  # fraction of the steps, linear; half a cosine to 0 follows
    clip_norm: float | None = 1.0
    seed: int = 0  # of the order of the rows
    save_every: float = 60.0  # seconds of training between checkpoints

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("batch_size", self.batch_size, 1)
        check_range("warmup", self.warmup, 0.0, 1.0)
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(f"lr: got {self.lr}, expected a number > 0")
        _check_clip(self.clip_norm)


@dataclass(frozen=True)
class TrainResult:
    """What training leaves besides the model: metrics of every step it took in this session, and how far it is."""

    history: list[dict[str, float]]
    clock: Clock


class EmbeddingRows:
    """Rows of a matrix (N, d) as samples for the shared `Loader`; a memory-mapped one is read row by row.

    Raises:
        ConfigError: not a matrix with at least one row.
    """

    def __init__(self, rows: Tensor | NDArray[Any]) -> None:
        if rows.ndim != 2 or not len(rows):
            raise ConfigError(f"rows: got shape {tuple(rows.shape)}, expected (N, d) with N >= 1")
        self.rows = rows
        first, last = self.batch(np.array([0, len(rows) - 1]))["x"].double().sum(1).tolist()
        self.fingerprint: dict[str, Any] = {"shape": list(rows.shape), "first": first, "last": last}

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return `{"x": (len(indices), d)}`."""
        if isinstance(self.rows, Tensor):
            return {"x": self.rows[torch.from_numpy(indices).to(self.rows.device)]}
        return {"x": torch.from_numpy(np.ascontiguousarray(self.rows[indices]))}


class DictionaryStep:
    """One update of a sparse autoencoder: a `Step` for the shared loop.

    Args:
        model: a `SparseAutoencoder`, or one wrapped in DDP.
        optimizer: any torch optimizer of its parameters; the plan's factor multiplies its groups' learning rates.
        clip_norm: largest global gradient norm. None: no clipping.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float | None = 1.0) -> None:
        _check_clip(clip_norm)
        self.model, self.optimizer, self.clip_norm = model, optimizer, clip_norm
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))

    @property
    def sae(self) -> SparseAutoencoder:
        """The autoencoder itself."""
        module = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        if not isinstance(module, SparseAutoencoder):
            raise ConfigError(
                f"model: got {type(module).__name__}, expected a SparseAutoencoder, or one wrapped in DDP"
            )
        return module

    def __call__(self, batch: Any, plan: Plan) -> dict[str, float]:
        """Update once from this rank's rows: a tensor (rows, d), or a batch that holds it as `x`.

        Returns `loss`, its parts, `l0`, `dead` (a fraction), `grad_norm` (before clipping), `lr` and `tokens` (rows).

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; nothing was updated.
        """
        x = _rows(batch)
        self.model.train()
        output: SAEOutput = self.model(x.to(self.sae.samples_since_fired.device, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        self.sae.before_step_()
        metrics = self._metrics(output, x.numel() // x.shape[-1])
        metrics["grad_norm"] = self._clip(metrics["loss"])
        for group in self.optimizer.param_groups:
            rate = group["initial_lr"] * plan.lr_factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.optimizer.step()
        self.sae.after_step_(output)
        return {**metrics, "lr": float(self.optimizer.param_groups[0]["lr"])}

    def _metrics(self, output: SAEOutput, rows: int) -> dict[str, float]:
        values = output.codes.values if isinstance(output.codes, SparseCodes) else output.codes
        names = ["loss", *output.losses, "l0", "tokens"]
        parts = [output.loss.detach(), *output.losses.values(), (values.detach() > 0).sum()]
        sums = distributed.reduce_sum(*map(float, parts), float(rows))
        metrics = dict(zip(names, sums, strict=True))
        for name in ("loss", *output.losses):
            metrics[name] /= distributed.world_size()
        metrics["l0"] /= max(metrics["tokens"], 1.0)
        metrics["dead"] = float(self.sae.dead.float().mean())
        return metrics

    def _clip(self, loss: float) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total.full_tensor() if distributed.is_sharded(total) else total)  # FSDP2's is one rank's part
        if not math.isfinite(norm) or not math.isfinite(loss):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"non-finite loss ({loss}) or gradient ({norm}); lower the learning rate")
        if self.clip_norm is not None and norm > self.clip_norm:
            torch._foreach_mul_(gradients, self.clip_norm / (norm + 1e-6))
        return norm

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Return `r2`, `l0` and `dead` (fraction that never fired) over batches of rows (N, d), in eval mode.

        Every rank reads all batches.
        """
        sae, training = self.sae, self.model.training
        meter, firing = Reconstruction(), Firing(sae.config.concepts, device=sae.samples_since_fired.device)
        sae.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    x = _rows(batch).to(sae.samples_since_fired.device)
                    output = sae(x)
                    meter.update(x, output.x_hat)
                    firing.update(output.codes)
        finally:
            self.model.train(training)
        return {"r2": meter.r2(), "l0": firing.l0, "dead": float((firing.counts == 0).double().mean())}

    def state_dict(self) -> dict[str, Any]:
        """Return model and optimizer."""
        return {"model": self.sae.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back a state.

        Raises:
            CheckpointError: the state belongs to another model.
        """
        try:
            self.sae.load_state_dict(state["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"checkpoint does not fit the model: {reason}") from None
        self.optimizer.load_state_dict(state["optimizer"])


def train_sae(
    sae: SparseAutoencoder,
    data: Data | Tensor,
    config: SAETrainingConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    held_out: Tensor | None = None,
    hooks: Sequence[Hook] = (),
    directory: str | Path | None = None,
) -> TrainResult:
    """Train a sparse autoencoder in place, and leave it in eval mode.

    BatchTopK's running threshold follows the number of steps; where the model's own `threshold_decay` is too slow for
    it, the threshold is measured on the next batches at the end.

    Args:
        sae: on its device. Under `torchrun`, every rank trains the same model on its share of each batch.
        data: rows (N, d), or whatever serves `{"x": (rows, d)}` to the shared loop.
        config: budget, batch and schedule.
        optimizer: of the model's parameters. None: Adam, as the config says.
        held_out: rows that the model is evaluated on at the end (`r2`, `l0`, `dead`), in the last entry of the history.
        hooks: more of them for the loop.
        directory: checkpoints go there, and the newest one there is continued. None: nothing is saved.

    Raises:
        ConfigError: data and model do not fit.
        NonFiniteError: the training diverged.
    """
    fitting = min(0.999, max(0.0, 1 - 30 / config.steps))  # forgets the start of the training, in which it is higher
    if sae.config.threshold_decay is None:
        sae.threshold_decay = fitting
    model = distributed.parallelize(sae, "ddp")
    step = DictionaryStep(model, optimizer or _adam(sae, config), clip_norm=config.clip_norm)
    history = _History()
    total = config.steps * config.batch_size
    loop = Loop(
        step,
        _loader(data, config) if isinstance(data, Tensor) else data,
        cosine(config.batch_size, total, warmup=int(config.warmup * config.steps) * config.batch_size),
        budget=Budget(samples=total),
        hooks=[history, *hooks],
        evaluate=None if held_out is None else lambda: step.evaluate(held_out.split(config.batch_size)),
        checkpoints=None if directory is None else Checkpoints(directory),
        save_every=config.save_every,
        seed=config.seed,
    )
    clock = loop.run()
    evaluation = dict(loop.evaluation)
    if sae.config.kind == "batch_topk" and sae.threshold_decay > fitting:
        sae.calibrate_threshold_(_rows(loop.data.next(config.batch_size)) for _ in range(_CALIBRATION))
        if held_out is not None:
            evaluation |= step.evaluate(held_out.split(config.batch_size))
    sae.eval()
    return TrainResult([*history.rows, *([evaluation] if held_out is not None else [])], clock)


def _rows(batch: Any) -> Tensor:
    return batch["x"] if isinstance(batch, Mapping) else batch


class _History(Hook):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self.rows.append({"step": loop.clock.step, **metrics})


def _adam(sae: SparseAutoencoder, config: SAETrainingConfig) -> torch.optim.Optimizer:
    lr = 2e-4 / math.sqrt(sae.config.concepts / 2**14) if config.lr is None else config.lr
    betas = config.betas or ((0.0 if sae.config.kind == "jumprelu" else 0.9), 0.999)
    return torch.optim.Adam(sae.parameters(), lr=lr, betas=betas, fused=True)


def _loader(rows: Tensor, config: SAETrainingConfig) -> Loader:
    samples: Any = EmbeddingRows(rows)
    return Loader(samples, seed=config.seed, rank=distributed.rank(), world_size=distributed.world_size())


def _check_clip(clip_norm: float | None) -> None:
    if clip_norm is not None and not clip_norm > 0:
        raise ConfigError(f"clip_norm: got {clip_norm}, expected a number > 0 or None")
