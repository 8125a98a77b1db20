"""Masked (absorbing-state) diffusion: corrupt by masking, predict what was masked, weigh, reduce.

    NELBO(x) = Int_0^1 w(t) E_z [ sum_{i masked} -log f(z)[i, x_i] ] dt          nats per sequence

with f the softmax over the real tokens (the mask's own logit is left out, in training as in sampling) and w(t) the
weight of `effml_diffusion.schedules`. The bound is tight where f is the posterior P(x_i | z). That posterior does not
depend on t, so the network need not know the time.

`reduction` says what the loss is the mean of; the papers differ, and a loss without this word means nothing:

    "token"     sum / maskable tokens of the global batch                (dllm)
    "sequence"  mean over sequences of (sum / its maskable tokens)       (LLaDA fine-tuning)
    "batch"     sum / sequences: the bound itself, in nats, comparable across papers
    "padded"    sum / (sequences x padded length)                        (MDLM, LLaDA pre-training, FlexMDM, PRISM)

Sequences without a maskable token count in none of them.

No parameters and no state: optimizer, DDP, FSDP2, compile and checkpoints act on the network alone. Cost of a loss: one
forward pass, its head at the masked positions only (see `effml_diffusion.denoiser`; `dense=True`: at all positions,
without the host sync of counting them; what compiled code always does), and one copy of those logits in float32.

Source: arXiv 2406.07524 (MDLM), 2502.09992 (LLaDA). Training times lie on [eps, 1] with the weight w(t) unchanged, as
in MDLM, so a loss lacks the part of the bound below eps and is else 1 / (1 - eps) too high. `nelbo` has neither error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from effml_shared import distributed
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.tensors import IGNORE_INDEX
from torch import Tensor

from effml_diffusion import likelihood
from effml_diffusion.corruption import Corruption, mask_at_random, mask_exactly, stratified_times
from effml_diffusion.denoiser import Denoiser, call_denoiser, call_denoiser_at, rows_at
from effml_diffusion.schedules import Schedule
from effml_diffusion.schedules import schedule as parse_schedule
from effml_diffusion.value_checks import check_values

__all__ = ["LossOutput", "MaskedDiffusion"]

_REDUCTIONS = ("token", "sequence", "batch", "padded")
_CONDITIONS = ("none", "time", "alpha", "sigma")


@dataclass
class LossOutput:
    """A loss and what it is made of."""

    loss: Tensor  # scalar, reduced; the gradient starts here
    nelbo_nats: Tensor  # scalar without gradient: mean over this rank's sequences of the bound's estimate
    n_tokens: Tensor  # scalar int64: maskable tokens of this rank
    per_token: Tensor  # (batch, seq): weighted cross-entropy in nats, 0 where nothing is masked


class MaskedDiffusion:
    """The objective of masked diffusion around a denoising network, in diffusion time (0: clean, 1: all masks).

    Args:
        model: any callable `(ids, attention_mask=None, t=None)` to logits (batch, seq, vocab) or an object with
            `.logits`; see `effml_diffusion.denoiser`.
        mask_id: the mask's token id, inside the logits' vocabulary or one beyond it.
        pad_id: an id that stands only at padding: never masked, never predicted, hidden from attention.
        schedule: a name of `effml_diffusion.schedules`, or a `Schedule`.
        eps: smallest training time.
        time_conditioning: what the network gets as `t`, a float32 (batch,): `"none"`, `"time"`, `"alpha"` or `"sigma"`
            = -log alpha. False and True mean `"none"` and `"time"`.
        reduction: `"token"`, `"sequence"`, `"batch"` or `"padded"`, as the module explains.
        shift_logits: the network predicts position i + 1 at i, as autoregressive ones do, even after being adapted.
        dense: compute the logits of all positions.

    Raises:
        ConfigError: an argument is out of range, or two exclude each other.

    >>> diffusion = MaskedDiffusion(lambda ids: torch.zeros(*ids.shape, 5), mask_id=4, reduction="batch")
    >>> round(diffusion.nelbo(torch.tensor([[0, 1, 2]])).perplexity, 6)  # of four tokens, whatever the draws
    4.0
    """

    def __init__(
        self,
        model: Denoiser,
        mask_id: int,
        *,
        pad_id: int | None = None,
        schedule: str | Schedule = "linear",
        eps: float = 1e-3,
        time_conditioning: bool | str = False,
        reduction: str = "token",
        shift_logits: bool = False,
        dense: bool = False,
    ) -> None:
        check_count("mask_id", mask_id, 0)
        if pad_id is not None:
            check_count("pad_id", pad_id, 0)
        if pad_id == mask_id:
            raise ConfigError(f"pad_id: got {pad_id}, expected another id than mask_id = {mask_id}")
        check_range("eps", eps, 0.0, 1.0)
        check_choice("reduction", reduction, _REDUCTIONS)
        if isinstance(time_conditioning, bool):
            time_conditioning = "time" if time_conditioning else "none"
        check_choice("time_conditioning", time_conditioning, _CONDITIONS)
        self.model, self.mask_id, self.pad_id, self.eps = model, mask_id, pad_id, eps
        self.schedule = parse_schedule(schedule)
        self.time_conditioning, self.reduction = time_conditioning, reduction
        self.shift_logits, self.dense = shift_logits, dense
        if time_conditioning == "sigma" and self.schedule.alpha(1.0) == 0:
            raise ConfigError("time_conditioning: got 'sigma', expected a schedule whose alpha(1) is above 0")

    # The bound; functions that take the objective first, and so its methods.
    nelbo = likelihood.nelbo
    log_likelihood = likelihood.log_likelihood
    exact_nelbo = likelihood.exact_nelbo

    def corrupt(
        self,
        x: Tensor,
        *,
        t: float | Tensor | None = None,
        mask_level: float | Tensor | None = None,
        n_masked: int | Tensor | None = None,
        maskable: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Corruption:
        """Mask tokens of x (batch, seq): at stratified random times, or as one of t, mask_level and n_masked says.

        The strata are those of the batches of all ranks together. Each rank has its own of them, whatever the
        generator: with equal ones, ranks still draw different times. Give t for times that do not depend on the rank.

        Args:
            t: number or (batch,), diffusion time; the weight is the schedule's.
            mask_level: number or (batch,), probability of a mask; the weight is 1 / level, as for an average over
                uniform levels.
            n_masked: number or (batch,), how many tokens to mask exactly; the weight is maskable / masked.
            maskable: (batch, seq) bool, False at prompts and whatever else is given; padding never is maskable.
            generator: of all draws. None: PyTorch's global one.

        Raises:
            ConfigError: more than one of the three, shapes disagree, or (seen on a CPU only) values are out of range or
                x has masks or negative ids where it is maskable.
        """
        allowed = self.maskable(x, maskable=maskable)
        given = {"t": t, "mask_level": mask_level, "n_masked": n_masked}
        if sum(value is not None for value in given.values()) > 1:
            names = ", ".join(name for name, value in given.items() if value is not None)
            raise ConfigError(f"corrupt: got {names}, expected at most one of them")
        if n_masked is not None:
            count, total = _per_row("n_masked", n_masked, x), allowed.sum(1)
            check_values(
                "n_masked", count, (count >= 0) & (count <= total), "at least 0 and at most the maskable tokens"
            )
            level, weight = count.double() / total.clamp(min=1), total.double() / count
            mask, times = mask_exactly(allowed, count, generator), self.schedule.inverse(1 - level)
        else:
            if mask_level is not None:
                level = _per_row("mask_level", mask_level, x)
                times, weight = self.schedule.inverse(1 - level), 1 / level
            else:
                times = self._times(len(x), x.device, generator) if t is None else _per_row("t", t, x)
                level, weight = self.schedule.mask_level(times), self.schedule.weight(times)
            mask = mask_at_random(allowed, level, generator)
        weight = torch.where(level > 0, weight, 0.0)  # without masks the weight is infinite, and 0 inf is not 0
        return Corruption(x.masked_fill(mask, self.mask_id), mask, times, weight, allowed)

    def loss(
        self,
        x: Tensor,
        *,
        corruption: Corruption | None = None,
        logits: Tensor | None = None,
        maskable: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_inputs: Any,
    ) -> LossOutput:
        """Return the loss of clean sequences x (batch, seq), for a loop of your own: `.loss.backward()`.

        In a process group, every rank must call this: counts are summed over ranks, and each rank's loss is scaled so
        that the mean of the ranks' gradients, as DDP and FSDP2 take it, is that of the global batch.

        Args:
            corruption: corrupted x, in place of a fresh draw; it has its own maskable.
            logits: (batch, seq, vocab), the network's at `corruption.z`, in place of a forward pass.
            maskable: see `corrupt`.
            attention_mask: (batch, seq), zero at padding, which is never masked and never seen.
            model_inputs: what else the network takes, by its names.

        Raises:
            ConfigError: see `corrupt` and `per_token`; or logits without a corruption.
        """
        if corruption is None:
            if logits is not None:
                raise ConfigError("corruption: got None beside logits, expected the one they were computed at")
            allowed = self.maskable(x, maskable=maskable, attention_mask=attention_mask)
            corruption = self.corrupt(x, maskable=allowed, generator=generator)
        per_token = self.per_token(x, corruption, logits=logits, attention_mask=attention_mask, **model_inputs)
        total, count = self._reduce(per_token, corruption.maskable)
        if distributed.world_size() > 1:
            dist.all_reduce(count)
        loss = total * distributed.world_size() / count.clamp(min=1)
        n_tokens = corruption.maskable.sum(1)
        nelbo = per_token.detach().sum() / (n_tokens > 0).sum().clamp(min=1)
        return LossOutput(loss, nelbo, n_tokens.sum(), per_token)

    def loss_terms(self, model: Denoiser, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss as a sum and the count to divide it by, for `effml_shared.steps.GradientStep`.

        Args:
            model: the network, as the step wrapped it.
            batch: ids (batch, seq), or a mapping with `input_ids`; if present, `maskable` and `attention_mask` as in
                `loss`, `labels` (-100 where never masked), and `t` (batch,), the times. The rest goes to the network.
        """
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        if "input_ids" not in inputs:
            raise ConfigError(f"batch: got {', '.join(inputs) or 'nothing'}, expected input_ids among its keys")
        x, t, labels = inputs.pop("input_ids"), inputs.pop("t", None), inputs.pop("labels", None)
        attention_mask, maskable = inputs.pop("attention_mask", None), inputs.pop("maskable", None)
        counted = None if labels is None else labels != IGNORE_INDEX
        allowed = self.maskable(x, maskable=maskable, attention_mask=attention_mask, labels=counted)
        corruption = self.corrupt(x, t=t, maskable=allowed)
        per_token = self.per_token(x, corruption, model=model, attention_mask=attention_mask, **inputs)
        return self._reduce(per_token, allowed)

    def per_token(
        self,
        x: Tensor,
        corruption: Corruption,
        *,
        model: Denoiser | None = None,
        logits: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **model_inputs: Any,
    ) -> Tensor:
        """Return the weighted cross-entropy in nats (batch, seq), 0 where nothing is masked; float32 or wider.

        Args as in `loss`; model: in place of the objective's own.

        Raises:
            ConfigError: shapes disagree, or (seen on a CPU only) x has ids that the logits do not have.
        """
        z, mask, t, weight, _ = corruption
        if z.shape != x.shape or (logits is not None and logits.shape[:2] != x.shape):
            shape = tuple(z.shape if logits is None else logits.shape)
            raise ConfigError(f"corruption: got ids or logits of shape {shape}, expected those of x {tuple(x.shape)}")
        dense = self.dense or torch.compiler.is_compiling()
        index = None if dense else mask.flatten().nonzero().squeeze(1)
        if logits is None:
            inputs = {"attention_mask": attention_mask, **model_inputs}
            logits = self._forward(self.model if model is None else model, z, t, index, inputs)
        elif index is not None:
            logits = rows_at(logits, index)
        targets = x.long().flatten()
        targets = targets.masked_fill(~mask.flatten(), IGNORE_INDEX) if index is None else targets[index]
        vocab = logits.shape[-1]
        check_values("x", targets, targets < vocab, f"ids below the vocabulary of the logits, {vocab}")
        logits = self._predictable(logits).reshape(-1, vocab)
        entropies = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
        if index is not None:
            entropies = entropies.new_zeros(x.numel()).index_copy(0, index, entropies)
        return entropies.view(x.shape) * weight.to(entropies.dtype)[:, None]

    def logits(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        t: float | Tensor | None = None,
        *,
        at: Tensor | None = None,
        **model_inputs: Any,
    ) -> Tensor:
        """Return the network's own logits at ids (batch, seq), moved into place if it shifts them.

        Args:
            attention_mask: (batch, seq); None with a pad_id: wherever that does not stand.
            t: number or (batch,), diffusion time, for a network that is conditioned on it.
            at: where logits are wanted, as (batch, seq) bool or as flat positions (n,) int64 of (batch, seq), for which
                the host need not wait for the device to count; None: everywhere.

        Returns:
            (batch, seq, vocab), or with `at` (n, vocab), in the order of positions. The logits of the mask and of
            padding are as the network has them.

        Raises:
            ConfigError: t or at has another shape or type, or (seen on a CPU only) at is out of range.
        """
        times = None if t is None else _per_row("t", t, ids)
        index = None if at is None else _flat(at, ids)
        return self._forward(self.model, ids, times, index, {"attention_mask": attention_mask, **model_inputs})

    def maskable(self, x: Tensor, **masks: Tensor | None) -> Tensor:
        """Return where x (batch, seq) may be masked: where every mask of its shape holds and no padding stands."""
        if x.ndim != 2 or x.dtype not in (torch.int64, torch.int32):
            raise ConfigError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected int64 or int32 ids (batch, seq)")
        allowed = torch.ones_like(x, dtype=torch.bool) if self.pad_id is None else x != self.pad_id
        for name, given in masks.items():
            if given is not None and given.shape != x.shape:
                raise ConfigError(f"{name}: got shape {tuple(given.shape)}, expected {tuple(x.shape)}")
            allowed = allowed if given is None else allowed & given.bool()
        clean = (x != self.mask_id) & (x >= 0)
        check_values("x", x, clean | ~allowed, f"no mask ({self.mask_id}) and no negative id where it is maskable")
        return allowed

    def _times(self, n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        rank, world_size = distributed.rank(), distributed.world_size()
        times = stratified_times(n, rank=rank, world_size=world_size, device=device, generator=generator)
        return self.eps + (1 - self.eps) * times

    def _forward(
        self,
        model: Denoiser,
        ids: Tensor,
        t: Tensor | None,
        index: Tensor | None,
        inputs: dict[str, Any],
    ) -> Tensor:
        """Call the network: the only place that does. Logits everywhere, or at flat positions index (n,)."""
        if inputs["attention_mask"] is None and self.pad_id is not None:
            inputs["attention_mask"] = ids != self.pad_id
        if self.time_conditioning != "none":
            if t is None:
                raise ConfigError(f"t: got None, expected the time for time_conditioning={self.time_conditioning!r}")
            inputs["t"] = self._condition(t).float()
        if index is None:
            logits = call_denoiser(model, ids, **inputs)
            return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if self.shift_logits else logits
        if self.shift_logits:
            index = index - (index % ids.shape[1] > 0).long()
        return call_denoiser_at(model, ids, index, **inputs)

    def _condition(self, t: Tensor) -> Tensor:
        if self.time_conditioning == "time":
            return t
        alpha = self.schedule.alpha(t)
        return alpha if self.time_conditioning == "alpha" else -alpha.log()

    def _predictable(self, logits: Tensor) -> Tensor:
        """Copy logits (..., vocab) to float32 or wider, with -inf for what is never predicted."""
        allowed = torch.zeros(
            logits.shape[-1], dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device
        )
        for never in (self.mask_id, self.pad_id):
            if never is not None and never < len(allowed):
                allowed[never] = -torch.inf
        return logits + allowed  # a sum: neither a second copy, nor any work in the backward pass

    def _reduce(self, per_token: Tensor, maskable: Tensor) -> tuple[Tensor, Tensor]:
        sums, tokens = per_token.sum(1), maskable.sum(1)
        sequences = (tokens > 0).sum()
        if self.reduction == "token":
            return sums.sum(), tokens.sum()
        if self.reduction == "sequence":
            return (sums / tokens.clamp(min=1)).sum(), sequences
        return sums.sum(), sequences * (per_token.shape[1] if self.reduction == "padded" else 1)


def _per_row(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Return a number or (batch,) as (batch,), float64 if it is not integer, on x's device."""
    tensor = torch.as_tensor(value, device=x.device)
    if tensor.shape not in ((), x.shape[:1]) or (name == "n_masked" and tensor.is_floating_point()):
        kind = "an integer or integers" if name == "n_masked" else "a number or numbers"
        raise ConfigError(f"{name}: got {tensor.dtype} of shape {tuple(tensor.shape)}, expected {kind} ({len(x)},)")
    tensor = tensor if name == "n_masked" else tensor.double()
    if name == "mask_level":
        check_values(name, tensor, (tensor >= 0) & (tensor <= 1), "numbers in [0, 1]")
    return tensor.expand(len(x))


def _flat(at: Tensor, ids: Tensor) -> Tensor:
    """Return positions of ids (batch, seq), given as bool of that shape or as flat indices, as flat indices."""
    if at.shape == ids.shape and at.dtype == torch.bool:
        return at.flatten().nonzero().squeeze(1)
    if at.ndim != 1 or at.dtype != torch.int64:
        expected = f"torch.bool of {tuple(ids.shape)} or torch.int64 of (n,)"
        raise ConfigError(f"at: got {at.dtype} of shape {tuple(at.shape)}, expected {expected}")
    check_values("at", at, (at >= 0) & (at < ids.numel()), f"positions below batch x seq = {ids.numel()}")
    return at
