"""The sweep: every sample where it belongs, stopped and continued, and generators that break their word."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from effml_rl.solution_tree import SolutionTreeTask
from effml_rl.verifiers.verdict import Verdict
from effml_rl.wall.correct_matrix import CorrectMatrix
from effml_rl.wall.temperature_sweep import LANGUAGE_TEMPERATURES, SYNTHETIC_TEMPERATURES, TemperatureSweep
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.seeding import derive_seed

TASK = SolutionTreeTask(n_states=6, n_actions=6, n_contexts=6, n_problem=6, len_range=(2, 3), n_irrelevant=0)
EXAMPLES = list(TASK.sample(10))
PROMPTS = [example.prompt for example in EXAMPLES]
TARGETS = [example.completion for example in EXAMPLES]
ANSWERS = dict(zip(PROMPTS, TARGETS, strict=True))


class Coin:
    """Right with a probability that falls with temperature, by prompt, temperature and sample number alone."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.calls: list[tuple[int, list[float], int]] = []
        self.stop_after = stop_after

    def right(self, prompt: str, temperature: float, sample: int) -> bool:
        return np.random.default_rng(derive_seed(0, prompt, temperature, sample)).random() > temperature / 2

    def __call__(self, prompts: Sequence[str], *, temperatures: Sequence[float], n: int) -> list[list[list[str]]]:
        if len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((len(prompts), list(temperatures), n))
        return [
            [[ANSWERS[p] if self.right(p, t, i) else "S 0" for i in range(n)] for p in prompts] for t in temperatures
        ]


def sweep(coin: Any = None, grid: Sequence[float] = (0.5, 1.0), **options: Any) -> TemperatureSweep:
    return TemperatureSweep(
        coin or Coin(), options.pop("verifier", TASK.verifier), grid, **({"n": 3, "group": 4} | options)
    )


def test_every_sample_is_where_it_belongs() -> None:
    coin = Coin()
    matrix = sweep(coin, greedy=True).run(PROMPTS, TARGETS)
    expected = [[[coin.right(p, t, i) for i in range(3)] for p in PROMPTS] for t in (0.5, 1.0)]
    assert matrix.outcomes.tolist() == np.array(expected, int).tolist()
    assert 0 < matrix.outcomes.mean() < 1
    assert matrix.greedy is not None
    assert matrix.greedy.tolist() == [1] * 10
    assert coin.calls == [(size, grid, n) for size in (4, 4, 2) for grid, n in (([0.5, 1.0], 3), ([0.0], 1))]


def test_a_stopped_sweep_goes_on_and_gives_the_same_matrix(tmp_path: Path) -> None:
    path = tmp_path / "matrix.safetensors"
    expected = sweep(greedy=True).run(PROMPTS, TARGETS)
    with pytest.raises(KeyboardInterrupt):
        sweep(Coin(stop_after=3), greedy=True).run(PROMPTS, TARGETS, path)
    with pytest.raises(CheckpointError, match=r"got no whole matrix"):
        CorrectMatrix.load(path)
    coin = Coin()
    matrix = sweep(coin, greedy=True).run(PROMPTS, TARGETS, path)
    assert len(coin.calls) == 4  # two of three groups
    again = Coin()
    for found in (matrix, CorrectMatrix.load(path), sweep(again, greedy=True).run(PROMPTS, TARGETS, path)):
        assert found.outcomes.tolist() == expected.outcomes.tolist()
        assert found.problems == expected.problems
    assert not again.calls


def test_a_file_of_another_sweep_is_kept_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "matrix.safetensors"
    sweep().run(PROMPTS, TARGETS, path)
    content = path.read_bytes()
    for other, prompts in (
        (sweep(n=4), PROMPTS),
        (sweep(grid=(0.5, 0.9)), PROMPTS),
        (sweep(greedy=True), PROMPTS),
        (sweep(), PROMPTS[::-1]),
    ):
        with pytest.raises(CheckpointError, match=r"got a sweep of other problems, temperatures or n"):
            other.run(prompts, TARGETS, path)
    assert path.read_bytes() == content


def test_temperature_0_is_drawn_once_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="effml_rl.wall.temperature_sweep"):
        matrix = sweep(grid=(0.0, 0.5)).run(PROMPTS, TARGETS)
    assert "one and the same sample 3 times" in caplog.text
    assert matrix.temperatures.tolist() == [0.5]
    assert matrix.greedy is not None
    caplog.clear()
    sweep(grid=(0.0, 0.5), n=1)
    assert not caplog.records


def test_what_cannot_be_scored_is_neither_right_nor_wrong() -> None:
    def broken(prompts: Sequence[str], completions: Sequence[str], targets: Sequence[str]) -> list[Verdict]:
        verdicts = TASK.verifier(prompts, completions, targets)
        verdicts[1] = Verdict(reward=None, status="sandbox_error", answer=None, detail="")
        return verdicts

    matrix = sweep(verifier=broken, group=10).run(PROMPTS, TARGETS)
    assert (matrix.outcomes == -1).sum(axis=(1, 2)).tolist() == [1, 1]
    assert matrix.outcomes[0, 0, 1] == -1


def test_the_same_samples_under_the_same_seeds() -> None:
    """With nothing learned, before and after are one matrix."""
    assert np.array_equal(sweep().run(PROMPTS, TARGETS).outcomes, sweep(group=1).run(PROMPTS, TARGETS).outcomes)


def test_the_grids_are_the_official_ones() -> None:
    assert (len(LANGUAGE_TEMPERATURES), len(SYNTHETIC_TEMPERATURES)) == (12, 13)
    for grid in (LANGUAGE_TEMPERATURES, SYNTHETIC_TEMPERATURES):
        assert sweep(grid=grid).temperatures == list(grid)


def test_broken_contracts_are_told() -> None:
    options: dict[str, Any]
    for options, message in (
        ({"coin": lambda prompts, *, temperatures, n: [[["x"]] * len(prompts)] * 2}, r"generate: got other counts"),
        ({"coin": lambda prompts, *, temperatures, n: [[["x"] * n] * len(prompts)]}, r"at each of 2 temperatures"),
        (
            {"coin": lambda prompts, *, temperatures, n: [[["x"] * n]] * 2},
            r"generate: got other counts .* expected 3 for each of 4",
        ),
        ({"verifier": lambda *_: []}, r"verifier: got 0 verdicts, expected 12"),
        ({"verifier": lambda *_: None}, r"verifier: got None, expected 12 verdicts"),
        ({"verifier": lambda *_: [Verdict(0.3, "scored")] * 12}, r"verifier: got the number 0.3"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep(**options).run(PROMPTS, TARGETS)
    for prompts, targets in (([], []), (PROMPTS, TARGETS[:3])):
        with pytest.raises(ConfigError, match=r"targets: got"):
            sweep().run(prompts, targets)
    for options, message in (
        ({"n": 0}, r"n: got 0"),
        ({"group": 0}, r"group: got 0"),
        ({"coin": 3}, r"generate: got a int, expected a function"),
        ({"grid": ()}, r"temperatures: got \[\]"),
        ({"grid": (0.0,)}, r"temperatures: got \[\]"),
        ({"grid": (0.5, 0.0)}, r"temperatures: got"),
        ({"grid": (-1.0,)}, r"temperatures: got"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep(**options)
