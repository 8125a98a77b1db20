"""`eval.sae`: what sparse autoencoders find in a joint space of images and captions, where every true concept is known.

Protocol. For each seed a small world of paired embeddings is drawn (`paired_world`), and autoencoders learn it from
both modalities mixed: BatchTopK twice, from two seeds, and TopK and JumpReLU once, at the same number of active
concepts, rows and steps. All are judged on held-out pairs, beside PCA, k-means, ICA and semi-NMF at that number of
active codes. The first BatchTopK dictionary is then read: are its concepts those of the second (stability), which carry
the mass (energy), do they fire for one modality (score), do they lie along the modality axis, does one alone tell the
modalities apart, and do the strongest bridges link an image concept with the text concept of the same meaning? The
bridges add up to the mean similarity of reconstructed pairs; the table shows both sides. The record of all concepts
stands in the run directory.

Source: arXiv 2504.11695, on CLIP-like models and 600,000 embeddings of COCO; its training settings are not known. This
world, its sizes and the numbers that count as holding are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from effml_shared import seeding
from effml_shared.checks import check_count
from effml_shared.experiments import Experiment
from effml_shared.runs import Run

from effml_eval.experiments.concept_claims import CLAIMS
from effml_eval.experiments.dictionary_trials import DictionaryConfig, DictionaryTrials, Rows
from effml_eval.experiments.paired_world import PairedWorld, PairedWorldConfig, Pairs, linked_fraction, make_world
from effml_eval.experiments.paper import PAPER
from effml_eval.experiments.sae_figures import figures
from effml_eval.experiments.sae_measures import ConceptMeasures, measure_concepts_of
from effml_eval.sae.autoencoder import SparseAutoencoder

__all__ = ["ConceptsConfig", "experiment"]


@dataclass
class ConceptsConfig(DictionaryConfig):
    """A world, and what learns it."""

    world: PairedWorldConfig = field(default_factory=PairedWorldConfig)
    pairs: int = 16_000  # to learn from: twice as many rows
    held_out: int = 4_000  # pairs

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pairs", "held_out"):
            check_count(name, getattr(self, name), 1)
        self.check_rows(2 * self.pairs, "2 x pairs")


def smoke() -> ConceptsConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    world = PairedWorldConfig(dim=8, concepts=6, per_pair=2)
    return ConceptsConfig(
        world=world,
        pairs=40,
        held_out=20,
        n_concepts=12,
        k=2,
        other_ks=[3],
        steps=4,
        batch_size=16,
        linear_rows=40,
        top=3,
        bridges=5,
        seeds=1,
    )


def cpu() -> ConceptsConfig:
    """Return the default: 96 true concepts in 64 dimensions, dictionaries of 256."""
    return ConceptsConfig()


def gpu() -> ConceptsConfig:
    """Return 1,536 true concepts in 512 dimensions, dictionaries of 4,096 and 32 active of them, 100,000 pairs."""
    return ConceptsConfig(
        world=PairedWorldConfig(dim=512, concepts=1_536, per_pair=20, noise=0.007),
        pairs=100_000,
        held_out=10_000,
        n_concepts=4_096,
        k=32,
        other_ks=[16, 64],
        steps=6_000,
        batch_size=4_096,
        lr=5e-4,
        bandwidth=0.01,
        initial_threshold=0.05,
        linear_rows=20_000,
        top=1_024,
        bridges=1_000,
    )


def run(config: ConceptsConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""

    def rows(seed: int) -> Rows:
        _, train, held_out = _world(config, seed)
        return Rows(torch.cat(train[:2]), torch.cat(held_out[:2]))

    def read(seed: int, sae: SparseAutoencoder, other: SparseAutoencoder) -> ConceptMeasures:
        world, _, held_out = _world(config, seed)
        captions = [f"concepts {', '.join(map(str, sorted(row)))}" for row in held_out.concepts.tolist()]
        return measure_concepts_of(
            sae,
            other,
            held_out.image,
            held_out.text,
            top=config.top,
            edges=config.bridges,
            seed=seed,
            linked=lambda report, edges: linked_fraction(world, sae.dictionary.detach().cpu(), edges),
            image_labels=captions,
            text_labels=captions,
            data="paired world, held out",
        )

    run.expect(config.samples)
    return DictionaryTrials(config, run, rows, read).results()


def _world(config: ConceptsConfig, seed: int) -> tuple[PairedWorld, Pairs, Pairs]:
    """Return a seed's world with the pairs to learn from and the ones held out."""
    world = make_world(config.world, seed)
    return (
        world,
        world.draw(config.pairs, seeding.generator(seed, "training pairs")),
        world.draw(config.held_out, seeding.generator(seed, "held-out pairs")),
    )


experiment = Experiment(
    name="eval.sae",
    title="Sparse dictionaries of a joint image-text space: strong concepts are stable, one-sided, and bridged",
    paper="Papadimitriou et al., Interpreting the linear structure of vision-language model embedding spaces, "
    "arXiv 2504.11695",
    papers=(PAPER,),
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "2 s", "cpu": "4 min on one core", "gpu": "not measured"},
    run=run,
    claims=CLAIMS,
    figures=figures,
)
