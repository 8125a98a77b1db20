"""One step: what it must not change, what it must equal, and that the number of processes is no part of it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_rl.policy_config import PolicyConfig, dapo, grpo, ppo, reinforce_pp
from effml_rl.policy_step import PolicyStep
from effml_rl.prompts import Prompt, PromptData
from effml_rl.reference import Reference
from effml_rl.rollouts import Collector, VerifierScorer
from effml_rl.sampler import Sampler
from effml_rl.value_model import ValueModel
from effml_shared import distributed
from effml_shared.errors import ConfigError, EffmlError
from effml_shared.layers import Block
from effml_shared.schedules import Plan
from effml_shared.transformer import Transformer, TransformerConfig
from effml_shared.tree import read_tree, write_tree
from torch import Tensor, nn

LETTERS = "_$abcdefgh"
PROMPTS = ["ab", "cde", "f", "ghab", "ce"]
SMALL: dict[str, Any] = {"samples": 4, "max_completion": 4, "lr": 0.02}


class Letters:
    """`_` fills up, `$` ends."""

    eos_token_id, pad_token_id = 1, 0

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i] for i in ids)


def repeats(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Count the letters of the prompt."""
    return [float(sum(c in prompt for c in text)) for prompt, text in zip(prompts, completions, strict=True)]


