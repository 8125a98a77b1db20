"""What `rl.wall` measures of a policy: right answers over temperatures, the three skills, the shortcuts' accuracy.

A sweep draws all temperatures of a problem from one reading of its prompt and compares token ids: right is what equals
the solution, its end included, which is what `PathVerifier` says of the text. Every policy of a seed draws with the
same uniform numbers, so that differences between policies carry less noise than either of them, and a policy that has
not changed has not changed in a single sample.

Plan and execute are means over samples of the test problems at temperature 1. Verify is the area under the ROC curve of
the mean log-probability of a solution's tokens, solutions against copies with one wrong state or action: the same ones
for every policy.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from effml_shared import distributed, seeding
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.generation import evaluating
from effml_shared.tensors import masked_mean
from torch import nn

from effml_rl.experiments.wall_setting import Setting
from effml_rl.rollout_batch import completion_mask
from effml_rl.sampler import Sampler
from effml_rl.solution_tree import corruptions, skills, verify_score
from effml_rl.solution_tree.examples import Examples
from effml_rl.token_logps import token_logps
from effml_rl.wall.correct_matrix import CorrectMatrix, check_temperatures

__all__ = ["PRACTISED", "TEST", "Evaluation", "matrix_file", "measure", "shortcut_accuracy", "sweep"]

PRACTISED, TEST = "practised", "test"  # the problems that both policies are reinforced on, and new ones


@dataclass
class Evaluation:
    """Temperatures, and how much is drawn."""

    temperatures: list[float] = field(default_factory=lambda: [0.1, 0.5, 1.0, 1.5])
    samples: int = 128  # per problem and temperature
    control: float = 4.0  # factor of the logits of the policy that has learned nothing
    skill_samples: int = 8  # per problem, for planning, execution and the shortcuts' accuracy
    shortcut_problems: int = 64  # new ones of the fine-tuning kind
    max_rows: int = 4096  # completions in memory at a time

    def __post_init__(self) -> None:
        check_temperatures(self.temperatures)
        if len(self.temperatures) < 2 or self.temperatures[0] >= 1 or 1.0 not in self.temperatures:
            raise ConfigError(f"temperatures: got {self.temperatures}, expected 1 and a lower one, for the sensitivity")
        if not 1 < self.control < math.inf:
            raise ConfigError(f"control: got {self.control}, expected a finite factor above 1")
        check_count("samples", self.samples, 2)
        for name in ("skill_samples", "shortcut_problems", "max_rows"):
            check_count(name, getattr(self, name), 1)

    @property
    def control_temperatures(self) -> list[float]:
        """Where the policy itself is what its control is on the grid."""
        return [temperature / self.control for temperature in self.temperatures]

    @property
    def all_temperatures(self) -> list[float]:
        """Of the fine-tuned policy: the grid and the control's."""
        both = sorted([*self.temperatures, *self.control_temperatures])
        return [t for t, last in zip(both, [0.0, *both], strict=False) if not math.isclose(t, last, rel_tol=1e-9)]


def matrix_file(directory: Path, policy: str, problems: str, seed: int) -> Path:
    """Return where outcomes are kept."""
    return directory / f"{policy}, {problems} problems, seed={seed}.safetensors"


def measure(
    setting: Setting, config: Evaluation, temperatures: list[float], directory: Path, policy: str, model: nn.Module
) -> dict[str, Any]:
    """Keep the outcomes of a policy on practised and on test problems, and return the rest that is measured."""
    sampler = setting.sampler(model, "evaluation", config.max_rows)
    for name, examples in ((PRACTISED, setting.few), (TEST, setting.problems.test)):
        matrix = sweep(sampler, examples, temperatures, config.samples, f"{name} {setting.seed}")
        with distributed.agreed("keeping outcomes"):
            if distributed.is_main():
                matrix.save(matrix_file(directory, policy, name, setting.seed))
    return {
        **_plan_and_execute(setting, sampler, config.skill_samples),
        "verify": _verify(setting, model),
        "shortcuts": shortcut_accuracy(setting, config, model),
    }


def sweep(sampler: Sampler, examples: Examples, temperatures: list[float], n: int, label: str = "") -> CorrectMatrix:
    """Return which of n samples per problem and temperature are right."""
    solutions = examples.completions(sampler.tokenizer)
    prompts = _prompts(examples, sampler)
    group = max(1, (sampler.max_rows or len(prompts)) // (n * len(temperatures)))
    found = []
    for start in range(0, len(prompts), group):
        wanted = solutions[start : start + group].repeat_interleave(n, 0)
        batches = sampler.generate_each(prompts[start : start + group], temperatures, n)
        for batch in batches:
            ids = batch.completion_ids.cpu()
            ids = F.pad(ids, (0, wanted.shape[1] - ids.shape[1]), value=sampler.pad_token_id)
            found.append((ids == wanted).all(1).view(-1, n))
    columns = [torch.cat(found[i :: len(temperatures)]) for i in range(len(temperatures))]
    return CorrectMatrix(np.array(temperatures), torch.stack(columns).numpy(), problems=label)


def _prompts(examples: Examples, sampler: Sampler) -> list[list[int]]:
    ids, mask = examples.prompts(sampler.tokenizer)
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def _plan_and_execute(setting: Setting, sampler: Sampler, n: int) -> dict[str, float]:
    """Return the means of both scores over samples at temperature 1."""
    examples, tables = setting.problems.test, setting.task.tables
    texts = sampler.texts(sampler.generate(_prompts(examples, sampler), n, temperature=1.0))
    judged = [skills(tables, examples[i // n], text) for i, text in enumerate(texts)]
    return {
        "plan": statistics.fmean(of.plan for of in judged),
        "execute": statistics.fmean(of.execute for of in judged),
    }


@torch.no_grad()
def _verify(setting: Setting, model: nn.Module) -> float:
    """Return the probability that a solution is likelier per token than a copy of one with a mistake."""
    tokenizer, examples, tables = setting.task.tokenizer, setting.problems.test, setting.task.tables
    rng = np.random.default_rng(seeding.derive_seed(setting.seed, "mistakes"))
    wrong = [tokenizer.encode(corruptions(tables, example, 1, rng)[0]) for example in examples]
    solutions = examples.completions(tokenizer)
    mistaken = torch.full_like(solutions, tokenizer.pad_id)
    for row, ids in zip(mistaken, wrong, strict=True):
        row[: len(ids)] = torch.from_numpy(ids)
    prompts, prompt_mask = examples.prompts(tokenizer)
    answers = torch.cat([solutions, mistaken])
    counted, _ = completion_mask(answers, tokenizer.eos_id)
    device = next(model.parameters()).device
    with evaluating(model):
        logps = token_logps(
            model,
            torch.cat([prompts.repeat(2, 1), answers], 1).to(device),
            torch.cat([prompt_mask.repeat(2, 1), counted], 1).to(device),
            prompts.shape[1],
        ).logps.cpu()
    right = [True] * len(examples) + [False] * len(examples)
    return verify_score(masked_mean(logps, counted, dim=1).numpy(), right)


def shortcut_accuracy(setting: Setting, config: Evaluation, model: nn.Module) -> float:
    """Return the accuracy at temperature 1 on new problems of the fine-tuning kind, in which shortcuts work."""
    examples = setting.task.sample(config.shortcut_problems, "sft", start=setting.world.sft_problems)
    sampler = setting.sampler(model, "shortcuts", config.max_rows)
    return float(sweep(sampler, examples, [1.0], config.skill_samples).outcomes.mean())
