"""`rl.wall`: the kit, what must not change a policy, evaluation that no batch changes, the control that is exact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effml_rl.experiments.wall import experiment
from effml_rl.experiments.wall_evaluation import PRACTISED, TEST, Evaluation, matrix_file, sweep
from effml_rl.experiments.wall_results import BEFORE, CONTROL, FEW, MANY, MORE, Outcomes, results
from effml_rl.experiments.wall_setting import FineTuning, Reinforcement, Setting, World
from effml_rl.experiments.wall_training import fine_tune, reinforce
from effml_rl.solution_tree.path_verifier import PathVerifier
from effml_rl.verifiers.verdict import Verdict
from effml_rl.wall import CorrectMatrix, TemperatureSweep, coverage, distillation_index
from effml_shared.checkpoint import Checkpoints
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.runs import Run, Trial
from effml_shared.schedules import Clock
from effml_shared.testing.experiments import ExperimentKit
from torch import nn

SMOKE = experiment.configure("smoke")


class TestWallExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = (
        SMOKE.sft.steps + SMOKE.rl.steps + 2
    )  # inside the first GRPO, which needs the policy that was kept


def finished(path: Path, *overrides: str) -> Run:
    config = experiment.configure("smoke", overrides=["sft.steps=20", *overrides])
    run = Run.create(path, {"experiment": "rl.wall", "preset": "smoke"}, to_yaml(config))
    experiment.execute(config, run)
    return run


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A policy that was fine-tuned a little, in the smoke preset's world."""
    directory = tmp_path_factory.mktemp("policy")
    setting = Setting(SMOKE.world, SMOKE.model, SMOKE.rl, 1, directory)
    trial = Trial("fine-tuning", Checkpoints(directory / "checkpoints"), [])
    fine_tune(setting, SMOKE.sft, lambda model: 0.0, lambda model: {}, trial)
    return setting


def test_without_a_learning_rate_no_policy_changes_in_a_single_sample(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "rl.lr=0")
    for problems in (PRACTISED, TEST):
        found = {
            policy: CorrectMatrix.load(matrix_file(run.path / "outcomes", policy, problems, 1))
            for policy in (BEFORE, MORE, FEW, MANY)
        }
        rows = [found[BEFORE].index(temperature) for temperature in SMOKE.evaluation.temperatures]
        for policy in (MORE, FEW, MANY):
            assert np.array_equal(found[policy].outcomes, found[BEFORE].outcomes[rows])
    assert run.summary["effects"]["many"] == run.summary["effects"]["difference"] == [0.0]
    assert run.summary["effects"]["practised"] == run.summary["effects"]["few"] == [5.0]


def test_without_rewards_a_policy_stays_as_it_was_to_the_bit(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PathVerifier, prompts: Any, completions: list[str], targets: Any) -> list[Verdict]:
        return [Verdict.of(False) for _ in completions]

    monkeypatch.setattr(PathVerifier, "__call__", refuse)
    before = setting.policy().state_dict()

    def changed(model: nn.Module) -> dict[str, Any]:
        return {name: not torch.equal(after, before[name]) for name, after in model.state_dict().items()}

    trial = Trial("GRPO", Checkpoints(tmp_path / "checkpoints"), [])
    found = reinforce(setting, setting.few, changed, trial)["measured"]
    assert found == dict.fromkeys(before, False)


def test_outcomes_depend_neither_on_the_batch_nor_on_its_padding(setting: Setting) -> None:
    problems = setting.problems.test
    assert len(set(problems.lengths.tolist())) > 1
    one, many = (sweep(setting.sampler(setting.policy(), "x", rows), problems, [0.5, 1.0], 8) for rows in (1, 128))
    assert np.array_equal(one.outcomes, many.outcomes)
    assert 0 < one.outcomes.mean() < 1


def test_a_sweep_is_what_the_verifier_says_of_the_texts(setting: Setting) -> None:
    examples = list(setting.problems.test)
    sampler = setting.sampler(setting.policy(), "x", 4096)

    theirs = TemperatureSweep(sampler.completions, setting.task.verifier, [0.5, 1.0], 8).run(
        [example.prompt for example in examples], [example.completion for example in examples]
    )
    ours = sweep(sampler, setting.problems.test, [0.5, 1.0], 8)
    assert np.array_equal(ours.outcomes, theirs.outcomes)
    assert 0 < ours.outcomes.mean() < 1


def test_the_control_is_the_policy_with_larger_logits_sample_by_sample(setting: Setting) -> None:
    model, config = setting.policy(), Evaluation(temperatures=[0.5, 1.0], samples=64)
    examples = setting.problems.test
    whole = sweep(setting.sampler(model, "x", 4096), examples, config.all_temperatures, 64)
    with torch.no_grad():
        model.lm_head.weight.mul_(config.control)  # type: ignore[union-attr]
    scaled = sweep(setting.sampler(model, "x", 4096), examples, config.temperatures, 64)
    rows = [whole.index(temperature) for temperature in config.control_temperatures]
    assert np.array_equal(scaled.outcomes, whole.outcomes[rows])


def test_known_paths_are_those_whose_every_pair_was_often_shown(setting: Setting) -> None:
    shown: Counter[tuple[int, int]] = Counter()
    for example in setting.problems.sft:
        shown.update(zip(example.states, example.actions, strict=False))
    expected = [
        all(shown[pair] >= SMOKE.world.known for pair in zip(example.states, example.actions, strict=False))
        for example in setting.problems.test
    ]
    assert setting.known(setting.problems.test).tolist() == expected


