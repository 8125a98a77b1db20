"""`diffusion.flex`: plans and texts of unknown length, by insertion (FlexMDM) and by padding a canvas (MDM).

Protocol. Two tasks, see `flex_maze` and `flex_text`. Within a task all networks have the same shape, all trainings the
same number of steps, samples, learning rate and schedule, and all methods of a seed see the same samples in the same
order; nothing is tuned per method. A step of FlexMDM costs what is present of a text, one of masked diffusion the whole
canvas, so that equal steps give masked diffusion more compute. Plans are compared in the adaptive order (top-two
margin) of both, at the larger number of sampling steps; lines in random order.

What this cannot show. The canvas here holds every path, which costs little at this size; so masked diffusion meets none
of the trouble that the paper reports, and at equal steps learns its layout faster than FlexMDM learns to count. Where
the canvas is about as long as paths are, `room` counts the tasks that no training could make it plan. The maze is one
and in the weights, so a plan is recall of legs, joined in combinations that were not seen.

Source: arXiv 2509.01025, mazes of 41 x 41 pixels, text of OpenWebText with 175M parameters. Sizes, schedules and
thresholds are ours; for planning the paper reports success, for lengths a histogram.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from effml_shared import distributed
from effml_shared.checks import check_count
from effml_shared.citations import Paper
from effml_shared.experiments import Claim, Experiment
from effml_shared.runs import Run
from effml_shared.trainings import half_width

from effml_diffusion.experiments import flex_maze, flex_text
from effml_diffusion.experiments.flex_figures import figures, plan_page
from effml_diffusion.experiments.flex_maze import EQUAL, FLEX, PACKED, TRUE, MazeStudy, RoomStudy, ceilings
from effml_diffusion.experiments.flex_text import TextStudy
from effml_diffusion.experiments.flex_training import Shape, Training

__all__ = ["FlexConfig", "experiment"]

Results = dict[str, list[dict[str, Any]]]


@dataclass
class FlexConfig:
    """Both tasks, and how often each training is repeated."""

    maze: MazeStudy = field(default_factory=MazeStudy)
    room: RoomStudy = field(default_factory=RoomStudy)
    text: TextStudy = field(default_factory=TextStudy)
    seeds: int = 3
    reference_seeds: int = 1  # of the two layouts of masked diffusion that no claim is about

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds, 1)
        check_count("reference_seeds", self.reference_seeds, 1)


def smoke() -> FlexConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    shape = Shape(n_layers=1, d_model=16, n_heads=2, cond_dim=8)
    training = Training(steps=4, batch_size=8, micro_batch=4, warmup=1)
    return FlexConfig(
        maze=MazeStudy(
            n=3,
            shape=shape,
            training=training,
            heads=["expectation", "distribution"],
            sampling_steps=[3, 6],
            test_paths=8,
        ),
        room=RoomStudy(n=4, tasks=50),
        text=TextStudy(
            max_bytes=1_000_000,
            longest=12,
            shape=shape,
            training=training,
            sampling_steps=[3, 6],
            generated=8,
            scored=2,
            draws=2,
        ),
        seeds=1,
    )


def cpu() -> FlexConfig:
    """Return the default."""
    return FlexConfig()


def gpu() -> FlexConfig:
    """Return a larger maze with more waypoints, and longer lines."""
    maze = Training(steps=2000, batch_size=256, micro_batch=256, lr=2e-3, warmup=200, precision="bfloat16")
    text = Training(steps=1000, batch_size=256, micro_batch=256, lr=2e-3, warmup=100, precision="bfloat16")
    shape = Shape(n_layers=6, d_model=192, n_heads=6, cond_dim=64)
    return FlexConfig(
        maze=MazeStudy(
            n=10,
            loops=0.15,
            inner=5,
            shape=shape,
            training=maze,
            sampling_steps=[64, 256],
            test_paths=1000,
        ),
        text=TextStudy(
            max_bytes=50_000_000,
            longest=80,
            shape=shape,
            training=text,
            sampling_steps=[32, 128],
            generated=2000,
            scored=512,
            draws=32,
        ),
    )


def run(config: FlexConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    maze, text = config.maze, config.text
    plans = {_head_name(head): partial(flex_maze.train_flex, maze, head) for head in maze.heads}
    plans |= {method: partial(flex_maze.train_mdm, maze, method) for method in (EQUAL, PACKED, TRUE)}
    repeats = dict.fromkeys(plans, config.seeds)
    repeats |= dict.fromkeys((PACKED, TRUE), min(config.seeds, config.reference_seeds))
    run.expect(sum(repeats.values()) * maze.training.samples + 2 * config.seeds * text.training.samples)
    texts, held_out = flex_text.Texts(text, "train"), flex_text.Texts(text, "held_out")
    lines = {
        flex_text.FLEX: partial(flex_text.train_flex, text, texts, held_out),
        flex_text.MDM: partial(flex_text.train_mdm, text, texts, held_out),
    }
    planned: Results = {name: [] for name in plans}
    written: Results = {name: [] for name in lines}
    for seed in range(1, config.seeds + 1):
        for task, found, methods in (("plans", planned, plans), ("lines", written, lines)):
            for name, train in methods.items():
                if task == "lines" or seed <= repeats[name]:
                    found[name].append(run.trial(f"{task}: {name}/seed={seed}", partial(train, seed)))
    room, rooms = config.room, [ceilings(config.room, seed) for seed in range(1, config.seeds + 1)]
    few, many = (f"{steps} steps" for steps in (maze.sampling_steps[0], maze.sampling_steps[-1]))
    success = {method: _values(planned[method], "samplers", f"adaptive, {many}", "success") for method in (FLEX, EQUAL)}
    summary = {
        "effects": {
            "planning": _per_seed(lambda ours, theirs: 100 * (ours - theirs), success[FLEX], success[EQUAL]),
            "steps": _per_seed(
                lambda high, low: high / low if low else None,
                success[FLEX],
                _values(planned[FLEX], "samplers", f"adaptive, {few}", "success"),
            ),
            "plan_length": _per_seed(
                lambda ratio: 100 * (1 - abs(ratio - 1)),
                _values(planned[FLEX], "samplers", f"adaptive, {many}", "length_ratio"),
            ),
            "room": [100 * (of[str(room.inner[0])] - of[str(room.inner[-1])]) for of in rooms],
            "few_steps_length": _length_gains(written, text.sampling_steps[0]),
            "many_steps_length": _length_gains(written, text.sampling_steps[-1]),
        },
        "table": [*_plan_rows(planned), *_room_rows(room, rooms), *_line_rows(written)],
        "plans": {name: _by_sampler(of, "samplers", "success") for name, of in planned.items()},
        "lines": {name: _by_sampler(of, "lengths", "histogram") for name, of in written.items()},
        "held_out_lengths": torch.bincount(held_out.lengths, minlength=text.longest + 1).tolist(),
        "maze": {"n": maze.n, "passages": [list(pair) for pair in maze.maze().passages]},
        "shown": planned[FLEX][0]["measured"].get("shown"),
    }
    if distributed.is_main():
        plan_page(run.path, summary)
    return summary


def _head_name(head: str) -> str:
    return FLEX if head == "expectation" else f"{FLEX}, {head} head"


def _values(results: Sequence[dict[str, Any]], *keys: str) -> list[Any]:
    """Return one measure of every seed, None where the training diverged."""
    values = []
    for result in results:
        value: Any = result["measured"] or None
        for key in keys:
            value = None if value is None else value[key]
        values.append(value)
    return values


def _per_seed(effect: Callable[..., float | None], *sides: list[Any]) -> list[float | None]:
    """Return an effect of each seed from one measure or two; None where one is."""
    return [None if None in pair else effect(*pair) for pair in zip(*sides, strict=True)]


def _length_gains(written: Results, steps: int) -> list[float | None]:
    """Return by how many bytes the lengths of FlexMDM are closer to the data's, Wasserstein distance."""
    theirs = _values(written[flex_text.MDM], "lengths", f"ancestral, {steps} steps", "wasserstein")
    ours = _values(written[flex_text.FLEX], "lengths", f"paper's, {steps} steps", "wasserstein")
    return _per_seed(lambda far, near: far - near, theirs, ours)


