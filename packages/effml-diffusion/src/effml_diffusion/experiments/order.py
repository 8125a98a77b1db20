"""`diffusion.order`: in which order a masked diffusion model fills Sudokus decides how many it solves.

Protocol. For each size of grid and each seed, one network learns full grids by masked diffusion: some random grids,
each time changed by a random symmetry. The same trained network then fills unique-solution puzzles, of grids drawn with
another seed, in several orders: random, or what it is surest of first (margin, top_prob, neg_entropy), one cell per
forward pass or four. In random order tokens are drawn from the network's predictions, or the likeliest is taken; in the
others the likeliest is taken, and by margin they are drawn as well. Claims compare with the better of the two random
ones, so that nothing is won by drawing less. A puzzle counts as solved if every row, column and box holds each digit
once and no clue has changed. Besides, the likelihood bound on new grids is set against the entropy of uniformly drawn
ones, ln(number of grids): a correct bound is not below it, so that one below means a leak or a wrong weight.

The puzzles are new to the network, their solutions need not be: of the 288 grids of 4x4 it learns from all, of the 28
million of 6x6 from one in six hundred.

Source: arXiv 2502.06768, 9x9 with a network of 6 million parameters: below 7% of puzzles in random order and about 90%
by the margin. Smaller grids, sizes, steps and thresholds are ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from effml_shared import distributed, seeding
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.citations import Paper
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.experiments import Claim, Experiment
from effml_shared.loop import Budget, Loop
from effml_shared.runs import Run, Trial
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep
from effml_shared.trainings import half_width

from effml_diffusion.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from effml_diffusion.experiments.order_figures import figures, write_generations
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.puzzles.sample_stream import SampleStream
from effml_diffusion.puzzles.sudoku import Sudoku
from effml_diffusion.puzzles.sudoku_samples import SudokuSamples
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_diffusion.samplers import Confidence

__all__ = ["GridConfig", "OrderConfig", "experiment"]

SIZES = ("small", "large")
ORDERS: dict[str, tuple[str, int, float]] = {  # score, cells per forward pass, temperature
    "random": ("random", 1, 1.0),
    "random, greedy": ("random", 1, 0.0),
    "random, 4 at once": ("random", 4, 1.0),
    "margin": ("margin", 1, 0.0),
    "margin, drawn": ("margin", 1, 1.0),
    "margin, 4 at once": ("margin", 4, 0.0),
    "top_prob": ("top_prob", 1, 0.0),
    "neg_entropy": ("neg_entropy", 1, 0.0),
}
TRACED = ("margin", "random")
GRIDS = {(2, 2): 288, (2, 3): 28_200_960, (3, 2): 28_200_960, (3, 3): 6_670_903_752_021_072_936_960}


@dataclass
class GridConfig:
    """One size of grid: its rules, its network and that network's training."""

    box_rows: int = 2
    box_columns: int = 2
    clues: int = 5  # of every puzzle
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    batch_size: int = 32  # grids per step
    steps: int = 1600
    lr: float = 6e-3  # peak, of AdamW

    def __post_init__(self) -> None:
        for name in ("clues", "d_model", "n_layers", "n_heads", "batch_size", "steps"):
            check_count(name, getattr(self, name), 1)
        check_range("lr", self.lr, 0.0)
        if self.clues >= self.tokens.rules.cells:
            raise ConfigError(f"clues: got {self.clues}, expected fewer than {self.tokens.rules.cells} cells")
        self.network()

    @property
    def tokens(self) -> SudokuTokens:
        return SudokuTokens(Sudoku(self.box_rows, self.box_columns))

    @property
    def label(self) -> str:
        n = self.tokens.rules.n
        return f"{n}x{n}, {self.clues} clues"

    @property
    def samples(self) -> int:
        """Grids of a training."""
        return self.steps * self.batch_size

    @property
    def entropy(self) -> float | None:
        """Nats per cell of a uniformly drawn grid; None where the number of grids is not known here."""
        grids = GRIDS.get((self.box_rows, self.box_columns))
        return None if grids is None else math.log(grids) / self.tokens.length

    def network(self) -> DiffusionTransformerConfig:
        """Return a network without time, that knows a cell by the embeddings of its row, column and box."""
        tokens = self.tokens
        return DiffusionTransformerConfig(
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=self.n_heads,
            vocab_size=tokens.vocab_size,
            position="none",
            norm="rms",
            qk_norm="head",
            mlp="relu",
            coordinates=tuple(tuple(axis) for axis in tokens.places.T.tolist()),
        )

    def sampler(self, order: str) -> Confidence:
        """Return the sampler of an order."""
        score, at_once, temperature = ORDERS[order]
        steps = -(-(self.tokens.rules.cells - self.clues) // at_once)
        return Confidence(score=score, steps=steps, temperature=temperature, history=order in TRACED)


@dataclass
class OrderConfig:
    """Two sizes of grid, and what their trainings and tests share."""

    small: GridConfig = field(default_factory=GridConfig)
    large: GridConfig = field(
        default_factory=lambda: GridConfig(2, 3, clues=12, d_model=96, n_layers=3, steps=1400, lr=3e-3)
    )
    grids: int = 1500  # full ones to learn from, each seen under ever new symmetries
    warmup: float = 0.05  # fraction of each training's samples
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: str = "float32"  # or bfloat16 (autocast), of training
    seeds: int = 3
    puzzles: int = 256  # to solve, others for every seed
    eval_grids: int = 256  # new full grids, for the likelihood bound

    def __post_init__(self) -> None:
        for name in ("grids", "seeds", "puzzles", "eval_grids"):
            check_count(name, getattr(self, name), 1)
        check_range("warmup", self.warmup, 0.0, 1.0)
        check_range("weight_decay", self.weight_decay, 0.0)
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: got {self.clip_norm}, expected a number > 0")
        check_choice("precision", self.precision, ("float32", "bfloat16"))

    def grid(self, size: str) -> GridConfig:
        """Return the configuration of a size."""
        return self.small if size == "small" else self.large


def smoke() -> OrderConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return OrderConfig(
        small=GridConfig(d_model=16, n_layers=1, n_heads=2, batch_size=4, steps=4),
        large=GridConfig(2, 3, clues=16, d_model=16, n_layers=1, n_heads=2, batch_size=4, steps=4),
        grids=4,
        seeds=1,
        puzzles=3,
        eval_grids=2,
    )


def cpu() -> OrderConfig:
    """Return the default: 4x4 with 5 clues and 6x6 with 12, networks of 0.1 and 0.34 million parameters."""
    return OrderConfig()


def gpu() -> OrderConfig:
    """Return 9x9 with 30 clues as the large grid, and a network of 5 million parameters."""
    return OrderConfig(
        large=GridConfig(3, 3, clues=30, d_model=256, n_layers=6, n_heads=8, batch_size=512, steps=6000, lr=2e-3),
        precision="bfloat16",
        puzzles=512,
    )


def run(config: OrderConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    run.expect(config.seeds * sum(config.grid(size).samples for size in SIZES))
    found: dict[str, list[dict[str, Any]]] = {size: [] for size in SIZES}
    for seed in range(1, config.seeds + 1):
        for size in SIZES:
            train = partial(_train, config, config.grid(size), seed)
            found[size].append(run.trial(f"{size} {config.grid(size).label}/seed={seed}", train))
    effects: dict[str, list[float | None]] = {}
    sizes, table = {}, []
    for size, rows in found.items():
        grid = config.grid(size)
        solved = {order: [row["solved"] and row["solved"][order] for row in rows] for order in ORDERS}
        excess = [_difference(row["nats"], grid.entropy) for row in rows]
        baseline = [_largest(pair) for pair in zip(solved["random"], solved["random, greedy"], strict=True)]
        for effect, order in (("order", "margin"), ("fewer steps", "margin, 4 at once")):
            effects[f"{size}: {effect}"] = list(map(_difference, solved[order], baseline))
        effects[f"{size}: solved"] = solved["margin"]
        effects[f"{size}: bound"] = excess
        table += [_row(grid, order, values) for order, values in solved.items()]
        sizes[size] = {
            "label": grid.label,
            "parameters": rows[0]["parameters"],
            "entropy": grid.entropy,
            "nats": [row["nats"] for row in rows],
            "solved": solved,
        }
    generations = found["large"][0]["generations"]
    if generations is not None and distributed.is_main():
        write_generations(run.path, generations)
    return {"effects": effects, "table": table, "sizes": sizes, "generations": generations}


def _row(grid: GridConfig, order: str, values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {
        "grid": grid.label,
        "order": order,
        "forward passes": grid.sampler(order).steps,
        "solved (%)": statistics.fmean(known) if whole else None,
        "± 95%": half_width(known) if whole else None,
    }


def _difference(value: float | None, other: float | None) -> float | None:
    """Return by how much a number is above another; None where one is not known, as after a divergence."""
    return None if value is None or other is None else value - other


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _train(config: OrderConfig, grid: GridConfig, seed: int, trial: Trial) -> dict[str, Any]:
    """Train one network and let it solve puzzles in every order; one that meets NaN or infinity solves none."""
    tokens, device = grid.tokens, distributed.default_device()
    model = DiffusionTransformer(grid.network(), seeding.derive_seed(seed, "model")).to(device)
    diffusion = MaskedDiffusion(model, tokens.mask_id)
    replica = distributed.parallelize(model, "ddp")
    optimizer = torch.optim.AdamW(replica.parameters(), grid.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    step = GradientStep(
        replica, optimizer, diffusion.loss_terms, clip_norm=config.clip_norm, precision=config.precision
    )
    grids = tokens.rules.grids(config.grids, seed=seeding.derive_seed(seed, "training grids"))
    stream = SampleStream(
        SudokuSamples(tokens, grids),
        seed=seeding.derive_seed(seed, "symmetries"),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    loop = Loop(
        step,
        stream,
        cosine(grid.batch_size, grid.samples, warmup=int(config.warmup * grid.samples)),
        budget=Budget(samples=grid.samples),
        hooks=trial.hooks,
        checkpoints=trial.checkpoints,
        seed=seed,
    )
    try:
        loop.run()
        measured = {"nats": _nats(config, grid, diffusion, seed), **_solve(config, grid, diffusion, seed)}
    except NonFiniteError:
        measured = {"nats": None, "solved": None, "generations": None}
    return {
        "method": grid.label,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **measured,
        "steps": max(loop.clock.step, 1),
        "seconds": loop.clock.seconds,
        "samples": grid.samples,
    }


def _nats(config: OrderConfig, grid: GridConfig, diffusion: MaskedDiffusion, seed: int) -> float:
    """Return the likelihood bound in nats per cell on grids drawn with another seed."""
    device = distributed.default_device()
    grids = grid.tokens.rules.grids(config.eval_grids, seed=seeding.derive_seed(seed, "new grids"))
    draws = seeding.generator(seed, "masks of new grids", device=device)
    bound = diffusion.nelbo(grid.tokens.encode(grids).to(device), n_mc=16, batch_size=256, generator=draws)
    return float(bound.nats.mean()) / grid.tokens.length


def _solve(config: OrderConfig, grid: GridConfig, diffusion: MaskedDiffusion, seed: int) -> dict[str, Any]:
    """Return the percentage of puzzles solved in every order, and two generations of one puzzle."""
    tokens, device = grid.tokens, distributed.default_device()
    puzzles = tokens.rules.puzzles(config.puzzles, grid.clues, seed=seeding.derive_seed(seed, "puzzles"))
    given = tokens.encode(puzzles.clues).to(device)
    right, history = {}, {}
    for order in ORDERS:
        draws = seeding.generator(seed, "drawing tokens", order, device=device)
        sample = grid.sampler(order)(diffusion, given, generator=draws)
        right[order] = tokens.valid(sample.ids, given).cpu()
        if sample.history is not None:
            history[order] = sample.history.cpu()
    first, second = TRACED
    shown = int((right[first] & ~right[second]).int().argmax())  # the first puzzle if none tells them apart
    generations = {
        order: {"ids": ids[:, shown].tolist(), "solved": bool(right[order][shown])} for order, ids in history.items()
    }
    shape = {"box_rows": grid.box_rows, "box_columns": grid.box_columns}
    return {
        "solved": {order: 100 * solved.double().mean().item() for order, solved in right.items()},
        "generations": {**shape, "orders": generations},
    }


def _claims(size: str, order: float, fewer: float, solved: float) -> tuple[Claim, ...]:
    """Return the claims on a size of grid with the points and percentages that they ask for."""
    return (
        Claim(
            f"{size}: order",
            f"{size.capitalize()} grid: by margin, the network solves more puzzles than in random order",
            "9x9: about 90% against below 7%",
            " points more puzzles",
            at_least=order,
        ),
        Claim(
            f"{size}: fewer steps",
            f"{size.capitalize()} grid: by margin with four cells at once still more than in random order one by one",
            "no number; the comparison is ours",
            " points more puzzles",
            at_least=fewer,
        ),
        Claim(
            f"{size}: solved",
            f"{size.capitalize()} grid: by margin, nearly all puzzles are solved",
            "9x9: about 90%",
            "% of puzzles",
            at_least=solved,
        ),
        Claim(
            f"{size}: bound",
            f"{size.capitalize()} grid: the likelihood bound on new grids is above the entropy of all grids",
            "true of every correct bound",
            " nats per cell above",
            at_least=0.0,
        ),
    )


experiment = Experiment(
    name="diffusion.order",
    title="The order of unmasking decides how many Sudokus one and the same network solves",
    paper="Kim et al., Train for the worst, plan for the best, arXiv 2502.06768",
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "3 s", "cpu": "6 min on one core", "gpu": "not measured"},
    run=run,
    claims=(*_claims("small", 15.0, 0.0, 99.0), *_claims("large", 50.0, 0.0, 90.0)),
    figures=figures,
    papers=(
        Paper(
            "Train for the Worst, Plan for the Best: Understanding Token Ordering in Masked Diffusions",
            "2502.06768",
            (
                "Jaeyeon Kim",
                "Kulin Shah",
                "Vasilis Kontonis",
                "Sham Kakade",
                "Sitan Chen",
            ),
        ),
    ),
)
