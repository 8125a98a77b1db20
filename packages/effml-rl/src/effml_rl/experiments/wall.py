"""`rl.wall`: reinforcement learning makes answers reliable, but does it make new problems solvable?

Protocol. A small Transformer is fine-tuned on solution-tree problems in which shortcuts work: state and context give
the action away. From there on it is reinforced by GRPO on problems in which they do not, few or many of them, for the
same number of steps; or fine-tuned further for as many steps with as many completions. Before and after, problems that
both reinforced policies practised on (the few are the first of the many) and new test problems are sampled at several
temperatures. P1* is the accuracy and Cov* the share of problems with a right sample, each at its best temperature; DI
is the share of the accuracy's fall from the lowest temperature to 1 that training removed.

The control. Beside every result stands the fine-tuned policy with its logits multiplied by a constant. It has learned
nothing: on a grid of temperatures scaled by that constant its coverage is the same to the sample, and no multiplication
moves the best accuracy over all temperatures. But its distillation index is as high as that of a trained policy. So a
high index alone is no evidence of learning; the rise of P1* is.

Unchanged coverage is an equivalence, which the rule for claims, a least effect, does not know. Its effect is therefore
what is left of a margin: 5 points less the absolute change of each seed. This is stricter than two one-sided tests of
the mean, as changes of opposite signs do not cancel.

What was chosen. World, problems, batches and rates are those of a miniature of the paper's task; the world is that of
seed 0, as in the official run. When a network sees beyond the shortcuts differs between seeds by hundreds of steps, so
that fine-tuning stops at an accuracy where shortcuts work, 85%. There accuracy and coverage of test problems are near
the paper's before reinforcement (P1* 48 and 38%, Cov* 69 and 61% in two settings). 200 steps of GRPO see the few
problems 100 times, as often as there. Tried before, with one or two seeds each and all results in view: worlds 0, 1, 3
and 11; fine-tuning for 250, 350, 400, 500 and 600 steps; 120 and 200 of GRPO; hidden layers of 128 and 256; 32, 64 and
128 samples. With many problems test coverage rose by 6 to 26 points wherever fine-tuning had left anything to reinforce
(with P1* of 2 and 5% it did not); with few it changed by -22 to +5. Coverage of the practised problems changed by -3 to
+19 points, mostly less with 128 samples, the paper's number, than with 32: RL makes rare right answers frequent. The
index was anything from below 0 to 0.94, and is a quotient of next to nothing where accuracy hardly fell before; so the
claim is on its two parts.

What this cannot show. Tables of six entries can be guessed, so that the wall is softer than that of unknown facts in
large tables; test problems are of the same world, and there is only one; no chain of thought. Where fine-tuning is
stopped so early, more of it helps test problems more than RL on few does: it teaches the world, and is no rival on
problems without solutions.

Source: arXiv 2505.22756, a task with tables of 20 entries, and language models on MATH. Sizes, the index, its threshold
and the control are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from effml_shared.checks import check_count
from effml_shared.citations import Paper
from effml_shared.experiments import Claim, Experiment
from effml_shared.runs import Run
from effml_shared.transformer import TransformerConfig

from effml_rl.experiments.wall_evaluation import PRACTISED, TEST, Evaluation, measure, shortcut_accuracy
from effml_rl.experiments.wall_figures import figures
from effml_rl.experiments.wall_results import BEFORE, FEW, MANY, MORE, Outcomes, results
from effml_rl.experiments.wall_setting import FineTuning, Reinforcement, Setting, World
from effml_rl.experiments.wall_training import continue_fine_tuning, fine_tune, reinforce

__all__ = ["WallConfig", "experiment"]


@dataclass
class WallConfig:
    """A world, a network, its two trainings, and how it is judged."""

    world: World = field(default_factory=World)
    model: TransformerConfig = field(  # vocab_size: the tokenizer's
        default_factory=lambda: TransformerConfig(n_layers=2, d_model=64, n_heads=2, d_ff=128)
    )
    sft: FineTuning = field(default_factory=FineTuning)
    rl: Reinforcement = field(default_factory=Reinforcement)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seeds: int = 3

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds, 1)


def smoke() -> WallConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return WallConfig(
        world=World(size=2, shortest=1, longest=2, irrelevant=3, sft_problems=100, test_problems=8, known=10),
        model=TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=32),
        sft=FineTuning(steps=100, batch_size=16, lr=2e-2, until=None),
        rl=Reinforcement(few=4, many=8, steps=4, prompts=2, completions=4, lr=1e-3),
        evaluation=Evaluation(temperatures=[0.5, 1.0], samples=8, skill_samples=2, shortcut_problems=4),
        seeds=1,
    )


def cpu() -> WallConfig:
    """Return the default: tables of six entries, paths of two and three actions."""
    return WallConfig()


def gpu() -> WallConfig:
    """Return the paper's task and network; rates and weights are those of the official run where they are known."""
    return WallConfig(
        world=World(size=20, shortest=5, longest=10, irrelevant=10, sft_problems=200_000, test_problems=256, known=1),
        model=TransformerConfig(n_layers=4, d_model=128, n_heads=2, d_ff=512),
        sft=FineTuning(steps=3125, until=None, evaluate_every=625, lr=1e-3),
        rl=Reinforcement(
            few=128,
            many=4096,
            steps=300,
            prompts=32,
            completions=8,
            lr=5e-5,
            epochs=4,
            kl=1e-3,
            entropy=1e-3,
            clip_norm=0.2,
        ),
        evaluation=Evaluation(temperatures=[0.05, 0.4, 0.8, 1.0, 1.4, 1.8], max_rows=32_768),
    )


