"""Hugging Face's Trainer on a plan: the same steps and weights as a bare loop, resumed bit by bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_optim.seesaw.huggingface import SeesawTrainerMixin
from effml_optim.seesaw.plan import SeesawPlan
from effml_optim.seesaw.training import SeesawBatchSampler, SeesawScheduler
from effml_shared.errors import CheckpointError, ConfigError
from torch import nn
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PLAN = SeesawPlan.from_cosine(202, 16, 8, alpha=1.5, unit=4)  # its last step is short


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that count upwards from their index; every third is padded."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(12) + index) % 32
        labels = torch.where(torch.arange(12) < 6, row, -100) if index % 3 == 0 else row
        return {"input_ids": row, "labels": labels}


class MeanLoss(nn.Module):
    """A model whose loss is a mean over rows, which knows nothing of the counts that the Trainer has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(32, 16), nn.Linear(16, 32)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.out(self.embed(input_ids).mean(dim=1))
        return {"loss": nn.functional.cross_entropy(scores, input_ids[:, 0]), "logits": scores}


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))


class Recorder(transformers.TrainerCallback):
    """Record (samples, batch size, learning rate) before every update."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, float]] = []
        self.scheduler: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scheduler = self.scheduler
        self.steps.append((scheduler.samples, scheduler.batch_size, scheduler.get_last_lr()[0]))


class SeesawTrainer(SeesawTrainerMixin, transformers.Trainer):
    pass


def setup(model_of: Any) -> tuple[nn.Module, torch.optim.Optimizer, SeesawScheduler]:
    torch.manual_seed(0)
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, SeesawScheduler(optimizer, PLAN, micro_batch=4)


def make_trainer(folder: Path, model_of: Any = llama, **options: Any) -> Any:
    model, optimizer, scheduler = setup(model_of)
    arguments = {
        "max_steps": PLAN.total_steps,
        "max_grad_norm": 0.0,
        "save_steps": 15,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        **options,
    }
    recorder = Recorder()
    recorder.scheduler = scheduler
    return SeesawTrainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=Tokens(),
        optimizers=(optimizer, scheduler),
        callbacks=[recorder],
    )


def steps_of(trainer: Any) -> list[tuple[int, int, float]]:
    return trainer.pop_callback(Recorder).steps


def bare_weights(trainer: Any, model_of: Any) -> list[torch.Tensor]:
    """Train in a bare loop, each step from its whole batch at once, tokens counted as this Trainer counts them."""
    model, optimizer, scheduler = setup(model_of)
    sampler = SeesawBatchSampler(PLAN, 64, micro_batch=None, seed=5)
    for (batch,) in zip(DataLoader(Tokens(), batch_sampler=sampler), strict=True):
        _, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))  # older ones count unshifted labels
        loss = model(**batch, **({} if count is None else {"num_items_in_batch": count}))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return list(model.parameters())


@pytest.mark.parametrize("model_of", [llama, MeanLoss], ids=["token counts", "mean loss"])
def test_the_trainer_takes_the_steps_of_the_plan(model_of: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model_of, save_strategy="no")
    passes = []
    trainer.accelerator.backward, backward = (
        lambda loss: passes.append(loss) or backward(loss),
        trainer.accelerator.backward,
    )
    trainer.train()
    plan = [(row.first_sample + i * row.batch_size, row.batch_size) for row in PLAN.rows for i in range(row.steps)]
    traced = steps_of(trainer)
    assert traced == [(n, batch, 0.01 * PLAN.at(n).lr_factor) for n, batch in plan]
    assert len(passes) == sum(math.ceil(batch / 4) for _, batch in plan)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == [lr for *_, lr in traced]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for ours, bare in zip(trainer.model.parameters(), bare_weights(trainer, model_of), strict=True):
        torch.testing.assert_close(ours, bare, rtol=0, atol=2e-5)


def test_a_checkpoint_inside_the_ramp_continues_bit_by_bit(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert resumed.state.global_step == PLAN.total_steps
    steps = steps_of(whole)
    assert steps_of(resumed) == steps[15:]
    assert steps[15][1] > 8
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 7}, f"TrainingArguments.max_steps: got 7, expected {PLAN.total_steps} to follow a Seesaw plan"),
        ({"gradient_accumulation_steps": 2}, "TrainingArguments.gradient_accumulation_steps: got 2, expected 1 to"),
        ({"ignore_data_skip": True}, "TrainingArguments.ignore_data_skip: got True, expected False to"),
    ],
)
def test_arguments_that_do_not_go_with_a_plan_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make_trainer(tmp_path, MeanLoss, **options).train()
    assert str(error.value).startswith(message)


def test_another_scheduler_and_another_batch_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MeanLoss)
    inputs = {name: torch.stack([Tokens()[i][name] for i in range(7)]) for name in ("input_ids", "labels")}
    with pytest.raises(
        CheckpointError, match="batch: got 7 rows, expected 8: resume with the same plan, ranks and data"
    ):
        trainer.training_step(trainer.model, inputs)
    trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 5)
    with pytest.raises(ConfigError, match="optimizers: got the scheduler StepLR, expected a SeesawScheduler"):
        trainer.get_train_dataloader()
