"""FlexMDM: learn to insert masks into gaps and to reveal masks, and so to generate texts of any length in any order.

With x_t a noisy text at flow time t, and h_a and h_b the rates of insertion and unmasking of the `Interpolant`,

    L(x) = Int_0^1 E [ h_b sum_{i mask} -log f(x_t)[i, x_i]  +  h_a sum_gaps phi(n_gap, g(x_t)[gap]) ] dt

where n is the number of tokens missing in a gap. The best f is the posterior of the masked token, the best g is E[n].
Both depend on t through a(t) alone and not on b, so the network is told a(t) by default, and one network serves every
schedule. L is a loose bound on -log p(x); with phi's constant taken off it is a tight one, `nelbo_nats`, and in it the
length is included.

A network is any callable `model(ids, lengths=, cond=)`: ids (batch, seq) padded at the right, lengths (batch,) int64,
cond (batch,) float32. It returns an object with

    logits       (batch, seq, vocab), of its output head (see `effml_diffusion.denoiser`) at masks only if it has one
    gaps         (batch, seq + 1), expected missing tokens, column i of them just before token i, column `length` last
    log_gaps     optional, (batch, seq + 1): ln of gaps, finite where gaps underflow
    gap_logits   (batch, seq + 1, most + 1), in place of gaps: of the number itself, trained by cross-entropy

`reduction`, as in `MaskedDiffusion`: "padded" sum / (texts x max_length), as in the paper's code; "token" sum / free
tokens; "sequence" mean of (sum / free tokens of the text); "batch" sum / texts.

No parameters and no state. Cost: one forward pass at the length of the longest noisy text, in the mean half that of the
clean one or a little more, its head at masks only, and a float32 copy of these logits.

Source: arXiv 2509.01025 and its code. Times lie on [0, t_max) with weights unchanged; `nelbo` covers all of [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from effml_shared import distributed
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor, nn

from effml_diffusion.corruption import stratified_times
from effml_diffusion.denoiser import head_at, rows_at
from effml_diffusion.flex import flex_likelihood
from effml_diffusion.flex.flex_state import FlexState, observe
from effml_diffusion.flex.insertion_loss import expected_gaps, insertion_nll, phi
from effml_diffusion.flex.interpolant import Interpolant
from effml_diffusion.flex.rows import Rows
from effml_diffusion.flex.texts import Flags, Texts, check_texts
from effml_diffusion.masked_diffusion import LossOutput
from effml_diffusion.samplers.ranking import flat_index
from effml_diffusion.schedules import Schedule
from effml_diffusion.value_checks import check_values

__all__ = ["FlexLoss", "FlexMDM", "FlexPrediction", "FlexTerms"]

_REDUCTIONS = ("padded", "token", "sequence", "batch")


class FlexPrediction(NamedTuple):
    """A network's output, checked; log_gaps is None where only gaps are known."""

    logits: Tensor  # (batch, seq, vocab), or (n, vocab) at the positions asked for
    gaps: Tensor  # (batch, seq + 1), float32 or wider
    log_gaps: Tensor | None
    gap_logits: Tensor | None  # (batch, seq + 1, most + 1)


class FlexTerms(NamedTuple):
    """The sums inside the loss before their weights h_b (the first) and h_a (the others)."""

    cross_entropy: Tensor  # (batch, seq): nats, 0 but at masks
    insertion: Tensor  # (batch,): what is trained, phi or the cross-entropy of counts, over open gaps
    insertion_nll: Tensor  # (batch,): what is in the tight bound


@dataclass
class FlexLoss(LossOutput):
    """A loss, its parts, and the estimate of the tight bound, which includes the length; n_tokens are free ones.

    per_token is the weighted cross-entropy at each token's place in the clean text, (batch, seq).
    """

    unmask: Tensor  # scalar without gradient: the part of the loss at masks
    insert: Tensor  # scalar without gradient: the part of the loss at gaps


