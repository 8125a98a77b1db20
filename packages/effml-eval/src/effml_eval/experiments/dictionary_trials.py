"""The trials that experiments on concept autoencoders share: which dictionaries are trained, and how they are judged.

For each seed, from rows of both modalities mixed: BatchTopK twice, from two seeds, and TopK and JumpReLU once, at the
same number of active concepts, rows and steps; PCA, k-means, ICA and semi-NMF at that number of active codes; then the
concepts of the first BatchTopK dictionary are read. With the first seed, all of them at other numbers of active ones,
for a picture of the front. Autoencoders and the record of all concepts of the first seed stand in the run directory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from effml_shared import distributed, seeding
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.runs import Run, Trial
from effml_shared.trainings import half_width
from effml_shared.tree import read_tree, write_tree
from torch import Tensor

from effml_eval.experiments.concept_claims import KINDS, MAIN, TWIN, effects
from effml_eval.experiments.sae_measures import ConceptMeasures, linear_points
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.training import SAETrainingConfig, train_sae

__all__ = ["REPORT", "DictionaryConfig", "DictionaryTrials", "Rows", "number_row"]

REPORT = "concepts.safetensors"
"""File in the run directory: the record of every concept of the first seed's dictionary."""


@dataclass
class DictionaryConfig:
    """What learns the embeddings, and how its concepts are read."""

    n_concepts: int = 256  # of every dictionary
    k: int = 8  # active ones per row
    other_ks: list[int] = field(default_factory=lambda: [4, 16])  # with the first seed, for a picture of the front
    steps: int = 1_500
    batch_size: int = 1_024  # rows per step
    lr: float = 3e-3  # peak, of Adam
    bandwidth: float = 0.03  # of JumpReLU's kernel
    initial_threshold: float = 0.1  # of JumpReLU
    sparsity_weight: float = 0.05  # of JumpReLU's loss (L0 / k - 1)^2
    linear_rows: int = 16_000  # that the linear methods are fit to
    top: int = 64  # concepts that count as strong, and as many as weak
    bridges: int = 100  # strongest ones that are judged
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("n_concepts", "k", "steps", "batch_size", "linear_rows", "top", "bridges", "seeds"):
            check_count(name, getattr(self, name), 1)
        for name in ("lr", "bandwidth", "initial_threshold"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a number > 0")
        check_range("sparsity_weight", self.sparsity_weight, 0.0)
        for k in self.other_ks:
            check_count("other_ks", k, 1)
        if max(self.k, self.top, *self.other_ks) > self.n_concepts:
            got = f"{self.k}, {self.other_ks} and {self.top}"
            raise ConfigError(f"k, other_ks, top: got {got}, expected at most {self.n_concepts} concepts")

    def check_rows(self, rows: int, source: str) -> None:
        """Raise a `ConfigError` where the linear methods would get fewer rows than concepts."""
        if self.n_concepts > min(self.linear_rows, rows):
            raise ConfigError(f"linear_rows: got {self.linear_rows}, expected at least {self.n_concepts} of {source}")

    @property
    def samples(self) -> int:
        """Rows that all trainings of dictionaries consume together."""
        trainings = self.seeds * (len(KINDS) + 1) + len(self.other_ks) * len(KINDS)
        return trainings * self.steps * self.batch_size

    def autoencoder(self, kind: str, k: int, rows: Tensor, seed: int) -> SAEConfig:
        """Return the configuration of a kind for rows (N, d); a concept is dead after an epoch without firing."""
        return SAEConfig(
            d_in=rows.shape[1],
            n_concepts=self.n_concepts,
            kind=kind,
            k=k,
            dead_after=len(rows),
            l0_target=float(k) if kind == "jumprelu" else None,
            sparsity_weight=self.sparsity_weight if kind == "jumprelu" else 0.0,
            bandwidth=self.bandwidth,
            initial_threshold=self.initial_threshold,
            seed=seed,
        )


class Rows(NamedTuple):
    """Embeddings of both modalities.

    Fields:
        train: (N, d), to learn from.
        held_out: (M, d), to be judged on.
    """

    train: Tensor
    held_out: Tensor


Read = Callable[[int, SparseAutoencoder, SparseAutoencoder], ConceptMeasures]
"""`read(seed, sae, other)`: the measures of a dictionary, and of what another seed found."""


class DictionaryTrials:
    """All trials of a run.

    Args:
        config: what is trained.
        run: where it is recorded.
        rows: of a seed, the same at every call.
        read: measures the concepts of a seed's dictionary.
    """

    def __init__(self, config: DictionaryConfig, run: Run, rows: Callable[[int], Rows], read: Read) -> None:
        self.config, self.run, self.rows, self.read = config, run, rows, read

    def results(self) -> dict[str, Any]:
        """Train everything and return effects per seed, a table, and what the figures need."""
        config, run = self.config, self.run
        points: dict[str, list[dict[str, Any]]] = {}
        front: dict[str, list[dict[str, Any]]] = {}
        read: list[dict[str, Any]] = []
        for seed in range(1, config.seeds + 1):
            for name, kind in {**KINDS, TWIN: KINDS[MAIN]}.items():
                found = run.trial(f"{name}/seed={seed}", partial(self._train, name, kind, config.k, seed))
                points.setdefault(name, []).append(found)
            linear = run.trial(f"linear methods/seed={seed}", partial(self._linear, seed))["points"]
            for name, found in linear.items():
                points.setdefault(name, []).append(found[0])
                if seed == 1:
                    front[name] = found
            trained = points[MAIN][-1]["r2"] is not None and points[TWIN][-1]["r2"] is not None
            measured = partial(self._measure, seed)
            read.append(run.trial(f"concepts/seed={seed}", measured) if trained else {"numbers": {}, "columns": {}})
        for name, kind in KINDS.items():
            more = [
                run.trial(f"{name}, k={k}/seed=1", partial(self._train, f"{name}, k={k}", kind, k, 1))
                for k in config.other_ks
            ]
            front[name] = [points[name][0], *more]
        names = list(next((row["numbers"] for row in read if row["numbers"]), {}))
        numbers = {name: [row["numbers"].get(name) for row in read] for name in names}
        return {
            "effects": effects(points, numbers, config.seeds),
            "table": [*map(_point_row, points, points.values()), *map(number_row, numbers, numbers.values())],
            "points": _places(points),
            "front": _places(front),
            "numbers": numbers,
            "columns": read[0]["columns"],
        }

    def _train(self, name: str, kind: str, k: int, seed: int, trial: Trial) -> dict[str, Any]:
        """Train one autoencoder, store it in the run directory and return its place on the front."""
        config, device, rows = self.config, distributed.default_device(), self.rows(seed)
        sae = SparseAutoencoder(config.autoencoder(kind, k, rows.train, seeding.derive_seed(seed, name))).to(device)
        order = seeding.derive_seed(seed, name, "order")
        try:
            result = train_sae(
                sae,
                rows.train,
                SAETrainingConfig(config.steps, config.batch_size, config.lr, seed=order),
                held_out=rows.held_out.to(device),
                hooks=trial.hooks,
                directory=trial.checkpoints.directory,
            )
        except NonFiniteError:
            samples = config.steps * config.batch_size
            return {"r2": None, "l0": None, "dead": None, "steps": 1, "seconds": 0.0, "samples": samples}
        if distributed.is_main():
            path = self._stored(name, seed)
            path.parent.mkdir(exist_ok=True)
            write_tree(path, sae.state_dict())
        found = {key: result.history[-1][key] for key in ("r2", "l0", "dead")}
        clock = result.clock
        return {**found, "steps": clock.step, "seconds": clock.seconds, "samples": clock.samples}

    def _stored(self, name: str, seed: int) -> Path:
        return self.run.path / "autoencoders" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"

    def _load(self, name: str, seed: int) -> SparseAutoencoder:
        config = self.config.autoencoder(KINDS[MAIN], self.config.k, self.rows(seed).train, seed)
        sae = SparseAutoencoder(config)
        sae.load_state_dict(read_tree(self._stored(name, seed)))
        return sae.to(distributed.default_device()).eval()

    def _linear(self, seed: int, trial: Trial) -> dict[str, Any]:
        """Fit the linear methods to some of the rows, drawn at random."""
        config, device, rows = self.config, distributed.default_device(), self.rows(seed)
        order = torch.randperm(len(rows.train), generator=seeding.generator(seed, "linear rows"))
        fit, judged = rows.train[order[: config.linear_rows]].to(device), rows.held_out.to(device)
        ks = [config.k, *(config.other_ks if seed == 1 else ())]
        return {"points": linear_points(fit, judged, config.n_concepts, ks, seed)}

    def _measure(self, seed: int, trial: Trial) -> dict[str, Any]:
        """Read the concepts of a seed's first BatchTopK dictionary; the first seed's record is stored."""
        found = self.read(seed, self._load(MAIN, seed), self._load(TWIN, seed))
        if seed == 1 and distributed.is_main():
            found.report.save(self.run.path / REPORT)
        return {"numbers": found.numbers, "columns": found.columns if seed == 1 else {}}


def _places(points: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, float | None]]]:
    return {name: [{key: row[key] for key in ("l0", "r2")} for row in rows] for name, rows in points.items()}


def _summary(values: list[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {"mean": statistics.fmean(known) if whole else None, "± 95%": half_width(known) if whole else None}


def _point_row(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    sparsity = _summary([row["l0"] for row in rows])["mean"]
    return {"what": f"R² of {name}", **_summary([row["r2"] for row in rows]), "active codes": sparsity}


def number_row(name: str, values: list[float | None]) -> dict[str, Any]:
    """Return the line of a number, one per seed, in the table of results."""
    return {"what": name, **_summary(values), "active codes": None}
