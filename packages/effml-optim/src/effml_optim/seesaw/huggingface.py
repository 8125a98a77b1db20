"""Hugging Face's `Trainer` on a `SeesawPlan`: one mixin.

The Trainer's own gradient accumulation cannot change during a run: its loop takes a step wherever the micro-batches of
the epoch so far are a multiple of `gradient_accumulation_steps`, whatever number of them `get_batch_samples` returned,
and it resumes by that multiple as well. So it is left at 1, and a step is one batch of changing size: the loader serves
it, `training_step` cuts it into micro-batches. Both are methods that the Trainer documents as meant to be overridden.

No state. Cost: a rank's whole batch is collated at once on the host, padded to its longest row. Source: derived here.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from effml_shared.errors import CheckpointError, ConfigError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from effml_optim.seesaw.training import SeesawBatchSampler, SeesawScheduler, split

__all__ = ["SeesawTrainerMixin"]

_LOADER_OPTIONS = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


class SeesawTrainerMixin:
    """Let `transformers.Trainer` follow a plan: `class SeesawTrainer(SeesawTrainerMixin, transformers.Trainer): ...`.

    Pass a `SeesawScheduler` as scheduler and `max_steps=plan.total_steps` among the arguments:

        trainer = SeesawTrainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, scheduler))

    Micro-batches are the scheduler's, `per_device_train_batch_size` is not used. To the Trainer, a run is one epoch of
    its loader; logging, evaluation, checkpoints and resuming are its own: resume with the same plan and as many ranks.
    For one process, DDP and FSDP; not for DeepSpeed, which steps after each backward pass.
    """

    args: Any
    accelerator: Any
    lr_scheduler: Any
    train_dataset: Any
    is_deepspeed_enabled: bool
    current_gradient_accumulation_steps: float

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of one batch per optimizer step, with the Trainer's own collation and workers.

        Raises:
            ConfigError: the scheduler is not a `SeesawScheduler`, or an argument does not go with one.
        """
        scheduler, args = self.lr_scheduler, self.args
        if not isinstance(scheduler, SeesawScheduler):
            raise ConfigError(f"optimizers: got the scheduler {type(scheduler).__name__}, expected a SeesawScheduler")
        for name, got, expected in (
            ("max_steps", args.max_steps, scheduler.plan.total_steps),
            ("gradient_accumulation_steps", args.gradient_accumulation_steps, 1),
            ("world_size", args.world_size, scheduler.world_size),
            ("ignore_data_skip", args.ignore_data_skip, False),
            ("fp16", args.fp16, False),  # after an overflow it steps neither optimizer nor scheduler
            ("deepspeed", self.is_deepspeed_enabled, False),
        ):
            if got != expected:
                raise ConfigError(f"TrainingArguments.{name}: got {got}, expected {expected} to follow a Seesaw plan")
        sampler = SeesawBatchSampler(
            scheduler.plan,
            self.train_dataset,
            micro_batch=None,
            rank=args.process_index,
            world_size=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        loader = super().get_train_dataloader()  # type: ignore[misc]
        options = {name: getattr(loader, name) for name in _LOADER_OPTIONS}
        return DataLoader(loader.dataset, batch_sampler=sampler, **options)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Back-propagate this rank's share of a step by micro-batches, each weighted by its rows.

        Raises:
            CheckpointError: the batch is not the one that the plan has at this sample.
        """
        scheduler, ranks, rank = self.lr_scheduler, self.args.world_size, self.args.process_index
        batch_size = scheduler.batch_size
        share = batch_size * (rank + 1) // ranks - batch_size * rank // ranks
        rows = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
        if rows != share:
            raise CheckpointError(
                f"batch: got {rows} rows, expected {share}: resume with the same plan, ranks and data"
            )
        parts = split(range(rows), scheduler.accumulation_steps)
        loss = torch.zeros((), device=self.args.device)
        for index, part in enumerate(parts):
            # What the Trainer divides a loss by that is a mean; token counts of the whole step it divides by itself.
            self.current_gradient_accumulation_steps = batch_size / (len(part) * ranks)
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(model=model):
                micro = {name: _rows(value, part, rows) for name, value in inputs.items()}
                loss += super().training_step(model, micro, num_items_in_batch)  # type: ignore[misc]
        return loss


def _rows(value: Any, part: Any, rows: int) -> Any:
    """Return the rows `part` of a value that has `rows` rows, any other value as it is."""
    return value[part.start : part.stop] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