class FlexMDM:
    """The objective of flexible-length masked diffusion around a network, in flow time (0: empty, 1: data).

    Args:
        model: as the module explains.
        mask_id: the mask's token id.
        pad_id: stands beyond the end of a text and nowhere else, so it cannot be an end-of-text token that is data.
        max_length: of a text in tokens.
        insert, unmask: names of `effml_diffusion.schedules`, or `Schedule`s, read as a(t) = alpha(1 - t).
        condition_on: what the network gets as `cond`: `"alpha"`, that is a(t), or `"t"`.
        reduction: `"padded"`, `"token"`, `"sequence"` or `"batch"`, as the module explains.
        t_max: end of the training times; weights reach 1 / (1 - t_max).
        length_multiple: noisy texts are padded to multiples of it, so that a compiled network sees few shapes.
        dense: compute the logits of all positions: for networks that read or change them by position.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        mask_id: int,
        pad_id: int,
        max_length: int,
        *,
        insert: str | Schedule = "linear",
        unmask: str | Schedule = "linear",
        condition_on: str = "alpha",
        reduction: str = "padded",
        t_max: float = 1 - 1e-3,
        length_multiple: int = 8,
        dense: bool = False,
    ) -> None:
        check_count("mask_id", mask_id, 0)
        check_count("pad_id", pad_id, 0)
        check_count("max_length", max_length, 1)
        check_count("length_multiple", length_multiple, 1)
        if pad_id == mask_id:
            raise ConfigError(f"pad_id: got {pad_id}, expected another id than mask_id = {mask_id}")
        check_choice("condition_on", condition_on, ("alpha", "t"))
        check_choice("reduction", reduction, _REDUCTIONS)
        if not 0 < t_max < 1:
            raise ConfigError(f"t_max: got {t_max}, expected a number in (0, 1)")
        self.model, self.mask_id, self.pad_id, self.max_length = model, mask_id, pad_id, max_length
        self.interpolant = Interpolant.of(insert, unmask)
        self.condition_on, self.reduction, self.t_max = condition_on, reduction, t_max
        self.length_multiple, self.dense = length_multiple, dense

    # The bound; functions that take the objective first, and so its methods.
    nelbo = flex_likelihood.nelbo
    exact_nelbo = flex_likelihood.exact_nelbo

    def texts(self, x: Rows, fixed: Flags | None = None, closed: Tensor | None = None) -> Texts:
        """Check clean texts and what of them is given; see `effml_diffusion.flex.texts.check_texts`."""
        ids = {"mask_id": self.mask_id, "pad_id": self.pad_id}
        return check_texts(x, fixed, closed, **ids, max_length=self.max_length, device=self.device)

    def corrupt(
        self,
        x: Rows | Texts,
        *,
        flow_t: float | Tensor | None = None,
        fixed: Flags | None = None,
        closed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> FlexState:
        """Delete and mask tokens of clean texts: at stratified random times on [0, t_max), or at flow_t, (batch,).

        As in `MaskedDiffusion.corrupt`, each rank has strata of its own, whatever the generator. Other arguments and
        errors are those of `texts`.

        >>> flex = FlexMDM(None, mask_id=9, pad_id=0, max_length=4)
        >>> flex.corrupt([[5, 6], [7]], flow_t=0.0).gaps[:, 0]
        tensor([2, 1])
        """
        texts = x if isinstance(x, Texts) else self.texts(x, fixed, closed)
        ids, batch = texts.ids, len(texts.ids)
        if flow_t is None:
            rank, world_size = distributed.rank(), distributed.world_size()
            backwards = stratified_times(
                batch, rank=rank, world_size=world_size, device=ids.device, generator=generator
            )
            t = self.t_max * (1 - backwards)
        else:
            t = torch.as_tensor(flow_t, dtype=torch.float64, device=ids.device)
            if t.shape not in ((), (batch,)):
                raise ConfigError(f"flow_t: got shape {tuple(t.shape)}, expected a number or ({batch},)")
            check_values("flow_t", t, (t >= 0) & (t < 1), "numbers in [0, 1)")
            t = t.expand(batch)
        appears, revealed = self.interpolant.hitting_times(ids.shape, device=ids.device, generator=generator)
        present = (t[:, None] >= appears) | texts.fixed
        masked = (t[:, None] < revealed) & ~texts.fixed
        return self.observe(texts, present, masked, t)

    def observe(self, texts: Texts, present: Tensor, masked: Tensor, flow_t: Tensor) -> FlexState:
        """Return noisy texts whose present and masked tokens, (batch, seq) bool, are chosen; flow_t (batch,)."""
        ids = {"mask_id": self.mask_id, "pad_id": self.pad_id}
        return observe(texts.ids, texts.lengths, present, masked, flow_t, closed=texts.closed, **ids)

    def loss(
        self,
        x: Rows,
        *,
        state: FlexState | None = None,
        fixed: Flags | None = None,
        closed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> FlexLoss:
        """Return the loss of clean texts, for a loop of your own: `.loss.backward()`.

        In a process group, every rank must call this; each rank's loss is scaled so that the mean of the ranks'
        gradients is that of the global batch. `state`: noisy texts, in place of a fresh draw. Other arguments and
        errors are those of `texts`.
        """
        texts = self.texts(x, fixed, closed)
        state = self.corrupt(texts, generator=generator) if state is None else state
        terms, count = self._weighted(state), self._count(texts.n_free)
        if distributed.world_size() > 1:
            dist.all_reduce(count)
        unmask, insert = (
            self._sum(part, texts.n_free) * distributed.world_size() / count.clamp(min=1)
            for part in (terms.cross_entropy.sum(1), terms.insertion)
        )
        detached = terms.cross_entropy.detach()
        per_token = detached.new_zeros(len(texts.ids), texts.ids.shape[1] + 1)
        per_token.scatter_(1, state.places[:, : detached.shape[1]], detached)  # from a row's end on there are zeros
        return FlexLoss(
            loss=unmask + insert,
            nelbo_nats=(detached.sum(1) + terms.insertion_nll.detach()).mean(),
            n_tokens=texts.n_free.sum(),
            per_token=per_token[:, :-1],
            unmask=unmask.detach(),
            insert=insert.detach(),
        )

    def loss_terms(self, model: Callable[..., Any], batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss as a sum and the count to divide it by, for `effml_shared.steps.GradientStep`.

        Args:
            model: the network, as the step wrapped it.
            batch: ids (batch, seq), or a mapping with `input_ids` and, if wanted, `fixed`, `closed` and `flow_t`.
        """
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        if not {"input_ids"} <= set(inputs) <= {"input_ids", "fixed", "closed", "flow_t"}:
            raise ConfigError(f"batch: got {', '.join(inputs)}, expected input_ids and at most fixed, closed, flow_t")
        texts = self.texts(inputs["input_ids"], inputs.get("fixed"), inputs.get("closed"))
        state = self.corrupt(texts, flow_t=inputs.get("flow_t"))
        terms = self._weighted(state, model)
        return self._sum(terms.cross_entropy.sum(1) + terms.insertion, texts.n_free), self._count(texts.n_free)

    def terms(self, state: FlexState, *, model: Callable[..., Any] | None = None) -> FlexTerms:
        """Ask the network (model: in place of the objective's own) about noisy texts and compare with the truth."""
        state = state.trim(self.length_multiple)
        index = flat_index(state.mask)
        prediction = self.predict(state.ids, state.lengths, state.flow_t, at=index, model=model)
        logits = self.without_special(prediction.logits)
        targets = state.targets.flatten()[index]
        vocab = logits.shape[-1]
        check_values("x", targets, targets < vocab, f"ids below the vocabulary of the logits, {vocab}")
        entropies = F.cross_entropy(logits, targets, reduction="none")
        entropies = entropies.new_zeros(state.ids.numel()).index_copy(0, index, entropies).view(state.ids.shape)

        gaps, log_gaps, counts = prediction.gaps, prediction.log_gaps, state.gaps
        nll = insertion_nll(counts, gaps, log_gaps)
        if prediction.gap_logits is None:
            trained = phi(counts, gaps, log_gaps)
        else:
            log_probs = widen(prediction.gap_logits).log_softmax(-1)
            most = log_probs.shape[-1] - 1
            check_values("gap_logits", counts, counts <= most, f"at most {most} missing tokens in a gap, as it has")
            trained = -log_probs.gather(-1, counts.unsqueeze(-1)).squeeze(-1)
        trained, nll = (torch.where(state.gap_mask, part, 0.0).sum(1) for part in (trained, nll))
        return FlexTerms(entropies, trained, nll)

    def predict(
        self,
        ids: Tensor,
        lengths: Tensor,
        flow_t: Tensor,
        *,
        at: Tensor | None = None,
        model: Callable[..., Any] | None = None,
    ) -> FlexPrediction:
        """Call the network: the only place that does. ids (batch, seq), lengths (batch,), flow_t (batch,).

        at: flat positions (n,) of (batch, seq) where logits are wanted; None: everywhere. Gaps always are everywhere.

        Raises:
            ConfigError: the output lacks something, or has another shape than the module says.
        """
        model = self.model if model is None else model
        cond = self.interpolant.insert.value(flow_t) if self.condition_on == "alpha" else flow_t
        with head_at(model, ids.shape, None if self.dense else at) as rows:
            output = model(ids, lengths=lengths, cond=cond.float())
        logits, gap_logits = getattr(output, "logits", None), getattr(output, "gap_logits", None)
        gaps = getattr(output, "gaps", None) if gap_logits is None else gap_logits
        if not (isinstance(logits, Tensor) and isinstance(gaps, Tensor)):
            raise ConfigError(f"model: got {type(output).__name__} from it, expected .logits, and .gaps or .gap_logits")
        batch, seq = ids.shape
        dims = 2 if gap_logits is None else 3
        if gaps.ndim != dims or gaps.shape[:2] != (batch, seq + 1):
            raise ConfigError(f"model: got gaps of shape {tuple(gaps.shape)}, expected ({batch}, {seq + 1}, ...)")
        logits = rows(logits)
        if self.dense and at is not None:
            logits = rows_at(logits, at)
        if gap_logits is not None:
            return FlexPrediction(logits, *expected_gaps(widen(gap_logits)), gap_logits)
        log_gaps = getattr(output, "log_gaps", None)
        return FlexPrediction(logits, widen(gaps), None if log_gaps is None else widen(log_gaps), None)

    def without_special(self, logits: Tensor) -> Tensor:
        """Copy logits (..., vocab) to float32 or wider, with -inf at mask and pad, which are never predicted."""
        logits = logits.to(widen(logits[:0]).dtype, copy=True)
        for never in (self.mask_id, self.pad_id):
            if never < logits.shape[-1]:
                logits[..., never] = -torch.inf
        return logits

    @property
    def device(self) -> torch.device | None:
        """Where the network's parameters are; None if it has none that are known."""
        parameter = next(self.model.parameters(), None) if isinstance(self.model, nn.Module) else None
        return None if parameter is None else parameter.device

    def _weighted(self, state: FlexState, model: Callable[..., Any] | None = None) -> FlexTerms:
        """Return the terms times their rates h_b and h_a at the states' times."""
        terms = self.terms(state, model=model)
        unmask = self.interpolant.unmask.rate(state.flow_t).to(terms.cross_entropy.dtype)
        insert = self.interpolant.insert.rate(state.flow_t).to(terms.insertion.dtype)
        return FlexTerms(unmask[:, None] * terms.cross_entropy, insert * terms.insertion, insert * terms.insertion_nll)

    def _sum(self, values: Tensor, n_free: Tensor) -> Tensor:
        return (values / n_free.clamp(min=1) if self.reduction == "sequence" else values).sum()

    def _count(self, n_free: Tensor) -> Tensor:
        if self.reduction == "token":
            return n_free.sum()
        return torch.tensor(len(n_free) * (self.max_length if self.reduction == "padded" else 1), device=n_free.device)