def _by_sampler(results: Sequence[dict[str, Any]], group: str, measure: str) -> dict[str, list[Any]]:
    names = next((list(result["measured"][group]) for result in results if result["measured"]), [])
    return {name: _values(results, group, name, measure) for name in names}


def _mean(values: Sequence[float | None], scale: float = 1.0) -> float | None:
    there = [value for value in values if value is not None]
    return scale * statistics.fmean(there) if there and len(there) == len(values) else None


def _plan_rows(planned: Results) -> list[dict[str, Any]]:
    rows = []
    for name, results in planned.items():
        for sampler, success in _by_sampler(results, "samplers", "success").items():
            values = [100 * value for value in success if value is not None]
            rows.append(
                {
                    "method": f"plans: {name}",
                    "sampler": sampler,
                    "seeds": len(results),
                    "right plans (%)": _mean(success, 100),
                    "± 95%": half_width(values) if values else None,
                    "mean length / shortest": _mean(_values(results, "samplers", sampler, "length_ratio")),
                    "forward passes": _mean(_values(results, "samplers", sampler, "forwards")),
                    "nats per byte": None,
                    "length distance (bytes)": None,
                    "length TV": None,
                    "parameters": results[0]["parameters"],
                    "ms per step": 1000 * statistics.fmean(result["seconds"] / result["steps"] for result in results),
                }
            )
    return rows


