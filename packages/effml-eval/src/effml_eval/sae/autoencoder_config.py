"""Configuration of a sparse autoencoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError

from effml_eval.sae.jumprelu import KERNELS

__all__ = ["KINDS", "SAEConfig"]

KINDS = ("batch_topk", "topk", "relu", "jumprelu", "matching_pursuit")


@dataclass
class SAEConfig:
    """What a `SparseAutoencoder` is.

    Raises:
        ConfigError: a field is out of range, or both or neither of `n_concepts` and `expansion` are given.
    """

    d_in: int  # dimension of an embedding, d
    n_concepts: int | None = None  # C; None: expansion * d_in
    expansion: float | None = None  # C / d
    kind: str = "batch_topk"  # one of KINDS
    k: float = (
        32  # active concepts per row: at most (topk), on average (batch_topk, may be fractional), rounds (pursuit)
    )
    k_start: float | None = None  # k at the first step, such as d_in; None: k
    k_steps: int = 0  # over which k goes from k_start to k, linearly; 5 to 10 % of the training
    pre_bias: bool = False  # learn a vector that is taken from x and added to x_hat; off for unit embeddings
    tied_init: bool = True  # the encoder starts as the dictionary, then is free
    normalize: str = "project"  # atoms of unit norm: project (after each step), graph (inside the model), none
    aux_alpha: float = 1 / 32  # weight of the loss that revives dead concepts; 0: none
    dead_after: int = 10_000_000  # samples without firing after which a concept is dead; for embeddings, one epoch
    sparsity_weight: float = 0.0  # lambda of the L1 (relu) or L0 (jumprelu) loss
    l0_target: float | None = None  # jumprelu: the L0 loss becomes lambda (L0 / target - 1)^2
    bandwidth: float = 1e-3  # jumprelu: width of the kernel, in units of pre-activations
    kernel: str = "rectangle"  # jumprelu: a name in `jumprelu.KERNELS`
    initial_threshold: float = 1e-3  # jumprelu
    threshold_decay: float | None = None  # beta of batch_topk's average; None: .999, or what training steps suggest
    seed: int = 0  # of the dictionary at the start

    def __post_init__(self) -> None:
        check_count("d_in", self.d_in, 1)
        if (self.n_concepts is None) == (self.expansion is None):
            got = f"{self.n_concepts} and {self.expansion}"
            raise ConfigError(f"n_concepts, expansion: got {got}, expected exactly one of them")
        if self.n_concepts is None:
            assert self.expansion is not None
            check_range("expansion", self.expansion, 0.0)
        check_count("n_concepts", self.concepts, 1)
        check_choice("kind", self.kind, KINDS)
        check_choice("normalize", self.normalize, ("project", "graph", "none"))
        check_choice("kernel", self.kernel, KERNELS)
        if self.kind in ("batch_topk", "topk") and not 0 < self.k <= self.concepts:
            raise ConfigError(f"k: got {self.k}, expected a number in (0, {self.concepts}]")
        if self.kind in ("topk", "matching_pursuit") and (self.k != int(self.k) or self.k < 1):
            raise ConfigError(f"k: got {self.k}, expected an integer >= 1 for {self.kind}")
        self._check_annealing()
        if self.kind == "matching_pursuit" and self.normalize == "none":
            raise ConfigError("normalize: got 'none', expected 'project' or 'graph': matching pursuit takes unit atoms")
        for name in ("aux_alpha", "sparsity_weight"):
            check_range(name, getattr(self, name), 0.0)
        check_count("dead_after", self.dead_after, 1)
        for name in ("bandwidth", "initial_threshold", "l0_target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: got {value}, expected a number > 0")
        if self.threshold_decay is not None:
            check_range("threshold_decay", self.threshold_decay, 0.0, 1.0)

    def _check_annealing(self) -> None:
        check_count("k_steps", self.k_steps, 0)
        if (self.k_start is None) != (self.k_steps == 0):
            got = f"{self.k_start} and {self.k_steps}"
            raise ConfigError(f"k_start, k_steps: got {got}, expected both a start and a number of steps, or neither")
        if self.k_start is None:
            return
        if self.kind in ("relu", "jumprelu"):
            raise ConfigError(f"k_start: got {self.k_start} for {self.kind}, expected None: it has no k")
        most = math.inf if self.kind == "matching_pursuit" else self.concepts
        if not 0 < self.k_start <= most or self.k_start == math.inf:
            raise ConfigError(f"k_start: got {self.k_start}, expected a number in (0, {most}]")

    def k_at(self, step: int) -> float:
        """Return k after a number of steps.

        >>> SAEConfig(d_in=8, n_concepts=64, kind="topk", k=4, k_start=32, k_steps=7).k_at(2)
        24.0
        """
        if self.k_start is None or step >= self.k_steps:
            return float(self.k)
        k = self.k_start + (self.k - self.k_start) * step / self.k_steps
        return k if self.kind == "batch_topk" else float(max(1, round(k)))

    @property
    def concepts(self) -> int:
        """Number of concepts, C."""
        return self.n_concepts if self.n_concepts is not None else round((self.expansion or 0) * self.d_in)
