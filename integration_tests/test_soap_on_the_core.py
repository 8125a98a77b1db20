"""SOAP, Shampoo and Muon on the core's Transformer, loop and checkpoints, alone and under torchrun."""

import json
import os
import subprocess
import sys

import pytest
import torch
from effml_optim import SOAP, Muon, Shampoo, split_params
from effml_shared.checkpoint import Checkpoints
from effml_shared.data import ByteTokenizer, Loader, PackedDataset
from effml_shared.loop import Budget, Loop
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep, language_model_loss
from effml_shared.transformer import Transformer, TransformerConfig

TEXT = [f"{i} plus {i} is {2 * i}. " * 4 for i in range(80)]


def train(optimizer, samples, directory=None, dtype=torch.float32):
    config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24, vocab_size=258)
    model = Transformer(config).to(dtype)
    step = GradientStep(model, optimizer(split_params(model), lr=0.01), language_model_loss)
    data = Loader(PackedDataset(TEXT, ByteTokenizer(), 16))
    checkpoints = None if directory is None else Checkpoints(directory)
    loop = Loop(step, data, cosine(4, 120), budget=Budget(samples=samples), checkpoints=checkpoints)
    loop.run()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [SOAP, Shampoo, Muon])
def test_a_stopped_run_continues_bit_by_bit_across_a_refresh(optimizer, dtype, tmp_path):
    whole = train(optimizer, 100, dtype=dtype)
    train(optimizer, 52, tmp_path, dtype)  # 13 steps: between two refreshes
    resumed = train(optimizer, 100, tmp_path, dtype)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_experiment_on_two_processes_measures_what_one_measures(tmp_path):
    command = ["run", "optim.soap", "--preset", "smoke", "seeds=1", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-m", "effml_shared.cli", *command, str(tmp_path / "1")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    both = [*launcher, "-m", "effml_shared.cli", *command, str(tmp_path / "2")]
    for words in (alone, both):
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in "12")
    for name, result in one["trials"].items():
        # An inverse root of a nearly singular factor multiplies the rounding of a sum over ranks.
        tolerance = 1e-2 if name.startswith("Shampoo") else 1e-5
        assert two["trials"][name]["loss"] == pytest.approx(result["loss"], abs=tolerance)
        assert two["trials"][name]["steps"] == result["steps"]