def run(config: WallConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    rl, evaluation = config.rl, config.evaluation
    more = rl.samples * rl.completions
    run.expect(config.seeds * (config.sft.samples + more + 2 * rl.samples))
    outcomes: list[dict[str, Outcomes] | None] = []
    measured: list[dict[str, Any]] = []
    for seed in range(1, config.seeds + 1):
        setting = Setting(config.world, config.model, rl, seed, run.path / "policies")
        measured.append(_train(config, setting, run))
        outcomes.append(_outcomes(evaluation, setting, run, measured[-1]))
    return {**results(outcomes, measured, evaluation), "sizes": {"few": rl.few, "many": rl.many}}


def _train(config: WallConfig, setting: Setting, run: Run) -> dict[str, Any]:
    """Train and measure the four policies of a seed; None for one that diverged or whose start did."""

    def measured(policy: str, temperatures: list[float], train: Callable[..., dict[str, Any]], *args: Any) -> Any:
        look = partial(measure, setting, config.evaluation, temperatures, run.path / "outcomes", policy)
        return run.trial(f"{policy}/seed={setting.seed}", partial(train, setting, *args, look))["measured"]

    grid, accuracy = config.evaluation.temperatures, partial(shortcut_accuracy, setting, config.evaluation)
    found = {BEFORE: measured(BEFORE, config.evaluation.all_temperatures, fine_tune, config.sft, accuracy)}
    if found[BEFORE] is None:
        return found | dict.fromkeys((MORE, FEW, MANY))
    found[MORE] = measured(MORE, grid, continue_fine_tuning)
    for policy, count in ((FEW, config.rl.few), (MANY, config.rl.many)):
        problems = setting.problems.rl.select(slice(0, count))
        found[policy] = measured(policy, grid, reinforce, problems)
    return found


def _outcomes(config: Evaluation, setting: Setting, run: Run, measured: dict[str, Any]) -> dict[str, Outcomes] | None:
    """Return what the sweeps of a seed left, by set of problems; None where fine-tuning diverged."""
    if measured[BEFORE] is None:
        return None
    trained = [policy for policy, of in measured.items() if of is not None and policy != BEFORE]
    problems = {PRACTISED: setting.few, TEST: setting.problems.test}
    return {
        name: Outcomes.load(run.path / "outcomes", config, name, setting.seed, trained, setting.known(examples))
        for name, examples in problems.items()
    }


experiment = Experiment(
    name="rl.wall",
    title="Reinforcement learning makes answers reliable long before it makes new problems solvable",
    paper='Qin et al., Decomposing Elements of Problem Solving: What "Math" Does RL Teach?, arXiv 2505.22756',
    papers=(
        Paper(
            'Decomposing Elements of Problem Solving: What "Math" Does RL Teach?',
            "2505.22756",
            (
                "Tian Qin",
                "Core Francisco Park",
                "Mujin Kwun",
                "Aaron Walsman",
                "Eran Malach",
                "Nikhil Anand",
                "Hidenori Tanaka",
                "David Alvarez-Melis",
            ),
        ),
    ),
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "5 s", "cpu": "5 min of one core", "gpu": "not measured"},
    run=run,
    claims=(
        Claim(
            "distillation",
            "After RL on few problems, accuracy on them falls with temperature by at most 40% of what it fell before",
            "curves flatten over temperatures from 0 to 1.2 (Qwen2.5, GRPO on MATH); the number is ours",
            " points below 40% of the fall",
            at_least=0.0,
        ),
        Claim(
            "control",
            "So it does if the logits are multiplied, which teaches nothing: flat curves alone are no sign of learning",
            "no number; the control is ours",
            " points below 40% of the fall",
            at_least=0.0,
        ),
        Claim(
            "accuracy",
            "But after RL accuracy at its best temperature rises, by 5 points and more, which no multiplication does",
            "48.2 to 59.8% and 38.0 to 60.4% on test problems (tables of 20, two settings)",
            " points more right answers",
            at_least=5.0,
        ),
        Claim(
            "practised",
            "The wall: RL on few problems leaves their coverage at its best temperature as it was, within 5 points",
            "about unchanged (Qwen2.5, GRPO on MATH, 64 samples; no number)",
            " points left of 5",
            at_least=0.0,
        ),
        Claim(
            "few",
            "The wall for new problems: after RL on few, coverage of test problems grows by less than 5 points",
            "a coverage wall on new problems (MATH; no number)",
            " points left of 5",
            at_least=0.0,
        ),
        Claim(
            "many",
            "With many more problems RL passes the wall: coverage of test problems grows by 5 points and more",
            "69.0 to 74.2% and 60.9 to 73.6% (tables of 20, 128 problems, two settings)",
            " points more coverage",
            at_least=5.0,
        ),
        Claim(
            "difference",
            "Many problems give 5 points and more of test coverage beyond what few give, at equal steps",
            "direction only: more problems help",
            " points more coverage",
            at_least=5.0,
        ),
    ),
    figures=figures,
)
