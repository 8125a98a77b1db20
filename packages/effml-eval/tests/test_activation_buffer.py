from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_eval.activations.activation_buffer import ActivationBuffer
from effml_eval.activations.hook_points import ModuleActivations
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.training import EmbeddingRows, SAETrainingConfig, train_sae
from effml_shared import distributed
from effml_shared.data.packing import PackedDataset
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import CheckpointError, ConfigError, Interrupted
from effml_shared.loop import Hook
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor

INPUTS = 40


class Numbered:
    """Each input gives 3 rows (number of the input, number of the row), or as many as `sizes` says."""

    def __init__(self, sizes: Any = lambda number: 3) -> None:
        self.sizes, self.inputs = sizes, list[int]()

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        numbers = [int(number) for number in batch["x"][:, 0]]
        self.inputs += numbers
        rows = [[number + 1.0, place + 1.0] for number in numbers for place in range(self.sizes(number))]
        return torch.tensor(rows).reshape(-1, 2)


def inputs() -> Any:
    return EmbeddingRows(torch.arange(INPUTS, dtype=torch.float32)[:, None])


def buffer(activations: Any = None, **options: Any) -> ActivationBuffer:
    options = {"block_inputs": 10, "forward_inputs": 4, "norm_cap": None, **options}
    return ActivationBuffer(activations or Numbered(), inputs(), **options)


def drawn(source: ActivationBuffer, *sizes: int) -> list[tuple[float, ...]]:
    return [tuple(row) for size in sizes for row in source.next(size)["x"].tolist()]


def test_every_row_is_served_once_an_epoch() -> None:
    source = buffer(mix=0.0)
    for _ in range(3):
        rows = drawn(source, *[30] * 4)
        assert sorted(rows) == [(number + 1.0, place + 1.0) for number in range(INPUTS) for place in range(3)]


def test_rows_wait_for_at_most_one_block() -> None:
    calls = Numbered()
    source = buffer(calls, mix=0.4)
    rows = [drawn(source, size) for size in (18, 30, 30, 30)]  # 12 of the first 30 wait
    blocks = [set(calls.inputs[i : i + 10]) for i in range(0, 40, 10)]
    for i, served in enumerate(rows):
        owners = [int(number) - 1 for number, _ in served]
        assert sum(owner in blocks[i] for owner in owners) == 18
        assert sum(owner in blocks[i - 1] for owner in owners) == (12 if i else 0)
    assert len({row for served in rows for row in served}) == 108
    mixed = [int(number) - 1 in blocks[1] for number, _ in rows[1]]
    assert mixed != sorted(mixed)
    assert mixed != sorted(mixed, reverse=True)


def test_what_is_served_does_not_depend_on_how_it_is_asked_for() -> None:
    expected = drawn(buffer(), 150)
    assert drawn(buffer(), *[7] * 21, 3) == expected
    assert drawn(buffer(forward_inputs=1), 1, 149) == expected
    assert drawn(buffer(forward_inputs=100), 150) == expected
    assert drawn(buffer(seed=1), 150) != expected


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("served", [0, 1, 15, 16, 45, 46, 200])
def test_resumes_exactly(served: int, mix: float) -> None:
    def sizes(number: int) -> int:
        return number % 4 + 1

    source = buffer(Numbered(sizes), mix=mix, rescale=True)
    drawn(source, *[1] * served)
    state = json.loads(json.dumps(source.state_dict()))
    calls = Numbered(sizes)
    again = buffer(calls, mix=mix, rescale=True)
    drawn(again, 5)
    calls.inputs.clear()
    again.load_state_dict(state)
    assert len(calls.inputs) <= 20  # two blocks
    assert drawn(again, 70) == drawn(source, 70)
    assert again.scale == source.scale


