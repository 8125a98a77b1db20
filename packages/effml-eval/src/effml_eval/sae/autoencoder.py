"""A sparse autoencoder: `z = Pi(x W^T + b)`, `x_hat = z D`, with Pi one of five sparsifiers; see `SAEConfig`.

State: W (C, d), b (C,), D (C, d), and buffers: BatchTopK's threshold and how often it was updated, samples since each
concept fired, k, and the number of steps. All of it is in `state_dict`, and only `after_step_` changes it, never the
forward pass. TopK and BatchTopK store codes and never the matrix of pre-activations: a training step costs 2 N d C
FLOPs for the encoder, and 8 N k d for everything else, in place of 10 N d C.

    out = sae(x)
    out.loss.backward()
    sae.before_step_()              # takes from the gradient what normalisation would undo
    clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    sae.after_step_(out)            # unit atoms, threshold, firing

The threshold is a bias-corrected running mean of each step's least code (arXiv 2412.06410 takes the plain mean); TopK
and the revival of dead concepts follow arXiv 2406.04093, JumpReLU 2407.14435, the joint image-text use 2504.11695.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from effml_shared import distributed, seeding
from effml_shared.config import to_dict
from effml_shared.errors import CheckpointError, ConfigError
from torch import Tensor, nn

from effml_eval.sae.archetypal import ArchetypalDictionary
from effml_eval.sae.atom_norms import normalize_rows_, remove_parallel_
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.geometric_median import geometric_median
from effml_eval.sae.jumprelu import active, jumprelu
from effml_eval.sae.matching_pursuit import matching_pursuit
from effml_eval.sae.model_files import read_model, write_model
from effml_eval.sae.revival import revival_loss
from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.sparse_decode import sparse_decode
from effml_eval.sae.sparse_encode import batch_topk_encode, threshold_encode, topk_encode

__all__ = ["SAEOutput", "SparseAutoencoder"]

_MODEL = "effml sparse autoencoder"
_EPS = 1e-8  # added to norms
_RENORMALIZE = 1000  # steps between renormalisations of the vectors that `normalize="graph"` divides by their norm


class SAEOutput(NamedTuple):
    """Result of a forward pass: reconstruction (..., d), codes, the loss to differentiate, and its parts, detached.

    `pre` holds the pre-activations (rows, C) of relu and jumprelu; the other kinds never make them. `losses` has
    `reconstruction` (mean over rows of the squared error) and, where they apply, `sparsity` and `revival`, before their
    weights.
    """

    x_hat: Tensor
    codes: SparseCodes | Tensor
    pre: Tensor | None
    loss: Tensor
    losses: dict[str, Tensor]


class SparseAutoencoder(nn.Module):
    """A dictionary of concepts and the encoder that finds the active ones.

    Args:
        config: see `SAEConfig`.
        dictionary: an archetypal dictionary to take the place of free atoms; needs `normalize="none"`.

    Raises:
        ConfigError: config and dictionary do not fit.

    >>> sae = SparseAutoencoder(SAEConfig(d_in=4, n_concepts=8, kind="topk", k=2))
    >>> sae(torch.eye(4)).codes.values.shape
    torch.Size([4, 2])
    """

    threshold: Tensor
    threshold_updates: Tensor
    samples_since_fired: Tensor
    steps: Tensor
    k: Tensor

    def __init__(self, config: SAEConfig, *, dictionary: ArchetypalDictionary | None = None) -> None:
        super().__init__()
        self.config = config
        concepts, dim = config.concepts, config.d_in
        generator = seeding.generator(config.seed, "dictionary")
        vectors = nn.functional.normalize(torch.randn(concepts, dim, generator=generator), dim=1)
        self.archetypes = dictionary
        if dictionary is None:
            self.atoms = nn.Parameter(vectors)
        else:
            shape = tuple(dictionary.relaxation.shape)
            if shape != (concepts, dim) or config.normalize != "none":
                expected = f"atoms ({concepts}, {dim}) and normalize='none'"
                raise ConfigError(f"dictionary: got atoms {shape} and {config.normalize!r}, expected {expected}")
        if config.kind != "matching_pursuit":
            free = torch.randn(concepts, dim, generator=generator)
            tied = vectors if dictionary is None else dictionary().detach()
            start = tied if config.tied_init else nn.functional.normalize(free, dim=1)
            self.encoder_weight = nn.Parameter(start.clone())
            self.encoder_bias = nn.Parameter(torch.zeros(concepts))
        self.pre_bias = nn.Parameter(torch.zeros(dim)) if config.pre_bias else None
        if config.kind == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((concepts,), config.initial_threshold).log())
        self.threshold_decay = 0.999 if config.threshold_decay is None else config.threshold_decay
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("samples_since_fired", torch.zeros(concepts, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("k", torch.tensor(config.k_at(0)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let a change of dtype never narrow the threshold and k."""
        kept = {"threshold": self.threshold, "k": self.k}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if not value.is_meta:
                now = getattr(self, name)
                setattr(self, name, value.to(now.device, torch.promote_types(value.dtype, now.dtype)))
        return self

    @property
    def dictionary(self) -> Tensor:
        """Atoms (C, d), one per row, as they decode."""
        if self.archetypes is not None:
            return self.archetypes()
        if self.config.normalize == "graph":
            return self.atoms / (self.atoms.norm(dim=1, keepdim=True) + _EPS)
        return self.atoms

    @property
    def dead(self) -> Tensor:
        """Which concepts (C,) have not fired for `dead_after` samples."""
        return self.samples_since_fired >= self.config.dead_after

    def encode(self, x: Tensor) -> SparseCodes | Tensor:
        """Return the codes of x (..., d): sparse, or dense (..., C) for relu and jumprelu.

        BatchTopK ranks the whole batch while training and compares with its threshold in eval.

        Raises:
            ConfigError: x does not fit or is not finite; BatchTopK in eval before any step was taken.
            NonFiniteError: the model's weights have diverged.
        """
        return self._encode(self._inputs(x), self.dictionary)[0]

    def decode(self, codes: SparseCodes | Tensor) -> Tensor:
        """Return the reconstruction (..., d) of codes.

        Raises:
            ConfigError: the codes are of another number of concepts.
        """
        concepts = codes.n_concepts if isinstance(codes, SparseCodes) else codes.shape[-1] if codes.ndim else 0
        if concepts != self.config.concepts:
            raise ConfigError(f"codes: got {concepts} concepts, expected {self.config.concepts}")
        return self._decode(codes, self.dictionary)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode, decode and rate x (..., d), whose rows count alike.

        With several processes, the mean of the ranks' losses is that of the global batch. Raises as `encode` does.
        """
        atoms = self.dictionary
        inputs = self._inputs(x)
        codes, pre = self._encode(inputs, atoms)
        x_hat = self._decode(codes, atoms)
        rows = inputs.reshape(-1, inputs.shape[-1])
        residual = (x.to(x_hat.device, atoms.dtype) - x_hat).reshape(rows.shape)
        (total,) = distributed.reduce_sum(float(len(rows))) if self.training else (float(len(rows)),)
        share = (distributed.world_size() if self.training else 1) / max(total, 1.0)
        loss = residual.square().sum() * share
        losses = {"reconstruction": loss.detach()}
        if pre is not None and self.config.sparsity_weight > 0:
            sparsity = self._sparsity(pre, atoms, share)
            loss = loss + self.config.sparsity_weight * sparsity
            losses["sparsity"] = sparsity.detach()
        if self.training and self.config.aux_alpha > 0 and self.config.kind != "matching_pursuit":
            dead = self.dead
            if bool(dead.any()):
                encoder = self.encoder_weight, self.encoder_bias
                revival = revival_loss(rows.detach(), residual, *encoder, atoms, dead)
                loss = loss + self.config.aux_alpha * revival
                losses["revival"] = revival.detach()
        return SAEOutput(x_hat, codes, pre, loss, losses)

    @torch.no_grad()
    def before_step_(self) -> None:
        """Take from the atoms' gradient the part along them, which the projection after the step would undo."""
        if self.config.normalize == "project" and self.atoms.grad is not None:
            remove_parallel_(self.atoms.grad, self.atoms)

    @torch.no_grad()
    def after_step_(self, output: SAEOutput) -> None:
        """Make atoms unit again and take the step's codes into the threshold and the firing counters.

        With several processes, all call it together and come to the same state.
        """
        self.steps += 1
        if self.config.k_start is not None:
            self.k.fill_(self.config.k_at(int(self.steps)))
        if self.archetypes is not None:
            self.archetypes.project_()
        renormalize = self.config.normalize == "graph" and int(self.steps) % _RENORMALIZE == 0
        if self.config.normalize == "project" or renormalize:
            normalize_rows_(self.atoms, _EPS)
        codes = output.codes.detach()
        values = codes.values if isinstance(codes, SparseCodes) else codes
        if self.config.kind == "batch_topk":
            self._follow_threshold(values)
        if isinstance(codes, SparseCodes):
            fired = torch.zeros_like(self.samples_since_fired)
            fired.index_put_((codes.indices.flatten(),), (values > 0).flatten().long(), accumulate=True)
        else:
            fired = (values != 0).reshape(-1, values.shape[-1]).sum(0)
        (rows,) = distributed.reduce_sum(float(values.shape[:-1].numel()))
        if distributed.world_size() > 1:
            dist.all_reduce(fired)
        self.samples_since_fired += int(rows)
        self.samples_since_fired.masked_fill_(fired > 0, 0)

    @torch.no_grad()
    def start_pre_bias_(self, x: Tensor) -> None:
        """Set the pre-bias to the geometric median of rows x (..., d), before training; the same rows on every rank.

        Raises:
            ConfigError: the model has no pre-bias, or x does not fit.
        """
        if self.pre_bias is None:
            raise ConfigError("pre_bias: got False, expected True: this model has none to start")
        self._check_inputs(x)
        self.pre_bias.copy_(geometric_median(x.reshape(-1, x.shape[-1])))

    @torch.no_grad()
    def calibrate_threshold_(self, batches: Iterable[Tensor]) -> None:
        """Set BatchTopK's threshold to the mean over batches of the least code that each would keep.

        With several processes, all call it together, each with its share of every batch.

        Raises:
            ConfigError: no batch has a positive pre-activation, or the model is of another kind.
        """
        if self.config.kind != "batch_topk":
            raise ConfigError(f"kind: got {self.config.kind!r}, expected 'batch_topk'")
        least = []
        for x in batches:
            values = batch_topk_encode(self._inputs(x), self.encoder_weight, self.encoder_bias, float(self.k)).values
            (negated,) = distributed.reduce_max(-_least(values))
            least += [-negated] if negated > -float("inf") else []
        if not least:
            raise ConfigError("batches: got no positive pre-activation, expected batches that activate a concept")
        self.threshold.fill_(math.fsum(least) / len(least))
        self.threshold_updates += 1

    def save_pretrained(self, directory: str | Path) -> None:
        """Write configuration and state to a directory, as `config.json` and safetensors (see `model_files`).

        With several processes, all call it together and the main one writes; sharded parameters are gathered.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        state = {name: t.full_tensor() if distributed.is_sharded(t) else t for name, t in self.state_dict().items()}
        delta = None if self.archetypes is None else self.archetypes.delta
        fields = {"model": _MODEL, "config": to_dict(self.config), "archetypal_delta": delta}
        with distributed.agreed("saving a model"):
            if distributed.is_main():
                write_model(Path(directory), fields, state)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: str | torch.device = "cpu") -> SparseAutoencoder:
        """Return the model that `save_pretrained` wrote, in the dtypes it had, in eval mode.

        Raises:
            CheckpointError: something is missing, damaged, of another kind, or does not fit together.
        """
        fields, state = read_model(Path(directory))
        if fields.get("model") != _MODEL:
            raise CheckpointError(f"{directory}: got a model of kind {fields.get('model')!r}, expected {_MODEL!r}")
        try:
            config = SAEConfig(**fields["config"])
            delta = fields["archetypal_delta"]
            atoms = state["atoms" if delta is None else "archetypes.relaxation"]
            if tuple(atoms.shape) != (config.concepts, config.d_in):  # before anything of that size is made
                raise ValueError(f"atoms {tuple(atoms.shape)} for {config.concepts} concepts of {config.d_in}")
            dictionary = None
            if delta is not None:
                dictionary = ArchetypalDictionary(state["archetypes.points"], config.concepts, delta=delta)
            model = cls(config, dictionary=dictionary)
            for name, value in model.state_dict().items():
                if name in state and state[name].is_floating_point() != value.is_floating_point():
                    raise ValueError(f"{name} of {state[name].dtype}")
            model.load_state_dict(state, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{directory}: got a model that does not fit together ({reason})") from None
        return model.to(device).eval()

    def _inputs(self, x: Tensor) -> Tensor:
        self._check_inputs(x)
        x = x.to(self.samples_since_fired.device, next(self.parameters()).dtype)
        return x if self.pre_bias is None else x - self.pre_bias

    def _check_inputs(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.config.d_in:
            raise ConfigError(f"x: got shape {tuple(x.shape)}, expected (..., {self.config.d_in})")
        if not bool(x.isfinite().all()):
            raise ConfigError("x: got NaN or infinity, expected finite numbers")

    def _encode(self, x: Tensor, atoms: Tensor) -> tuple[SparseCodes | Tensor, Tensor | None]:
        """Return codes and, where they are made, the pre-activations as (rows, C)."""
        kind = self.config.kind
        if kind == "matching_pursuit":
            return matching_pursuit(x, atoms, int(self.k)), None
        encoder = x, self.encoder_weight, self.encoder_bias
        if kind == "topk":
            return topk_encode(*encoder, int(self.k)), None
        if kind == "batch_topk":
            if self.training:
                return batch_topk_encode(*encoder, float(self.k)), None
            if not int(self.threshold_updates):
                raise ConfigError(
                    "threshold: got none yet, expected a training step or calibrate_threshold_ before eval"
                )
            return threshold_encode(*encoder, float(self.threshold)), None
        p = nn.functional.linear(*encoder)
        rows = p.reshape(-1, p.shape[-1])
        if kind == "relu":
            return p.relu(), rows
        return jumprelu(p, self.log_threshold.exp(), self.config.bandwidth, self.config.kernel), rows

    def _decode(self, codes: SparseCodes | Tensor, atoms: Tensor) -> Tensor:
        if isinstance(codes, SparseCodes):
            x_hat = sparse_decode(codes.values.to(atoms.dtype), codes.indices, atoms, inert_zeros=True)
        else:
            x_hat = codes @ atoms
        return x_hat if self.pre_bias is None else x_hat + self.pre_bias

    def _sparsity(self, pre: Tensor, atoms: Tensor, share: float) -> Tensor:
        if self.config.kind == "relu":
            return (pre.relu() * atoms.norm(dim=1)).sum() * share
        l0 = active(pre, self.log_threshold.exp(), self.config.bandwidth, self.config.kernel).sum() * share
        target = self.config.l0_target
        if target is None:
            return l0
        # The square is that of the global L0, which a rank knows without gradient; its own part brings the slope.
        (total,) = distributed.reduce_sum(float(l0.detach())) if self.training else (float(l0.detach()),)
        off = total / (distributed.world_size() if self.training else 1) / target - 1
        return off**2 + 2 * off / target * (l0 - l0.detach())

    def _follow_threshold(self, values: Tensor) -> None:
        """Take the least positive code v of this step into the mean: theta += (1 - beta) / (1 - beta^t) (v - theta).

        That is the mean m / (1 - beta^t) of m += (1 - beta) (v - m), and stays at v, exactly, while v stays.
        """
        (negated,) = distributed.reduce_max(-_least(values))
        if negated == -float("inf"):
            return
        self.threshold_updates += 1
        beta = self.threshold_decay
        weight = (1 - beta) / (1 - beta ** int(self.threshold_updates))
        self.threshold += weight * (-negated - self.threshold)


def _least(values: Tensor) -> float:
    """Return the least positive number; infinity where there is none."""
    return float(values.masked_fill(values <= 0, torch.inf).min()) if values.numel() else float("inf")
