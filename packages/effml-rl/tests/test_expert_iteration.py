"""Expert Iteration: the exact map of a round, what is kept, from where it starts, resuming, and that it learns."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effml_rl.expert_iteration import ExpertIteration, ExpertIterationConfig
from effml_rl.prompts import PromptData
from effml_rl.rollout_batch import RolloutBatch
from effml_rl.sampler import Sampler
from effml_rl.supervised import SupervisedDataset, supervised_loss
from effml_rl.verifiers import Verdict, WordProblemMatch
from effml_shared import distributed
from effml_shared.checkpoint import Checkpoints
from effml_shared.data import Loader
from effml_shared.data.miniature import MINIATURE_FORMATS, MiniatureTokenizer, miniature_problems
from effml_shared.errors import CheckpointError, ConfigError, Interrupted
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep
from effml_shared.transformer import Transformer, TransformerConfig
from effml_shared.tree import read_tree, write_tree
from torch import Tensor, nn

F64 = torch.float64
EXACT = {"deduplicate": False, "epochs": 1, "batch_size": 10**6, "clip_norm": None, "keep_truncated": True}


class Tabular(nn.Module):
    """One logit per token, whatever came before."""

    def __init__(self, probabilities: Sequence[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities, dtype=F64).log())

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))

    @property
    def probabilities(self) -> list[float]:
        return self.logits.detach().softmax(0).tolist()


class ExactFit(torch.optim.Optimizer):
    """The maximum-likelihood softmax in one step: the gradient of the mean loss is p - target."""

    def __init__(self, model: Tabular) -> None:
        super().__init__(model.parameters(), {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (logits,) = self.param_groups[0]["params"]
        logits.copy_((logits.softmax(0) - logits.grad).clamp(min=1e-300).log())


class Proportional:
    """Samples that have exactly the model's proportions: infinite data, if `rows` divides."""

    def __init__(self, model: Tabular, rows: int, tails: dict[int, Sequence[Sequence[int]]] | None = None) -> None:
        self.model, self.rows, self.tails = model, rows, tails or {}

    def generate(self, prompts: Sequence[Sequence[int]], n: int, *, draw: int) -> RolloutBatch:
        counts = [p * self.rows for p in self.model.probabilities]
        assert all(abs(count - round(count)) < 1e-9 for count in counts)
        rows = []
        for token, tails in (self.tails or {key: [[]] for key in range(len(counts))}).items():
            count = counts[token]
            rows += [[token, *tails[i % len(tails)]] for i in range(round(count))]
        ids = torch.tensor(rows)
        prompt = torch.tensor(prompts).repeat_interleave(len(ids), 0)
        mask = torch.ones_like(ids, dtype=torch.bool)
        nothing = torch.zeros(len(ids), dtype=torch.int64)
        return RolloutBatch(prompt, torch.ones_like(prompt, dtype=torch.bool), ids, mask, nothing.bool(), nothing)

    def texts(self, batch: RolloutBatch) -> list[str]:
        return [" ".join(map(str, row)) for row in batch.completion_ids.tolist()]


def tabular(
    probabilities: Sequence[float], rewards: dict[str, float], rows: int, tails: Any = None, **config: Any
) -> tuple[Tabular, ExpertIteration]:
    def reward(prompts: Any, completions: Sequence[str], **_: Any) -> list[float]:
        return [rewards[text] for text in completions]

    model = Tabular(probabilities)
    settings = ExpertIterationConfig(**{**EXACT, **config})
    sampler = Proportional(model, rows, tails)
    return model, ExpertIteration(model, reward, settings, sampler=sampler, optimizer=ExactFit)


