"""Maze planning for `diffusion.flex`: paths through given waypoints, whose lengths nobody knows beforehand.

One maze, in the weights of the networks; a task is a start, a goal and waypoints between, all given. The methods:

    FlexMDM              inserts between the waypoints
    MDM, equal spacing   has the waypoints at equal distances on a canvas, and between them the path and as many pads as
                         are needed, anywhere; pads are removed from what it says
    MDM, packed legs     the same, but every pad stands after the path of its leg, so that a task has just one layout
    MDM, true length     is told how long every leg is, and needs no pads: an upper bound, which nobody has in practice

The canvas is long enough for any path, (inner + 1) times the longest leg. One task in eight, by a hash of its
waypoints, is never trained on; tests are of those. Success is strict: right ends, only steps through passages, all
waypoints in their order.

What the baseline of arXiv 2509.01025 does in detail is not published. If its canvas is about as long as paths are, then
equal spacing leaves some legs too little room, and no training helps; `ceilings` says how often, without any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from effml_shared import distributed, seeding
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.runs import Trial
from torch import Tensor

from effml_diffusion.corruption import mask_exactly
from effml_diffusion.experiments.flex_training import (
    Batch,
    Batches,
    Shape,
    Training,
    make_network,
    shortest_first,
    stream,
    train,
)
from effml_diffusion.flex import Canvas, Flex, FlexMDM
from effml_diffusion.flex.sampler import Event
from effml_diffusion.insertion_head import INSERTION_HEADS
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.maze_paths import MazePaths, remove_pads
from effml_diffusion.samplers.ancestral import Ancestral
from effml_diffusion.samplers.confidence import Confidence
from effml_diffusion.samplers.decoding import Sampler

__all__ = ["EQUAL", "FLEX", "PACKED", "TRUE", "MazeStudy", "RoomStudy", "ceilings", "train_flex", "train_mdm"]

FLEX, EQUAL, PACKED, TRUE = "FlexMDM", "MDM, equal spacing", "MDM, packed legs", "MDM, true length"
_SHOWN = 32  # tasks among which is the one that is shown step by step


@dataclass
class MazeStudy:
    """The maze, the networks and how they are tested."""

    n: int = 3  # cells of a side
    loops: float = 0.0  # share of the walls of a perfect maze that are opened
    maze_seed: int = 0
    inner: int = 2  # waypoints between start and goal
    shape: Shape = field(default_factory=Shape)
    training: Training = field(default_factory=Training)
    heads: list[str] = field(default_factory=lambda: ["expectation"])  # of FlexMDM, the paper's first
    sampling_steps: list[int] = field(default_factory=lambda: [8, 32])  # few, then many
    test_paths: int = 150

    def __post_init__(self) -> None:
        for name, least in (("n", 2), ("inner", 0), ("test_paths", 1)):
            check_count(name, getattr(self, name), least)
        for head in self.heads:
            check_choice("heads", head, INSERTION_HEADS)
        if self.heads[:1] != ["expectation"] or len(set(self.heads)) < len(self.heads):
            raise ConfigError(f"heads: got {self.heads}, expected 'expectation' and at most 'distribution' after it")
        if len(self.sampling_steps) < 2 or min(self.sampling_steps) < 2:
            raise ConfigError(f"sampling_steps: got {self.sampling_steps}, expected at least two numbers >= 2")

    def maze(self) -> Maze:
        """Return the maze that all networks learn."""
        return Maze.random(self.n, loops=self.loops, seed=self.maze_seed)

    def paths(self, *, canvas: bool = False) -> MazePaths:
        """Return all tasks, as they are or laid on the canvas."""
        maze = self.maze()
        return MazePaths(maze, self.inner, canvas=self.canvas(maze) if canvas else None)

    def canvas(self, maze: Maze) -> int:
        """Return the tokens that any path fits into with waypoints at equal distances."""
        return int(maze.distances.max()) * (self.inner + 1) + 1


@dataclass
class RoomStudy:
    """The mazes of which it is counted how many tasks have room on a canvas with equal spacing; nothing is trained."""

    n: int = 20  # the paper's 41 x 41 pixels
    loops: float = 0.15
    inner: list[int] = field(default_factory=lambda: [2, 7, 12])  # few waypoints, then many
    share: float = 0.99  # of the paths are no longer than the canvas
    tasks: int = 2000

    def __post_init__(self) -> None:
        check_count("n", self.n, 2)
        check_count("tasks", self.tasks, 1)
        check_range("share", self.share, 0.0, 1.0)
        if len(self.inner) < 2 or min(self.inner) < 0:
            raise ConfigError(f"inner: got {self.inner}, expected at least two numbers >= 0")


def ceilings(study: RoomStudy, seed: int) -> dict[str, float]:
    """Return by number of inner waypoints the share of tasks whose legs all have room, in the maze of a seed."""
    maze = Maze.random(study.n, loops=study.loops, seed=seed)
    found = {}
    for inner in study.inner:
        numbers = torch.randint(2**62, (study.tasks, 1), generator=seeding.generator(seed, "room", inner))
        tasks = MazePaths(maze, inner).batch(numbers)["waypoints"]
        legs = maze.distances[tasks[:, :-1], tasks[:, 1:]]
        canvas = maze.shortest(tasks).double().quantile(study.share).floor()
        found[str(inner)] = (legs.amax(1) <= (canvas - 1) // (inner + 1)).double().mean().item()
    return found


class _TrainingPaths:
    """A source of tasks that are not held out: those that are get other random numbers."""

    def __init__(self, paths: MazePaths) -> None:
        self.paths, self.draws = paths, paths.draws
        self.fingerprint = f"{paths.fingerprint}, seven tasks in eight"

    def batch(self, numbers: Tensor) -> Batch:
        samples = self.paths.batch(numbers)
        while (wrong := _held_out(samples["waypoints"])).any():
            numbers = torch.where(wrong[:, None], (numbers + 1) & (2**63 - 1), numbers)
            samples = self.paths.batch(numbers)
        return samples


def train_flex(study: MazeStudy, head: str, seed: int, trial: Trial) -> dict[str, Any]:
    """Train a FlexMDM and measure its plans."""
    paths, maze = study.paths(), study.maze()
    longest = study.canvas(maze)
    fields = {"gap_head": head, "max_length": longest, "pad_id": paths.pad_id}
    model = make_network(study.shape, paths.vocab_size, seed, **fields)
    flex = FlexMDM(model, paths.mask_id, paths.pad_id, longest, reduction="token")
    data = Batches(stream(_TrainingPaths(paths), seed), partial(shortest_first, flex))
    measure = partial(_measure_flex, study, flex, head, seed)
    micro_batch = study.training.micro_batch
    return train(trial, model, flex.loss_terms, data, study.training, seed, measure=measure, micro_batch=micro_batch)


def train_mdm(study: MazeStudy, method: str, seed: int, trial: Trial) -> dict[str, Any]:
    """Train a masked diffusion model on one of its layouts and measure its plans."""
    paths = study.paths(canvas=method != TRUE)
    model = make_network(study.shape, paths.vocab_size, seed)
    pad_id = paths.pad_id if method == TRUE else None  # on the canvas a pad is a token like any other
    diffusion = MaskedDiffusion(model, paths.mask_id, pad_id=pad_id, time_conditioning="alpha")
    scatter = partial(_scatter, paths) if method == EQUAL else _as_it_is
    data = Batches(stream(_TrainingPaths(paths), seed), scatter)
    measure = partial(_measure_mdm, study, diffusion, paths, seed)
    return train(trial, model, diffusion.loss_terms, data, study.training, seed, measure=measure)


def _as_it_is(samples: Batch) -> Batch:
    return {"input_ids": samples["input_ids"], "maskable": ~samples["fixed"]}


def _scatter(paths: MazePaths, samples: Batch) -> Batch:
    """Spread the tokens of every leg over random places of its part of the canvas, in their order."""
    ids, fixed = samples["input_ids"], samples["fixed"]
    legs = ids[:, :-1].reshape(len(ids) * (paths.inner + 1), paths.spacing)[:, 1:]  # without their first waypoints
    real = legs != paths.pad_id
    chosen = mask_exactly(torch.ones_like(real), real.sum(1))
    spread = torch.where(chosen, legs.gather(1, (chosen.cumsum(1) - 1).clamp(min=0)), paths.pad_id)
    return {"input_ids": ids.masked_scatter(~fixed, spread), "maskable": ~fixed}


def _measure_flex(study: MazeStudy, flex: FlexMDM, head: str, seed: int) -> dict[str, Any]:
    samplers = {
        f"{mode}, {steps} steps": Flex(steps, mode=mode)
        for mode in ("adaptive", "vanilla")
        for steps in study.sampling_steps
    }
    closing: dict[str, Any] = (
        {"insert_last": True}
        if head == "expectation"
        else {
            "insert_last": True,
            "insertion": "binomial",
        }
    )
    samplers |= {f"closing insertion, {steps} steps": Flex(steps, **closing) for steps in study.sampling_steps}
    tasks = _tests(study)["waypoints"]
    canvas = Canvas.waypoints(tasks)
    found = {}
    for name, sampler in samplers.items():
        output = sampler(flex, canvas, generator=seeding.generator(seed, "sampling", name))
        found[name] = _judge(study.maze(), output.ids.cpu(), output.lengths.cpu(), tasks, output.n_forwards)
    return {"samplers": found, "shown": _shown(study, flex, tasks[:_SHOWN], seed)}


def _shown(study: MazeStudy, flex: FlexMDM, tasks: Tensor, seed: int) -> dict[str, Any]:
    """Return step by step the longest of the plans that are right without a detour, or if there is none, the first."""
    maze, sampler = study.maze(), Flex(study.sampling_steps[-1], trace=True)
    output = sampler(flex, Canvas.waypoints(tasks), generator=seeding.generator(seed, "shown"))
    lengths = output.lengths.cpu()
    right = maze.solved(output.ids.cpu(), lengths, tasks) & (lengths == maze.shortest(tasks))
    row = int((right * lengths).argmax())
    events: list[Event] = [event for event in output.trace or [] if event.row == row]
    steps = {"start": tasks[row].tolist(), "steps": sampler.steps, "events": [[*event] for event in events]}
    return {**steps, "right": bool(right[row])}


def _measure_mdm(study: MazeStudy, diffusion: MaskedDiffusion, paths: MazePaths, seed: int) -> dict[str, Any]:
    tests = _tests(study, paths)
    blank = ~tests["fixed"]
    if diffusion.pad_id is not None:
        blank &= tests["input_ids"] != paths.pad_id
    init = tests["input_ids"].masked_fill(blank, paths.mask_id).to(distributed.default_device())
    samplers: dict[str, Sampler] = {}
    for steps in study.sampling_steps:
        samplers[f"adaptive, {steps} steps"] = Confidence(steps=steps)
        samplers[f"vanilla, {steps} steps"] = Ancestral(steps=steps, final="sample")
    found = {}
    for name, sampler in samplers.items():
        output = sampler(diffusion, init, generator=seeding.generator(seed, "sampling", name))
        ids, lengths = remove_pads(output.ids.cpu(), paths.pad_id)
        found[name] = _judge(paths.maze, ids, lengths, tests["waypoints"], output.n_forwards)
    return {"samplers": found}


def _judge(maze: Maze, ids: Tensor, lengths: Tensor, tasks: Tensor, n_forwards: int) -> dict[str, Any]:
    """Return the share of right paths, the ratio of mean lengths to the shortest, and the forward passes."""
    return {
        "success": maze.solved(ids, lengths, tasks).double().mean().item(),
        "length_ratio": (lengths.double().mean() / maze.shortest(tasks).double().mean()).item(),
        "forwards": n_forwards,
    }


def _tests(study: MazeStudy, paths: MazePaths | None = None) -> Batch:
    """Return held-out tasks, the same for every method and seed, as they are or in the form of given paths."""
    plain = study.paths()
    numbers = torch.randint(2**62, (32 * study.test_paths + 256, 1), generator=seeding.generator(0, "tests"))
    chosen = numbers[_held_out(plain.batch(numbers)["waypoints"])][: study.test_paths]
    return (plain if paths is None else paths).batch(chosen)


def _held_out(waypoints: Tensor) -> Tensor:
    """Say of every task (rows, stops) whether it is one of the eighth that nothing is trained on."""
    mixed = torch.zeros_like(waypoints[:, 0])
    for stop in waypoints.unbind(1):
        mixed = (mixed * 1_000_003 + stop + 1) % (2**31 - 1)
    return mixed % 8 == 0
