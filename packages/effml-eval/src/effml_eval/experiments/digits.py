"""`eval.digits`: concepts in a joint space of real images and captions, small enough to be trained here.

Protocol. The 1,797 handwritten digits of scikit-learn are split; each gets captions that name the digit and some of
what can be measured of its strokes, slant and width. For each seed (of split, captions and weights) a miniature of CLIP
is trained on the training images with several captions each. On its embeddings of these, both modalities mixed, the
dictionaries of `dictionary_trials` are trained, and judged on held-out images with one caption each. A bridge is right
if the strongest images of its one end and the strongest captions of its other share, beyond chance, the same fact. The
record of all concepts stands in the run directory, and a page to walk through them, with images and captions.

Source: arXiv 2504.11695, on CLIP-like models and 600,000 embeddings of COCO. Data, model and the numbers that count as
holding are ours; the latter are those of `eval.sae`, where all true concepts are known but nothing is an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from effml_shared import distributed, seeding
from effml_shared.checks import check_count
from effml_shared.data import Loader
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.experiments import Claim, Experiment
from effml_shared.loop import Budget, Loop
from effml_shared.runs import Run, Trial
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep
from effml_shared.tree import read_tree, write_tree
from torch import Tensor

from effml_eval.concepts.pair_alignment import pair_alignment
from effml_eval.experiments.concept_claims import CLAIMS, combined, ratio
from effml_eval.experiments.dictionary_trials import DictionaryConfig, DictionaryTrials, Rows, number_row
from effml_eval.experiments.digit_captions import bags_of_words, draw_captions
from effml_eval.experiments.digit_concepts import Captioned, read_concepts, write_page
from effml_eval.experiments.digit_figures import figures
from effml_eval.experiments.handwritten_digits import Digits, load_digits
from effml_eval.experiments.joint_embedding import CaptionedImages, EmbeddingConfig, JointEmbedding, contrastive_loss
from effml_eval.experiments.paper import PAPER
from effml_eval.experiments.sae_measures import ConceptMeasures
from effml_eval.sae.autoencoder import SparseAutoencoder

__all__ = ["PAGE", "DigitsConfig", "experiment"]

PAGE = "concepts.html"
"""File in the run directory: the concepts of the first seed's dictionary, to walk through."""

IMAGES = 1_797  # in the data


@dataclass
class DigitsConfig(DictionaryConfig):
    """Images, their embedding, and what learns it."""

    n_concepts: int = 128
    k: int = 4
    other_ks: list[int] = field(default_factory=lambda: [2, 8])
    steps: int = 1_000
    batch_size: int = 512
    sparsity_weight: float = 2.0
    top: int = 32
    seeds: int = 4  # splits
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    train_images: int = 1_200
    held_out: int = 597  # images, with one caption each

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_images", "held_out"):
            check_count(name, getattr(self, name), 1)
        if self.train_images + self.held_out > IMAGES:
            got = f"{self.train_images} and {self.held_out}"
            raise ConfigError(f"train_images, held_out: got {got}, expected at most {IMAGES} together")
        self.check_rows(2 * self.train_images * self.embedding.captions, "2 x train_images x captions")


def smoke() -> DigitsConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return DigitsConfig(
        n_concepts=12,
        k=2,
        other_ks=[3],
        steps=4,
        batch_size=16,
        linear_rows=40,
        top=3,
        bridges=5,
        seeds=1,
        embedding=EmbeddingConfig(dim=8, width=2, captions=2, steps=4, batch_size=8),
        train_images=30,
        held_out=20,
    )


def cpu() -> DigitsConfig:
    """Return the default: 32 dimensions, dictionaries of 128."""
    return DigitsConfig()


def gpu() -> DigitsConfig:
    """Return 128 dimensions, dictionaries of 1,024, more captions and more seeds; the images are the same."""
    return DigitsConfig(
        n_concepts=1_024,
        k=8,
        other_ks=[4, 16],
        steps=4_000,
        batch_size=2_048,
        lr=1e-3,
        top=256,
        bridges=400,
        seeds=8,
        embedding=EmbeddingConfig(dim=128, width=64, captions=32, steps=1_000, batch_size=512, lr=1e-3),
    )