class TestExactRound:
    @pytest.mark.parametrize("continue_from_last", [False, True])
    def test_maps_pi_to_pi_r_and_is_idempotent(self, continue_from_last: bool) -> None:
        rewards = {"0": 1.0, "1": 0.0, "2": 1.0, "3": 0.0}
        model, iteration = tabular([0.1, 0.2, 0.3, 0.4], rewards, rows=40, continue_from_last=continue_from_last)
        for expected_share in (0.4, 1.0):
            metrics = iteration.step([([0], None)])
            assert model.probabilities == pytest.approx([0.25, 0.0, 0.75, 0.0], abs=1e-12)
            assert metrics["verified"] == pytest.approx(expected_share)
            assert metrics["kept"] == round(40 * expected_share)

    def test_formats_grow_with_their_accuracy(self) -> None:
        # The policy chooses the format, 0, 1 or 2; the token after it, not chosen by it, says right (3) or wrong (4).
        accuracy = {0: 10, 1: 9, 2: 1}  # of 10
        tails = {f: [[3]] * right + [[4]] * (10 - right) for f, right in accuracy.items()}
        rewards = {f"{f} {tail}": float(tail == 3) for f in accuracy for tail in (3, 4)}
        model, iteration = tabular([0.2, 0.15, 0.15, 0.25, 0.25], rewards, rows=200, tails=tails)
        iteration.step([([0], None)])
        kept = [40, 27, 3]
        formats = model.probabilities[:3]
        for share, count in zip(formats, kept, strict=True):
            assert share / sum(formats) == pytest.approx(count / 70, abs=1e-12)

    def test_deduplication_counts_a_canonical_text_once(self) -> None:
        tails = {0: [[2]], 1: [[3], [4], [5]]}
        rewards = {"0 2": 1.0, "1 3": 1.0, "1 4": 1.0, "1 5": 1.0}
        model, iteration = tabular([0.25, 0.25, 0.2, 0.1, 0.1, 0.1], rewards, rows=120, tails=tails, deduplicate=True)
        metrics = iteration.step([([0], None)])
        assert (metrics["kept"], metrics["duplicates"]) == (4, 56)
        assert model.probabilities[1] / model.probabilities[0] == pytest.approx(3, abs=1e-12)


def transformer() -> Transformer:
    return Transformer(TransformerConfig(vocab_size=8, d_model=16, n_layers=1, n_heads=2), seed=0)


