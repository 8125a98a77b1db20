"""SOAP where people use it: a bare loop, and the Trainer of Hugging Face with checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effml_optim import SOAP, split_params
from torch import nn


def test_a_bare_loop_with_scheduler_clipping_and_accumulation() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = SOAP(split_params(model), lr=0.01, precondition_frequency=5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    losses = []
    for _ in range(60):
        total = 0.0
        for _ in range(2):
            x = torch.randn(64, 8)
            loss = nn.functional.mse_loss(model(x), teacher(x).detach()) / 2
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    assert losses[-1] < 0.2 * losses[0]
    assert max(rho for sides in optimizer.basis_staleness().values() for rho in sides.values()) < 0.5


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that count upwards from a random token."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(12) + index) % 32
        return {"input_ids": row, "labels": row}


def trainer(transformers: Any, folder: Path, steps: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    optimizer = SOAP(split_params(model), lr=0.01, precondition_frequency=3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        save_steps=5,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return transformers.Trainer(model, arguments, train_dataset=Tokens(), optimizers=(optimizer, schedule))


def test_hugging_face_trainer_learns_and_resumes_bit_identically(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    whole = trainer(transformers, tmp_path / "whole", steps=13)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    resumed = trainer(transformers, tmp_path / "resumed", steps=13)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == 13
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
