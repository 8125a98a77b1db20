"""Trainers: learning for real in seconds, resuming to the bit, other people's models, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_rl.policy_config import PolicyConfig, dapo, dr_grpo, grpo, ppo, reinforce_pp, rloo
from effml_rl.prompts import PromptData
from effml_rl.rollouts import Rollouts
from effml_rl.sampler import Sampler
from effml_rl.trainers import GRPOTrainer, PPOTrainer, RLOOTrainer
from effml_rl.value_model import ValueModel
from effml_rl.verifiers import ExactMatch
from effml_shared.checkpoint import Checkpoints
from effml_shared.errors import ConfigError, Interrupted
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import cosine
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

LETTERS = "_$abcdefgh"
RECORDS = [("ab", "a"), ("cde", "c"), ("f", "f"), ("ghab", "g"), ("ce", "c"), ("hd", "h")]
SMALL: dict[str, Any] = {"samples": 8, "prompts_per_step": 4, "max_completion": 3, "lr": 0.01}


class Letters:
    """`_` fills up, `$` ends."""

    eos_token_id, pad_token_id = 1, 0

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i] for i in ids)


def repeats(prompts: Sequence[str], completions: Sequence[str], target: Sequence[str]) -> list[float]:
    """Give a third for each letter of the prompt."""
    return [sum(c in prompt for c in text) / 3 for prompt, text in zip(prompts, completions, strict=True)]


def transformer() -> Transformer:
    return Transformer(TransformerConfig(n_layers=1, d_model=32, n_heads=2, d_ff=48, vocab_size=10), seed=3)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class Log(Hook):
    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.rollouts: list[Rollouts] = []

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self.rewards.append(metrics["reward"])
        self.rollouts.append(loop.step.last)  # type: ignore[attr-defined]


class StopAt(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        if loop.clock.step == self.step:
            loop._on_signal(15)


@pytest.mark.parametrize(
    ("trainer", "config"),
    [
        (GRPOTrainer, grpo(**SMALL)),
        pytest.param(GRPOTrainer, dr_grpo(**SMALL, epochs=2, mini_batches=2, kl_loss=0.01), marks=pytest.mark.slow),
        (GRPOTrainer, dapo(**{**SMALL, "overlong_margin": None})),
        (GRPOTrainer, reinforce_pp(**{**SMALL, "samples": 8})),
        (RLOOTrainer, rloo(**SMALL)),
        (PPOTrainer, ppo(**{**SMALL, "samples": 8}, critic_lr=0.01, kl_reward=0.01)),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "estimator", "")),
)
def test_the_mean_reward_rises(trainer: Any, config: PolicyConfig) -> None:
    log = Log()
    made = trainer(transformer(), repeats, config, tokenizer=Letters(), hooks=[log])
    clock = made.fit(RECORDS, budget=Budget(steps=25))
    assert clock.samples == 100
    assert clock.tokens > 0
    assert sum(log.rewards[-5:]) / 5 > sum(log.rewards[:3]) / 3 + 0.3


def test_a_killed_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    config = ppo(**SMALL, critic_lr=0.01, kl_reward=0.05, epochs=2, mini_batches=2, micro_batch=3)
    config = PolicyConfig(**{**vars(config), "samples": 2, "refills": 1})
    results: list[Any] = []
    for stop in (None, 3):
        for hook in ([StopAt(stop)], []) if stop else ([],):
            torch.manual_seed(len(results))
            model = transformer()
            trainer = PPOTrainer(model, repeats, config, tokenizer=Letters())
            log = Log()
            try:
                trainer.fit(
                    PromptData(RECORDS, seed=5),
                    budget=Budget(samples=24),
                    schedule=cosine(4, 24),
                    checkpoints=Checkpoints(tmp_path / str(stop)),
                    save_every=1e9,
                    hooks=[log, *hook],
                )
            except Interrupted:
                continue
        results.append((weights(model), log.rewards[-3:], trainer._step.state_dict()["draw"]))
    assert results[0][0].equal(results[1][0])
    assert results[0][1:] == results[1][1:]


def test_steps_of_ones_own_equal_those_of_the_loop() -> None:
    config = grpo(**{**SMALL, "prompts_per_step": 3})
    ours, loops = transformer(), transformer()
    trainer = GRPOTrainer(ours, repeats, config, tokenizer=Letters())
    data = PromptData(RECORDS, seed=config.seed)
    for _ in range(3):
        prompts = data.next(3)
        metrics = trainer.step([prompt.prompt for prompt in prompts], [prompt.target for prompt in prompts])
    log = Log()
    GRPOTrainer(loops, repeats, config, tokenizer=Letters()).fit(RECORDS, budget=Budget(steps=3), hooks=[log])
    assert weights(ours).equal(weights(loops))
    assert metrics["reward"] == log.rewards[-1]


def test_a_state_is_put_back() -> None:
    config = grpo(**SMALL, kl_loss=0.1)
    one, other = (GRPOTrainer(transformer(), repeats, config, tokenizer=Letters()) for _ in range(2))
    one.step(RECORDS[:2])
    other.load_state_dict(one.state_dict())
    assert one.step(RECORDS[2:4]) == other.step(RECORDS[2:4])


def test_hooks_see_completions_and_verdicts() -> None:
    log = Log()
    trainer = GRPOTrainer(transformer(), ExactMatch(), grpo(**SMALL), tokenizer=Letters(), hooks=[log])
    trainer.fit(RECORDS, budget=Budget(steps=1))
    (seen,) = log.rollouts
    assert seen is trainer.last
    assert len(seen.completions) == len(seen.scores.verdicts[0]) == len(seen.prompts) == 32
    for prompt, text, verdict in zip(seen.prompts, seen.completions, seen.scores.verdicts[0], strict=True):
        assert verdict.reward == float(text == prompt.target)


def test_a_model_of_hugging_face_with_any_optimizer() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=10,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        attention_dropout=0.5,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.003)
    trainer = GRPOTrainer(
        model, repeats, grpo(**SMALL, kl_loss=0.01, epochs=2), tokenizer=Letters(), optimizer=optimizer
    )
    metrics = [trainer.step(RECORDS[:4]) for _ in range(8)]
    assert metrics[0]["ratio"] == pytest.approx(1, abs=0.2)  # its dropout is off
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_with_adapters_the_reference_is_the_base() -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=10
        )
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    trainer = GRPOTrainer(model, repeats, grpo(**SMALL, kl_loss=0.1), tokenizer=Letters())
    first, second = trainer.step(RECORDS[:4]), trainer.step(RECORDS[:4])
    assert first["kl_k3"] == pytest.approx(0, abs=1e-6)
    assert second["kl_k3"] > 0


def test_what_does_not_fit_is_named() -> None:
    model, tokenizer = transformer(), Letters()
    with pytest.raises(ConfigError, match=r"estimator: got 'gae', expected reinforce or .* with GRPOTrainer"):
        GRPOTrainer(model, repeats, ppo(), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"estimator: got 'grpo', expected gae with PPOTrainer"):
        PPOTrainer(model, repeats, grpo(), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"tokenizer: got none and no sampler"):
        GRPOTrainer(model, repeats)
    with pytest.raises(ConfigError, match=r"ref_model: got one with kl_loss and kl_reward at 0"):
        GRPOTrainer(model, repeats, tokenizer=tokenizer, ref_model=transformer())
    with pytest.raises(ConfigError, match=r"critic: got one with estimator 'grpo'"):
        GRPOTrainer(model, repeats, tokenizer=tokenizer, critic=ValueModel.of(model))
    for options in ({"temperature": 0.5}, {"max_new_tokens": 7}):
        sampler = Sampler(model, tokenizer, **options)
        with pytest.raises(ConfigError, match=r"sampler\.(temperature|max_new_tokens): got .* as in the config"):
            GRPOTrainer(model, repeats, sampler=sampler)
    for wrong in ({"model": None, "config": None}, {"model": model, "config": {"lr": 1e-3}}):
        with pytest.raises(ConfigError, match=r"model, config: got .*, expected a module and a PolicyConfig"):
            GRPOTrainer(verifier=repeats, tokenizer=tokenizer, **wrong)  # type: ignore[arg-type]
    trainer = GRPOTrainer(model, repeats, grpo(**SMALL), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"prompts: got 'ab', expected a list of records"):
        trainer.step("ab")
    with pytest.raises(ConfigError, match=r"targets: got 1 for 2 prompts"):
        trainer.step(["ab", "c"], ["a"])
    with pytest.raises(ConfigError, match=r"prompts: got none"):
        trainer.step([])