def run(config: DigitsConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    digits, seeds = load_digits(), range(1, config.seeds + 1)
    embedding = config.embedding
    run.expect(config.samples + config.seeds * embedding.steps * embedding.batch_size)
    trained = [
        run.trial(f"joint embedding/seed={seed}", partial(_embed, config, digits, seed, run))["held out"]
        for seed in seeds
    ]
    table = [number_row(name, [row.get(name) for row in trained]) for name in trained[0]]
    if any(None in row.values() for row in trained):
        return {"effects": {claim.effect: [None] * config.seeds for claim in claims}, "table": table}

    def rows(seed: int) -> Rows:
        found = read_tree(_stored(run, seed))
        images = found["train_images"].repeat_interleave(embedding.captions, 0)
        return Rows(torch.cat([images, found["train_captions"]]), torch.cat([found["images"], found["captions"]]))

    def read(seed: int, sae: SparseAutoencoder, other: SparseAutoencoder) -> ConceptMeasures:
        found = read_tree(_stored(run, seed))
        _, pairs = _split(config, digits, seed)
        sides = found["images"], found["captions"]
        measures = read_concepts(sae, other, *sides, digits, pairs, top=config.top, edges=config.bridges, seed=seed)
        if seed == 1 and distributed.is_main():
            write_page(run.path / PAGE, measures.report, sae.dictionary.detach().cpu(), digits, pairs)
        return measures

    results = DictionaryTrials(config, run, rows, read).results()
    unknown: list[float | None] = [None] * config.seeds
    linked, chance = (results["numbers"].get(f"linked {how}", unknown) for how in ("by bridge", "at random"))
    results["effects"]["same meaning"] = linked
    results["effects"]["beyond chance"] = [combined(ratio, *pair) for pair in zip(linked, chance, strict=True)]
    return {**results, "table": [*table, *results["table"]]}


def _split(config: DigitsConfig, digits: Digits, seed: int) -> tuple[Captioned, Captioned]:
    """Return a seed's training pairs, the captions of an image side by side, and its held-out pairs."""
    order = torch.randperm(IMAGES, generator=seeding.generator(seed, "split"))
    train = order[: config.train_images].repeat_interleave(config.embedding.captions)
    held_out = order[config.train_images :][: config.held_out]
    return (
        Captioned(train, *draw_captions(digits.facts[train], seeding.generator(seed, "training captions"))),
        Captioned(held_out, *draw_captions(digits.facts[held_out], seeding.generator(seed, "held-out captions"))),
    )


def _stored(run: Run, seed: int) -> Path:
    return run.path / "embeddings" / f"{seed}.safetensors"


def _embed(config: DigitsConfig, digits: Digits, seed: int, run: Run, trial: Trial) -> dict[str, Any]:
    """Train a joint embedding, store the embeddings in the run directory and return how well pairs lie together."""
    settings, device = config.embedding, distributed.default_device()
    train, held_out = _split(config, digits, seed)
    pixels, bags = digits.pixels.float(), bags_of_words(train.captions)
    model = JointEmbedding(settings, seed=seed).to(device)
    network = distributed.parallelize(model, "ddp")
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    samples = settings.steps * settings.batch_size
    pairs = CaptionedImages(pixels[train.rows], bags)

    @torch.no_grad()
    def images(rows: Tensor) -> Tensor:
        return model.embed_images(pixels[rows].to(device)).cpu()

    @torch.no_grad()
    def captions(texts: Sequence[str]) -> Tensor:
        return model.embed_captions(bags_of_words(texts).to(device)).cpu()

    def evaluate() -> dict[str, float]:
        image, text = images(held_out.rows), captions(held_out.captions)
        named = image @ captions([f"the digit {number}" for number in range(10)]).T
        found = pair_alignment(image, text, ks=(10,))
        return {
            "images whose digit is named right": float(
                (named.argmax(1) == digits.digits[held_out.rows]).double().mean()
            ),
            "captions found among the 10 nearest": found.image_to_text[10],
            "cosine of pairs": found.similarity,
            "cosine of strangers": float((image.double().mean(0) * text.double().mean(0)).sum()),
            "gap between the modalities": found.gap,
        }

    loop = Loop(
        GradientStep(network, optimizer, contrastive_loss, clip_norm=1.0),
        Loader(pairs, seed=seed, rank=distributed.rank(), world_size=distributed.world_size()),
        cosine(settings.batch_size, samples, warmup=settings.steps // 20 * settings.batch_size),
        budget=Budget(samples=samples),
        hooks=trial.hooks,
        evaluate=evaluate,
        checkpoints=trial.checkpoints,
        seed=seed,
    )
    try:
        clock = loop.run()
    except NonFiniteError:
        unknown = dict.fromkeys(("images whose digit is named right", "cosine of pairs"))
        return {"held out": unknown, "steps": 1, "seconds": 0.0, "samples": samples}
    with distributed.agreed("storing embeddings"):
        if distributed.is_main():
            path = _stored(run, seed)
            path.parent.mkdir(exist_ok=True)
            learnt = images(train.rows[:: settings.captions]), captions(train.captions)
            judged = images(held_out.rows), captions(held_out.captions)
            names = ("train_images", "train_captions", "images", "captions")
            write_tree(path, dict(zip(names, (*learnt, *judged), strict=True)))
    found = {name: value for name, value in loop.evaluation.items() if name != "step"}
    return {"held out": found, "steps": clock.step, "seconds": clock.seconds, "samples": samples}


claims = (
    *CLAIMS,
    Claim(
        "same meaning",
        "The strongest bridges link images and captions of the same meaning",
        "matching pairs by eye; the rule of one meaning per concept is ours",
        " of the strongest bridges link top inputs that share a fact",
        at_least=0.5,
    ),
    Claim(
        "beyond chance",
        "The strongest bridges link the same meaning more often than any two concepts do",
        "matching pairs by eye; the comparison is ours",
        " times as many true links as among all pairs of concepts",
        at_least=1.5,
    ),
)

experiment = Experiment(
    name="eval.digits",
    title="Sparse dictionaries of a joint space of real images and captions, trained here: handwritten digits",
    paper="Papadimitriou et al., Interpreting the linear structure of vision-language model embedding spaces, "
    "arXiv 2504.11695",
    papers=(PAPER,),
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "3 s", "cpu": "2 min on one core", "gpu": "not measured"},
    run=run,
    claims=claims,
    figures=figures,
)