def _room_rows(study: RoomStudy, rooms: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    size, share = 2 * study.n + 1, f"{100 * study.share:g}%"
    return [
        {
            "method": f"any: equal spacing, {size} x {size} maze, canvas for {share} of paths",
            "sampler": f"{inner} waypoints, no training",
            "seeds": len(rooms),
            "right plans (%)": 100 * statistics.fmean(of[str(inner)] for of in rooms),
            "± 95%": half_width([100 * of[str(inner)] for of in rooms]),
        }
        for inner in study.inner
    ]


def _line_rows(written: Results) -> list[dict[str, Any]]:
    return [
        {
            "method": f"lines: {name}",
            "sampler": sampler,
            "seeds": len(results),
            "nats per byte": _mean(_values(results, "nats_per_byte")),
            "length distance (bytes)": _mean(_values(results, "lengths", sampler, "wasserstein")),
            "length TV": _mean(_values(results, "lengths", sampler, "tv")),
            "parameters": results[0]["parameters"],
            "ms per step": 1000 * statistics.fmean(result["seconds"] / result["steps"] for result in results),
        }
        for name, results in written.items()
        for sampler in _by_sampler(results, "lengths", "tv")
    ]


experiment = Experiment(
    name="diffusion.flex",
    title="Inserting masks plans through waypoints that a canvas of fixed length has to place beforehand",
    paper="Kim et al., Any-Order Flexible Length Masked Diffusion, arXiv 2509.01025",
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "5 s", "cpu": "6 min of one core", "gpu": "not measured"},
    run=run,
    claims=(
        Claim(
            "planning",
            "FlexMDM makes more right plans than masked diffusion with equally spaced waypoints",
            "92.3 / 90.4 / 90.0% against 68.4 / 29.3 / 24.2% with 2 / 7 / 12 waypoints, 41 x 41 pixels",
            " points more right plans",
            at_least=20.0,
        ),
        Claim(
            "steps",
            "More sampling steps make FlexMDM better: four times as many, at least twice as many right plans",
            "58.2% with 128 and 67.1% with 4096 steps (GSM8K, 8B parameters); the factor is ours",
            "x as many right plans",
            at_least=2.0,
        ),
        Claim(
            "plan_length",
            "Nobody tells FlexMDM the length, and its plans are as long as the right ones in the mean, within 5%",
            "no number for mazes",
            "% agreement of mean lengths",
            at_least=95.0,
        ),
        Claim(
            "room",
            "Equally spaced waypoints leave legs no room, the more of them the less, on a canvas for 99% of the paths",
            "masked diffusion falls from 68.4% with 2 waypoints to 24.2% with 12",
            " points less with 12 waypoints than with 2",
            at_least=44.2,
        ),
        *(
            Claim(
                f"{word}_steps_length",
                f"With {word} steps, lengths of FlexMDM's texts are closer to the data's than masked diffusion's",
                "good at 256 steps, masked diffusion distorted at 1024 (histograms, OpenWebText)",
                " bytes closer",
                at_least=0.0,
            )
            for word in ("few", "many")
        ),
    ),
    figures=figures,
    papers=(
        Paper(
            "Any-Order Flexible Length Masked Diffusion",
            "2509.01025",
            (
                "Jaeyeon Kim",
                "Lee Cheuk-Kit",
                "Carles Domingo-Enrich",
                "Yilun Du",
                "Sham Kakade",
                "Timothy Ngotiaoco",
                "Sitan Chen",
                "Michael Albergo",
            ),
        ),
    ),
)