def matrix(*correct: tuple[int, ...], n: int = 10) -> CorrectMatrix:
    """Outcomes with so many right samples per temperature (0.5 and 1) and problem."""
    outcomes = np.arange(n) < np.array(correct)[..., None]
    return CorrectMatrix(np.array([0.5, 1.0]), outcomes.astype(np.int8))


def test_effects_are_those_of_matrices_made_by_hand() -> None:
    config = Evaluation(temperatures=[0.5, 1.0], samples=10)
    grid = {BEFORE: matrix((8, 4, 0, 0), (4, 2, 0, 0)), CONTROL: matrix((8, 4, 0, 0), (8, 4, 0, 0))}
    few, many = matrix((10, 9, 0, 0), (10, 8, 0, 0)), matrix((9, 6, 1, 0), (9, 6, 0, 0))
    matrices = grid | {MORE: grid[BEFORE], FEW: few, MANY: many}
    known = np.array([True, True, False, False])
    seed = {problems: Outcomes(matrices, grid[BEFORE], known) for problems in (PRACTISED, TEST)}
    measured = {p: dict.fromkeys(("plan", "execute", "verify", "shortcuts"), 0.5) for p in (BEFORE, MORE, FEW, MANY)}
    found = results([seed, None], [measured, dict.fromkeys(measured)], config)
    effects = {name: values[0] for name, values in found["effects"].items()}
    assert effects["distillation"] == pytest.approx(0.4 * 30 - 5)  # over the two problems that were solved
    assert effects["control"] == pytest.approx(0.4 * 30)
    rows = {(row["problems"], row["policy"]): row for row in found["table"]}
    assert rows[PRACTISED, FEW]["removed (DI)"] == pytest.approx(distillation_index(grid[BEFORE], few))
    assert effects["accuracy"] == pytest.approx(100 * (1.9 - 1.2) / 4)
    assert effects["practised"] == effects["few"] == pytest.approx(5.0)
    assert effects["many"] == effects["difference"] == pytest.approx(25.0)
    assert all(values[1] is None for values in found["effects"].values())
    assert found["known"][MANY] == {"known": [1.0, None], "unknown": [0.5, None]}
    assert found["sorted"][TEST][FEW][0] == [1.0, 0.9, 0.0, 0.0]
    assert sum(found["changes"][TEST][MANY]["delta"]) == pytest.approx(0.9)
    assert found["curves"][TEST][FEW]["coverage"] == [coverage(few).tolist(), None]
    assert [(row["problems"], row["policy"]) for row in found["table"]][:2] == [
        (PRACTISED, BEFORE),
        (PRACTISED, CONTROL),
    ]


def test_the_kinds_of_settings_of_the_gpu_preset_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "rl.epochs=2", "rl.kl=0.001", "rl.entropy=0.001", "world.irrelevant=4")
    assert run.summary["status"] == "finished"
    assert experiment.configure("gpu").world.task(1).prompt_length == 65


@pytest.mark.parametrize("field", ["sft.lr", "rl.lr"])
def test_a_divergence_leaves_claims_open(tmp_path: Path, field: str) -> None:
    run = finished(tmp_path / "run", f"{field}=1e34", "sft.clip_norm=1e30", "rl.clip_norm=1e30")
    assert run.summary["effects"]["practised"] == [None] or field == "rl.lr"
    assert all(claim["verdict"] == "inconclusive" for claim in run.summary["claims"])
    assert experiment.figures(run.metrics(), run.summary)


def test_fine_tuning_stops_at_an_accuracy_and_does_not_go_on_from_there(tmp_path: Path) -> None:
    setting = Setting(SMOKE.world, SMOKE.model, SMOKE.rl, 1, tmp_path)
    config = FineTuning(steps=20, batch_size=4, until=0.5, evaluate_every=2)
    trial = Trial("fine-tuning", Checkpoints(tmp_path / "checkpoints"), [])
    accuracies = iter([0.1, 0.4, 0.6])  # asked for more it would raise
    steps = [fine_tune(setting, config, lambda model: next(accuracies), lambda model: {}, trial) for _ in range(2)]
    assert [of["steps"] for of in steps] == [6, 6]


def test_the_rate_rises_and_falls_linearly() -> None:
    config = FineTuning(steps=10, batch_size=8, warmup=0.2)
    factors = [config.plan(Clock(samples=8 * step)).lr_factor for step in range(10)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, *(value / 8 for value in (7, 6, 5, 4, 3, 2, 1))])
    assert FineTuning(steps=1, warmup=0.0).plan(Clock()).lr_factor == 1.0


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        (World, {"size": 0}, "n_states"),
        (World, {"shortest": 4}, "len_range"),
        (World, {"known": 0}, "known"),
        (FineTuning, {"steps": 0}, "steps"),
        (FineTuning, {"clip_norm": 0.0}, "clip_norm"),
        (FineTuning, {"until": 1.1}, "until"),
        (Reinforcement, {"completions": 1}, "samples"),
        (Reinforcement, {"many": 32}, "many"),
        (Evaluation, {"temperatures": [0.5]}, "temperatures"),
        (Evaluation, {"temperatures": [1.0, 0.5]}, "temperatures"),
        (Evaluation, {"control": 1.0}, "control"),
        (Evaluation, {"samples": 1}, "samples"),
    ],
)
def test_wrong_fields_are_named(kind: type, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}"):
        kind(**fields)