def test_long_rows_are_dropped() -> None:
    def activations(batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        return torch.where(x == 3, 1000.0, 1 + x / 100)

    rows = drawn(buffer(activations, norm_cap=10.0, mix=0.0), 39)
    assert max(rows) < (2.0,)
    assert (1000.0,) in drawn(buffer(activations, mix=0.0), 40)


def test_rescaling_follows_the_first_block() -> None:
    source, plain = buffer(mix=0.0, rescale=True), buffer(mix=0.0)
    assert source.scale is None
    x, before = source.next(30)["x"], plain.next(30)["x"]
    assert float(x.square().sum(1).mean()) == pytest.approx(2.0)
    assert source.scale is not None
    torch.testing.assert_close(x, before * source.scale)
    scale = source.scale
    drawn(source, 60)
    assert (source.scale, plain.scale) == (scale, 1.0)


class Stop(Hook):
    def on_step(self, loop: Any, metrics: Any) -> None:
        if loop.clock.step == 5:
            loop._on_signal(2)


def of_a_model() -> ActivationBuffer:
    sizes: dict[str, Any] = {"n_layers": 2, "d_model": 8, "n_heads": 1, "d_ff": 8, "vocab_size": 258}
    activations = ModuleActivations(Transformer(TransformerConfig(**sizes)), "model.layers.0")
    windows = PackedDataset(["It was the best of times, it was the worst of times. " * 9], ByteTokenizer(), 8)
    return ActivationBuffer(activations, windows, block_inputs=6, forward_inputs=4, rescale=True)


def test_a_dictionary_learns_from_a_model_and_resumes(tmp_path: Path) -> None:
    def build(seed: int) -> SparseAutoencoder:
        return SparseAutoencoder(SAEConfig(d_in=8, n_concepts=16, k=2, kind="topk", seed=seed))

    config = SAETrainingConfig(steps=9, batch_size=24, lr=1e-2)
    whole, again = build(0), build(1)
    train_sae(whole, of_a_model(), config)
    with pytest.raises(Interrupted):
        train_sae(build(0), of_a_model(), config, hooks=[Stop()], directory=tmp_path)
    train_sae(again, of_a_model(), config, directory=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def in_each_process(directory: Path) -> None:
    with distributed.launched():
        source = buffer(Numbered(lambda number: number % 3 + 1))
        before = drawn(source, 9, 24)
        state = source.state_dict()
        after = drawn(source, 31)
        again = buffer(Numbered(lambda number: number % 3 + 1))
        again.load_state_dict(state)
        assert drawn(again, 31) == after
        (directory / f"{distributed.rank()}.json").write_text(json.dumps({"rows": before + after, "state": state}))


@pytest.mark.slow
def test_processes_share_the_inputs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["state"] == second["state"]
    assert [len(first["rows"]), len(second["rows"])] == [4 + 12 + 15, 5 + 12 + 16]
    assert not {tuple(row) for row in first["rows"]} & {tuple(row) for row in second["rows"]}
    with pytest.raises(CheckpointError, match=r"data world_size: got 1, expected 2 of the checkpoint"):
        buffer().load_state_dict(first["state"])


# Bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_inputs": 0}, r"block_inputs: got 0"),
        ({"forward_inputs": 0}, r"forward_inputs: got 0"),
        ({"mix": 1.0}, r"mix: got 1.0, expected a number in \[0.0, 1.0\)"),
        ({"norm_cap": 1.0}, r"norm_cap: got 1.0, expected a number above 1"),
    ],
)
def test_refuses_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        buffer(**options)


def test_refuses_activations_that_are_no_rows() -> None:
    with pytest.raises(ConfigError, match=r"activations: got shape \(0, 2\) of a block"):
        buffer(Numbered(lambda number: 0)).next(1)
    with pytest.raises(ConfigError, match=r"activations: got shape \(10,\) of a block"):
        buffer(lambda batch: batch["x"][:, 0]).next(1)
    with pytest.raises(ConfigError, match=r"activations: got nothing but zeros in the first block"):
        buffer(lambda batch: batch["x"] * 0, rescale=True).next(1)
    with pytest.raises(ConfigError, match=r"batch_size: got 0"):
        buffer().next(0)


def test_refuses_the_state_of_other_data() -> None:
    state = buffer().state_dict()
    with pytest.raises(CheckpointError, match=r"data mix: got 0.25, expected 0.5 of the checkpoint"):
        buffer(mix=0.25).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"data seed: got 3, expected 0 of the checkpoint"):
        buffer(seed=3).load_state_dict(state)


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
