"""Lines of real text for `diffusion.flex`: how long generated ones are, and what they cost in nats, length included.

The texts are lines of a corpus without their indentation, of at most `longest` bytes. FlexMDM generates them from
nothing. Masked diffusion has a canvas of `longest` tokens on which pads follow the text and are tokens like any other;
of what it generates all pads are removed, wherever they stand.

Both likelihood bounds are of the same thing, -log p(line), the length included, since a line has just one canvas: the
one of `FlexMDM.nelbo`, tight at the best predictions, and that of the whole canvas for masked diffusion. That may give
probability to canvases with pads between tokens, which are no lines; its bound pays for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from effml_shared import distributed, seeding
from effml_shared.checks import check_count
from effml_shared.data.corpora import DataConfig, read_documents
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import ConfigError
from effml_shared.runs import Trial
from torch import Tensor

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
from effml_diffusion.flex import Flex, FlexMDM, length_statistics
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers.ancestral import Ancestral

__all__ = ["FLEX", "MDM", "TextStudy", "Texts", "train_flex", "train_mdm"]

FLEX, MDM = "FlexMDM", "MDM, padded canvas"
MASK_ID, PAD_ID, VOCAB_SIZE = 256, 257, 258  # after the bytes


@dataclass
class TextStudy:
    """The texts, the networks and how they are tested."""

    corpus: str = "stdlib"  # see `effml_shared.data.DataConfig`
    max_bytes: int = 4_000_000  # of the corpus that are read
    longest: int = 48  # bytes of a line
    shape: Shape = field(default_factory=lambda: Shape(n_layers=2))
    training: Training = field(default_factory=lambda: Training(steps=250))
    sampling_steps: list[int] = field(default_factory=lambda: [16, 64])  # few, then many
    generated: int = 200  # texts
    scored: int = 64  # held-out texts whose bound is estimated
    draws: int = 16  # per text

    def __post_init__(self) -> None:
        for name, least in (("max_bytes", 1), ("longest", 2), ("generated", 2), ("scored", 1), ("draws", 2)):
            check_count(name, getattr(self, name), least)
        if self.draws % 2:
            raise ConfigError(f"draws: got {self.draws}, expected an even number")
        if len(self.sampling_steps) < 2 or min(self.sampling_steps) < 2:
            raise ConfigError(f"sampling_steps: got {self.sampling_steps}, expected at least two numbers >= 2")


class Texts:
    """A source for `SampleStream`: lines in random order, with replacement.

    Attributes:
        lines: (texts, longest) int64 bytes, padded.
    """

    draws = 1

    def __init__(self, study: TextStudy, split: Any) -> None:
        config = DataConfig(corpus=study.corpus, max_bytes=study.max_bytes, held_out=0.1)
        tokenizer, rows = ByteTokenizer(), []
        for document in read_documents(config, split):
            for line in document.splitlines():
                ids = tokenizer.encode(line.strip())
                if 0 < len(ids) <= study.longest:
                    rows.append(ids)
        if len(rows) < 2:
            raise ConfigError(f"longest: got {study.longest}, expected more: hardly a line is so short")
        table = np.full((len(rows), study.longest), PAD_ID, np.int64)
        for place, ids in enumerate(rows):
            table[place, : len(ids)] = ids
        self.lines, self.fingerprint = torch.from_numpy(table), f"{study.corpus} {split} {table.shape}"

    @cached_property
    def lengths(self) -> Tensor:
        """(texts,) int64."""
        return (self.lines != PAD_ID).sum(1)

    def batch(self, numbers: Tensor) -> Batch:
        """Return some lines (rows, longest), their lengths, and that nothing of them is given."""
        chosen = numbers[:, 0] % len(self.lines)
        ids = self.lines[chosen]
        nothing = torch.zeros(len(ids), ids.shape[1] + 1, dtype=torch.bool)
        return {"input_ids": ids, "lengths": self.lengths[chosen], "fixed": nothing[:, 1:], "closed": nothing}


def train_flex(study: TextStudy, texts: Texts, held_out: Texts, seed: int, trial: Trial) -> dict[str, Any]:
    """Train a FlexMDM and measure its lengths and its bound."""
    fields: dict[str, Any] = {"gap_head": "expectation", "max_length": study.longest, "pad_id": PAD_ID}
    model = make_network(study.shape, VOCAB_SIZE, seed, **fields)
    flex = FlexMDM(model, MASK_ID, PAD_ID, study.longest, reduction="token")

    def measure() -> dict[str, Any]:
        lengths = {}
        for steps in study.sampling_steps:
            for name, closing in (("paper's", False), ("closing insertion", True)):
                sampler = Flex(steps, mode="vanilla", insert_last=closing)
                output = sampler(flex, study.generated, generator=seeding.generator(seed, "lengths", steps, name))
                lengths[f"{name}, {steps} steps"] = _compare(output.lengths.cpu(), held_out)
        bound = flex.nelbo(_scored(study, held_out), n_mc=study.draws, groups=2, generator=_draws(seed))
        return {"lengths": lengths, "nats_per_byte": float(bound.nats.sum() / bound.n_tokens.sum())}

    data = Batches(stream(texts, seed), partial(shortest_first, flex))
    micro_batch = study.training.micro_batch
    return train(trial, model, flex.loss_terms, data, study.training, seed, measure=measure, micro_batch=micro_batch)


def train_mdm(study: TextStudy, texts: Texts, held_out: Texts, seed: int, trial: Trial) -> dict[str, Any]:
    """Train a masked diffusion model and measure its lengths and its bound."""
    model = make_network(study.shape, VOCAB_SIZE, seed)
    diffusion = MaskedDiffusion(model, MASK_ID, time_conditioning="alpha")

    def measure() -> dict[str, Any]:
        blank = torch.full((study.generated, study.longest), MASK_ID, device=distributed.default_device())
        lengths = {}
        for steps in study.sampling_steps:
            sampler = Ancestral(steps=steps, final="sample")
            output = sampler(diffusion, blank, generator=seeding.generator(seed, "lengths", steps))
            lengths[f"ancestral, {steps} steps"] = _compare((output.ids != PAD_ID).sum(1).cpu(), held_out)
        scored = _scored(study, held_out)
        bound = diffusion.nelbo(scored, n_mc=study.draws, groups=2, generator=_draws(seed))
        return {"lengths": lengths, "nats_per_byte": float(bound.nats.sum() / (scored != PAD_ID).sum())}

    data = Batches(stream(texts, seed), lambda samples: {"input_ids": samples["input_ids"]})
    return train(trial, model, diffusion.loss_terms, data, study.training, seed, measure=measure)


def _compare(lengths: Tensor, held_out: Texts) -> dict[str, Any]:
    """Return how far these lengths are from those of held-out lines, and how often each occurs."""
    found = length_statistics(lengths, held_out.lengths, bin_width=4)
    return {
        "wasserstein": found.wasserstein,
        "tv": found.tv,
        "kl": found.kl,
        "mean": found.mean,
        "histogram": torch.bincount(lengths, minlength=held_out.lines.shape[1] + 1).tolist(),
    }


def _scored(study: TextStudy, held_out: Texts) -> Tensor:
    """Return held-out lines, the same for every method and seed."""
    order = torch.randperm(len(held_out.lines), generator=seeding.generator(0, "scored"))
    return held_out.lines[order[: study.scored]].to(distributed.default_device())


def _draws(seed: int) -> torch.Generator:
    return seeding.generator(seed, "bound")