def begins(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward a first letter out of the prompt: then prompts are often tied."""
    return [float(text[:1] in prompt) for prompt, text in zip(prompts, completions, strict=True)]


def transformer(dtype: torch.dtype = torch.float64) -> Transformer:
    config = TransformerConfig(n_layers=2, d_model=16, n_heads=2, d_ff=24, vocab_size=10)
    return Transformer(config, seed=3).to(dtype)


def make(config: PolicyConfig, verifier: Any = repeats, model: nn.Module | None = None, **options: Any) -> PolicyStep:
    model = transformer() if model is None else model
    sampler = Sampler(
        model, Letters(), temperature=config.temperature, max_new_tokens=config.max_completion, seed=config.seed
    )
    return PolicyStep(model, Collector(sampler, VerifierScorer(verifier), config), config, **options)


def weights(step: PolicyStep) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in step.model.parameters()])


def take(step: PolicyStep, prompts: Sequence[str] = PROMPTS, lr_factor: float = 1.0) -> dict[str, float]:
    return step(prompts, Plan(len(prompts), lr_factor))


def constant(value: float | None) -> Any:
    return lambda prompts, completions, **columns: [value] * len(completions)


@pytest.mark.parametrize("preset", [grpo, dapo, reinforce_pp, ppo])
@pytest.mark.parametrize("reward", [0.0, 0.3])
def test_equal_rewards_leave_every_bit(preset: Any, reward: float) -> None:
    """Even with momentum and weight decay in the optimizer. A critic makes nonzero advantages of a nonzero reward."""
    if preset is ppo and reward:
        return
    model = transformer(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    step = make(preset(**{**SMALL, "overlong_margin": None}), constant(reward), model, optimizer=optimizer)
    before = weights(step)
    metrics = [take(step) for _ in range(2)]
    assert weights(step).equal(before)
    assert all(m["skipped"] == 1 and m["policy_loss"] == m["grad_norm"] == 0 for m in metrics)


def test_a_rate_of_zero_leaves_every_bit() -> None:
    for config in (grpo(**SMALL, epochs=2, kl_loss=0.1), ppo(**SMALL, critic_lr=0.02)):
        step = make(config, model=transformer(torch.float32))
        before = weights(step)
        assert take(step, lr_factor=0.0)["grad_norm"] > 0
        assert weights(step).equal(before)


def test_ppo_with_lambda_one_and_no_value_is_reinforce() -> None:
    moved = []
    common = {**SMALL, "reduction": "token_mean", "clip_norm": None}
    for config in (
        ppo(**common, lam=1.0, whiten=False, reward_limit=None),
        PolicyConfig(**common, estimator="reinforce"),
    ):
        model = transformer()
        step = make(config, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
        before = weights(step)
        take(step)
        moved.append(weights(step) - before)
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(moved[0], moved[1], atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mini_batches": 3, "epochs": 2, "kl_loss": 0.1, "entropy": 0.01},
        {"mini_batches": 2, "kl_reward": 0.1, "estimator": "rloo", "mismatch": "truncate"},
        {"estimator": "gae", "epochs": 2, "kl_reward": 0.1},
        {"estimator": "batch_std", "reduction": "dr_grpo", "old_logps": "sampler", "mini_batches": 2},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_micro_batches_change_nothing(fields: dict[str, Any]) -> None:
    results = []
    for micro_batch in (None, 3):
        step = make(PolicyConfig(**{**SMALL, **fields, "micro_batch": micro_batch}))
        metrics = [take(step) for _ in range(2)]
        results.append((weights(step), metrics))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-10, rtol=0)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_completions_without_gradient_are_spared_and_change_nothing() -> None:
    """With a penalty of no weight worth mentioning, every row goes through the model; without one, few do."""

    def run(kl_loss: float) -> tuple[Tensor, list[int], float]:
        step = make(grpo(**SMALL, kl_loss=kl_loss, kl_kind="k2", reduction="token_mean"), begins)
        rows: list[int] = []
        step.model.register_forward_pre_hook(
            lambda module, args: rows.append(len(args[0])) if torch.is_grad_enabled() else None
        )
        metrics = take(step)
        return weights(step), rows, metrics["tied"]

    results = [run(kl_loss) for kl_loss in (0.0, 1e-300)]
    (few, passed, tied), (all_rows, everything, _) = results
    assert tied > 0
    assert max(passed) <= 20 * (1 - tied) < max(everything) == 20
    torch.testing.assert_close(few, all_rows, atol=1e-14, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_old_and_new_passes_have_equal_numerics(precision: str) -> None:
    """To the bit, if nothing is updated in between."""
    step = make(grpo(**SMALL, epochs=2, precision=precision), model=transformer(torch.float32))
    metrics = take(step, lr_factor=0.0)
    assert metrics["ratio"] == metrics["ratio_max"] == 1
    assert metrics["old_kl"] == 0


def test_old_log_probabilities_of_the_sampler_are_those_of_the_trainer() -> None:
    results = []
    for source in ("trainer", "sampler"):
        step = make(grpo(**SMALL, old_logps=source, epochs=2, mini_batches=2))
        metrics = take(step)
        results.append(weights(step))
        assert metrics["ratio"] == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=0)


def test_a_step_of_which_nothing_can_be_learnt_says_so() -> None:
    with pytest.raises(EffmlError, match=r"got 20 completions without a reward and 0 cut off .* of 20") as caught:
        take(make(grpo(**SMALL), constant(None)))
    assert "\n" not in str(caught.value)
    step = make(grpo(**SMALL, mask_truncated=True))
    step.collect.sampler.eos_token_ids = []  # type: ignore[attr-defined]
    with pytest.raises(EffmlError, match=r"got 0 completions without a reward and 20 cut off and masked"):
        take(step)


def test_dropped_prompts_leave_a_step_that_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    data = PromptData(PROMPTS)
    step = make(dapo(**SMALL), constant(1.0))
    step.refill = data.next
    before = weights(step)
    metrics = take(step)
    assert metrics["skipped"] == 1
    assert metrics["prompts"] == 20  # five, and three times as many in their place
    assert "all prompts are tied" in caplog.text
    assert weights(step).equal(before)
    step = make(reinforce_pp(**{**SMALL, "samples": 2}, refills=1), constant(1.0))
    assert take(step)["skipped"] == 1


def test_the_state_holds_what_the_next_step_depends_on(tmp_path: Path) -> None:
    config = ppo(**SMALL, critic_lr=0.02, kl_reward=0.1, epochs=2, mini_batches=2)
    step = make(config, model=transformer(torch.float32))
    for _ in range(2):
        take(step)
    write_tree(tmp_path / "state", step.state_dict())
    resumed = make(config, model=transformer(torch.float32))
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1)  # a reference copied from these weights would be wrong
    resumed.load_state_dict(read_tree(tmp_path / "state"))
    for _ in range(2):
        assert take(step) == take(resumed)
    assert weights(step).equal(weights(resumed))


def test_a_missing_critic_and_a_superfluous_one() -> None:
    with pytest.raises(ConfigError, match=r"critic: got one with estimator 'grpo'"):
        make(grpo(**SMALL), critic=ValueModel.of(transformer()))
    with pytest.raises(ConfigError, match=r"model: got one whose parameters are all frozen"):
        make(grpo(**SMALL), model=transformer().requires_grad_(False))


# Several processes

CONFIGS: dict[str, PolicyConfig] = {
    "dapo": dapo(**SMALL, epochs=2, mini_batches=2, micro_batch=3, clip_norm=0.5),
    "gae": ppo(**SMALL, critic_lr=0.02, kl_reward=0.1, mini_batches=2, micro_batch=2),
    "batch_std": PolicyConfig(**SMALL, estimator="batch_std", kl_loss=0.1, micro_batch=5, reduction="dr_grpo"),
}
SIZES = [3, 1, 5]  # of steps, in prompts: uneven, and once fewer than processes


def train(config: PolicyConfig, strategy: str) -> dict[str, Any]:
    """Train for a few steps; runs in every process. Returns weights and metrics."""
    torch.manual_seed(distributed.rank())
    plain = transformer()
    options: dict[str, Any] = {}
    if config.needs_reference:
        options["reference"] = Reference(plain, copy.deepcopy(plain))
    model = distributed.parallelize(plain, strategy, blocks=Block)
    if config.estimator == "gae":
        options["critic"] = distributed.parallelize(ValueModel.of(transformer()), strategy)
    step, data = make(config, begins if config.refills else repeats, model, **options), PromptData(PROMPTS)
    step.refill = data.next
    metrics = [step(data.next(size), Plan(size)) for size in SIZES]
    whole = [p.full_tensor() if distributed.is_sharded(p) else p for p in model.parameters()]
    dropped = ("explained_variance",)  # of a rank's own rows
    kept = [{name: value for name, value in row.items() if name not in dropped} for row in metrics]
    return {"weights": torch.cat([p.detach().flatten() for p in whole]).tolist(), "metrics": kept}


def worker() -> None:
    """Entry point under torchrun: where the results go, then strategies."""
    with distributed.launched():
        results = {s: {name: train(config, s) for name, config in CONFIGS.items()} for s in sys.argv[2:]}
        if distributed.is_main():
            Path(sys.argv[1]).write_text(json.dumps(results))


def launch(path: Path, *strategies: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(path), *strategies], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(strategy: str, tmp_path: Path) -> None:
    for name, got in launch(tmp_path / "results.json", strategy)[strategy].items():
        alone = train(CONFIGS[name], strategy)
        assert sum(row["grad_norm"] for row in alone["metrics"]) > 0
        assert (sum(row["prompts"] for row in alone["metrics"]) > sum(SIZES)) == (name == "dapo")  # it was refilled
        torch.testing.assert_close(torch.tensor(got["weights"]), torch.tensor(alone["weights"]), atol=1e-7, rtol=0)
        for one, other in zip(got["metrics"], alone["metrics"], strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_prompts_may_be_records() -> None:
    step = make(grpo(**SMALL))
    step([Prompt("ab", 1), {"prompt": "cd", "target": 2}], Plan(2))
    assert step.last is not None
    assert [prompt.target for prompt in step.last.prompts] == [1] * 4 + [2] * 4


if __name__ == "__main__":
    worker()