class Words:
    """Ids as text; 7 ends."""

    eos_id, pad_id = 7, 7

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def starts_like_the_prompt(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
    """Judge nothing where the completion is empty."""
    return [float(c.split()[0] == p.split()[0]) if c else None for p, c in zip(prompts, completions, strict=True)]


def small(model: nn.Module | None = None, **config: Any) -> ExpertIteration:
    settings = {"samples": 32, "max_completion": 4, "epochs": 2, "batch_size": 8, "lr": 1e-2, "seed": 3, **config}
    return ExpertIteration(
        model or transformer(), starts_like_the_prompt, ExpertIterationConfig(**settings), tokenizer=Words()
    )


PROMPTS = [f"{a} {b}" for a in range(3) for b in range(4)]


def weights(iteration: ExpertIteration) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in iteration.model.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestRounds:
    def test_learns(self) -> None:
        iteration = small(continue_from_last=True, keep_truncated=True, epochs=4)
        shares = [iteration.step(PROMPTS)["verified"] for _ in range(4)]
        assert shares[0] < 0.2
        assert shares[-1] > 0.6

    def test_rows_do_not_depend_on_how_many_prompts_are_sampled_at_a_time(self) -> None:
        first, second = small(prompts_per_call=5), small(prompts_per_call=100)
        assert first.step(PROMPTS) == second.step(PROMPTS)
        assert equal(weights(first), weights(second))

    def test_starts_from_the_base_or_goes_on(self) -> None:
        for continue_from_last in (False, True):
            iteration = small(continue_from_last=continue_from_last, lr=0.0)
            iteration.step(PROMPTS)
            with torch.no_grad():
                for parameter in iteration.model.parameters():
                    parameter.add_(0.01)
            changed = weights(iteration)
            iteration.step(PROMPTS)
            assert equal(weights(iteration), changed if continue_from_last else list(transformer().parameters()))

    def test_nothing_verified_leaves_the_model_alone(self) -> None:
        iteration = small(min_reward=2.0)
        before = weights(iteration)
        metrics = iteration.step(PROMPTS)
        assert (metrics["kept"], iteration.round) == (0, 1)
        assert "loss" not in metrics
        assert equal(weights(iteration), before)

    def test_what_is_left_out(self) -> None:
        whole, cut, short = (small(**c).step(PROMPTS) for c in ({"keep_truncated": True}, {}, {"max_length": 4}))
        assert whole["truncated"] == cut["truncated"] > 0
        assert whole["kept"] > cut["kept"] > short["kept"] > 0
        assert short["kept"] + short["too_long"] == cut["kept"]

    def test_all_of_several_verifiers_must_accept(self) -> None:
        def never(prompts: Any, completions: Sequence[str], **_: Any) -> list[float]:
            return [0.0] * len(completions)

        both = ExpertIteration(
            transformer(), [starts_like_the_prompt, never], ExpertIterationConfig(samples=4), tokenizer=Words()
        )
        assert both.step(PROMPTS[:2])["kept"] == 0

    def test_targets_reach_the_verifier(self) -> None:
        class Verifier:
            def __call__(
                self, prompts: Sequence[str], completions: Sequence[str], targets: Sequence[Any]
            ) -> list[Verdict]:
                self.targets = list(targets)
                return [Verdict.of(False) for _ in completions]

        verifier = Verifier()
        config = ExpertIterationConfig(samples=2, max_completion=2)
        ExpertIteration(transformer(), verifier, config, tokenizer=Words()).step([("1 2", "a"), ("3", "b")])
        assert verifier.targets == ["a", "a", "b", "b"]


class Stop(Hook):
    """Kill the run in the middle of a round's fine-tuning, or at its first update."""

    def __init__(self, update: int) -> None:
        self.left = update

    def on_step(self, loop: Any, metrics: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted("stop", 15)


class TestResume:
    @pytest.mark.parametrize("update", [3, 9])
    @pytest.mark.parametrize("continue_from_last", [False, True])
    def test_a_killed_run_ends_where_another_one_does(
        self, tmp_path: Any, update: int, continue_from_last: bool
    ) -> None:
        whole, killed, resumed = (small(continue_from_last=continue_from_last) for _ in range(3))
        clock = whole.fit(PromptData(PROMPTS, seed=1), 3)
        killed.hooks.append(Stop(update))
        with pytest.raises(Interrupted, match=r"stopped in round \d; what is saved"):
            killed.fit(PromptData(PROMPTS, seed=1), 3, checkpoints=Checkpoints(tmp_path))
        again = resumed.fit(PromptData(PROMPTS, seed=1), 3, checkpoints=Checkpoints(tmp_path))
        assert equal(weights(whole), weights(resumed))
        assert (clock.step, clock.samples, whole.round) == (again.step, again.samples, resumed.round) == (3, 36, 3)

    def test_evaluates_after_every_round(self) -> None:
        iteration, seen = small(), []
        iteration.fit(PROMPTS, 2, evaluate=lambda: seen.append(iteration.round) or {})
        assert seen == [1, 2]

    def test_a_state_goes_from_one_object_to_another(self) -> None:
        first, second = small(), small()
        first.step(PROMPTS)
        with torch.no_grad():
            next(second.model.parameters()).mul_(math.pi)
        second.load_state_dict(first.state_dict())
        assert first.step(PROMPTS) == second.step(PROMPTS)
        assert equal(weights(first), weights(second))

    def test_states_of_the_two_kinds_do_not_mix(self) -> None:
        with pytest.raises(CheckpointError, match=r"continue_from_last: got a state of True"):
            small().load_state_dict(small(continue_from_last=True).state_dict())


def worker(out: str) -> None:
    """Do two rounds in every process of torchrun; the first one writes the weights."""
    with distributed.launched():
        model = distributed.parallelize(transformer(), "ddp")
        iteration = small(model)
        metrics = [iteration.step(PROMPTS[distributed.rank() :: distributed.world_size()]) for _ in range(2)]
        if distributed.is_main():
            write_tree(Path(out), {"model": iteration.state_dict()["model"], "metrics": metrics})


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "two")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = read_tree(tmp_path / "two"), small()
    metrics = [one.step(PROMPTS[0::2] + PROMPTS[1::2]) for _ in range(2)]
    for ours, theirs in zip(metrics, two["metrics"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for name, tensor in one.state_dict()["model"].items():
        torch.testing.assert_close(tensor, two["model"][name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_accurate_formats_of_a_mixture_take_over() -> None:
    # Two formats need copying only, prose needs arithmetic, which the model has not learnt: prose must give way.
    tokenizer, problems = MiniatureTokenizer(), miniature_problems()
    verifier = WordProblemMatch(None, MINIATURE_FORMATS)
    texts = [
        (problem.question, spec.render(problem))
        for i, spec in enumerate(MINIATURE_FORMATS)
        for problem in problems.problems(4000, start=4000 * i)
    ]
    rows = SupervisedDataset(
        [tokenizer.encode(question) for question, _ in texts],
        [[*tokenizer.encode(text), tokenizer.eos_id] for _, text in texts],
    )
    model = Transformer(TransformerConfig(vocab_size=tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4), seed=0)
    step = GradientStep(model, torch.optim.AdamW(model.parameters(), lr=2e-3), supervised_loss, clip_norm=1.0)
    samples = 64 * 250
    Loop(step, Loader(rows), cosine(64, samples, warmup=samples // 20), budget=Budget(samples=samples)).run()

    config = ExpertIterationConfig(samples=16, max_completion=24, lr=5e-4, batch_size=64)
    iteration = ExpertIteration(model, verifier, config, tokenizer=tokenizer)
    test = [problem for problem in problems.problems(64, "test") for _ in range(8)]

    def measure() -> tuple[float, float]:
        """Return the share of prose and the accuracy, over samples of the plain model."""
        sampler = Sampler(model, tokenizer, max_new_tokens=24, seed=5)
        answers = sampler.texts(sampler.generate([problem.question for problem in test[::8]], 8))
        verdicts = verifier([""] * len(test), answers, [problem.answer for problem in test])
        rewards = [verdict.reward or 0.0 for verdict in verdicts]
        return verifier.labels(answers).count("word_prose") / len(test), sum(rewards) / len(test)

    before = measure()
    metrics = iteration.step([(problem.question, problem.answer) for problem in problems.problems(96, start=20_000)])
    after = measure()
    assert metrics["duplicates"] > 0  # copying formats have one right text per problem
    assert before[0] > 0.25
    assert after[0] < 0.1
    assert after[1] > before[1] + 0.2


def test_frozen_models_texts_and_half_rounds_are_refused() -> None:
    config = ExpertIterationConfig(samples=2, max_completion=2, keep_truncated=True)
    model = transformer().requires_grad_(False)
    frozen = ExpertIteration(model, lambda completions: [1.0] * len(completions), config, tokenizer=Words())
    with pytest.raises(ConfigError, match=r"model: got one whose parameters are all frozen"):
        frozen.step(["1"])
    with pytest.raises(ConfigError, match=r"prompts: got 'a', expected a list of records"):
        frozen.step("a")
    with pytest.raises(ConfigError, match=r"rounds: got 1\.5, expected an integer"):
        frozen.fit(["a"], 1.5)  # type: ignore[arg-type]


def test_no_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: got none and no sampler"):
        ExpertIteration(transformer(), starts_like_the_prompt)


@pytest.mark.parametrize(
    "field",
    [
        *({"samples": 0}, {"epochs": 0}, {"batch_size": 0}, {"prompts_per_call": 0}, {"temperature": 0.0}),
        *({"lr": -1.0}, {"floor": 2.0}, {"warmup": 1.0}, {"max_length": 1}, {"micro_batch": 0}, {"clip_norm": 0.0}),
        *({"precision": "float16"}, {"max_completion": 0}),
    ],
)
def test_impossible_settings(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(field))}: got"):
        ExpertIterationConfig(**field)


if __name__ == "__main__":
    worker(sys.argv[1])
