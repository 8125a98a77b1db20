"""The objective of masked diffusion: the bound by quadrature, what the loss may depend on, and what it may not."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from effml_diffusion.corruption import Corruption
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_shared import distributed
from effml_shared.errors import ConfigError
from effml_shared.schedules import Plan
from effml_shared.seeding import generator
from effml_shared.steps import GradientStep
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor

H = 2.93159784  # nats, of the reference law
X = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 1, 3, 3, 2]])
SUBSETS = torch.tensor([[bool(s >> i & 1) for i in range(3)] for s in range(8)])


def network(**changes: Any) -> Transformer:
    """A bidirectional Transformer of tokens 0 to 4 and mask 5, in float64."""
    config = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 16, "vocab_size": 6, "causal": False, **changes}
    return Transformer(TransformerConfig(**config)).double()


def subset_losses(law: Any, posterior: Any, name: str = "linear") -> tuple[Tensor, MaskedDiffusion]:
    """Cross-entropy summed over each set of masks, averaged over the law: (8,), from the loss itself."""
    model = posterior(law)
    diffusion = MaskedDiffusion(model, model.mask_id, schedule=name, reduction="batch")
    x, mask = model.sequences.repeat_interleave(8, 0), SUBSETS.repeat(27, 1)
    ones = torch.ones(len(x), dtype=torch.float64)
    corruption = Corruption(x.masked_fill(mask, 3), mask, ones, ones, torch.ones_like(mask))
    out = diffusion.loss(x, corruption=corruption)
    assert out.n_tokens == 27 * 8 * 3
    return (out.per_token.sum(1).view(27, 8) * model.probs[:, None]).sum(0), diffusion


def quadrature(losses: Tensor, diffusion: MaskedDiffusion, points: int) -> float:
    """Int_0^1 w(t) E_z [...] dt by Gauss and Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    t, w = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    level, size = diffusion.schedule.mask_level(t)[:, None], SUBSETS.sum(1)
    inner = (level**size * (1 - level) ** (3 - size) * losses).sum(1)
    return float((w * diffusion.schedule.weight(t) * inner).sum())


def test_the_bound_of_the_exact_posterior_is_the_entropy(reference_law: Any, exact_posterior: Any) -> None:
    model = exact_posterior(reference_law)
    assert model.entropy == pytest.approx(H, abs=5e-9)
    losses, diffusion = subset_losses(reference_law, exact_posterior)
    assert quadrature(losses, diffusion, 64) == pytest.approx(model.entropy, abs=1e-12)
    counts = sum(losses[SUBSETS.sum(1) == size].mean() * 3 / size for size in (1, 2, 3)) / 3
    assert float(counts) == pytest.approx(model.entropy, abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "cosine_dllm", "polynomial_mask(2)", "polynomial(2)"])
def test_the_bound_does_not_depend_on_the_schedule(name: str, reference_law: Any, exact_posterior: Any) -> None:
    losses, diffusion = subset_losses(reference_law, exact_posterior, name)
    assert quadrature(losses, diffusion, 400) == pytest.approx(exact_posterior(reference_law).entropy, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loglinear(1e-3)", 2.92831461), ("cosine(1e-3)", 2.92831461), ("geometric(1e-5, 20)", H - 2.47e-5)],
)
def test_truncated_schedules_read_low(name: str, value: float, reference_law: Any, exact_posterior: Any) -> None:
    losses, diffusion = subset_losses(reference_law, exact_posterior, name)
    tolerance = 1e-8 if "geometric" not in name else 1e-7
    assert quadrature(losses, diffusion, 400) == pytest.approx(value, abs=tolerance)


def test_sampled_losses_average_to_the_bound(reference_law: Any, exact_posterior: Any) -> None:
    """Both laws of masks, through corrupt and loss; the schedule changes the variance only, and counts lower it."""
    model = exact_posterior(reference_law)
    stream = generator(0, "monte carlo")
    x = model.sequences[torch.multinomial(model.probs, 40000, replacement=True, generator=stream)]
    spread = {}
    for name in ("linear", "polynomial_mask(2)"):
        diffusion = MaskedDiffusion(model, 3, schedule=name, reduction="batch", eps=1e-3)
        out = diffusion.loss(x, generator=stream)
        rows = out.per_token.sum(1)
        spread[name] = rows.std().item()
        assert out.loss.item() == pytest.approx(rows.mean().item())
        assert out.nelbo_nats.item() == pytest.approx(H, abs=4 * spread[name] / 200 + 0.01)
    assert abs(spread["polynomial_mask(2)"] - spread["linear"]) > 0.05 * spread["linear"]
    diffusion = MaskedDiffusion(model, 3, reduction="batch")
    count = torch.randint(1, 4, (len(x),), generator=stream)
    exact = diffusion.loss(x, corruption=diffusion.corrupt(x, n_masked=count, generator=stream))
    assert exact.per_token.sum(1).std() < 0.7 * spread["linear"]
    assert exact.loss.item() == pytest.approx(H, abs=4 * exact.per_token.sum(1).std().item() / 200)


@pytest.mark.parametrize("dense", [False, True])
def test_only_masked_positions_and_real_tokens_matter(dense: bool) -> None:
    torch.manual_seed(0)
    diffusion = MaskedDiffusion(network(), 5, dense=dense)
    corruption = diffusion.corrupt(X, t=0.5, generator=generator(0, "z"))
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    loss = diffusion.loss(X, corruption=corruption, logits=logits).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[~corruption.mask] == 0).all()
    assert (gradient[..., 5] == 0).all()
    assert (gradient[corruption.mask][:, [0, 1, 2, 3, 4, 6]] != 0).all()
    other = torch.where(corruption.mask[..., None], logits, torch.randn_like(logits))
    other[..., 5] = 1e4
    before = other.detach().clone()
    assert diffusion.loss(X, corruption=corruption, logits=other).loss == loss
    assert torch.equal(other, before)


def test_loss_is_permutation_equivariant_and_additive_over_rows() -> None:
    diffusion = MaskedDiffusion(network(position="none"), 5, reduction="batch")
    corruption = diffusion.corrupt(X, t=torch.tensor([0.3, 0.6, 0.9]), generator=generator(3, "z"))
    out = diffusion.loss(X, corruption=corruption)
    order = torch.tensor([3, 0, 4, 1, 2])
    z, mask, t, weight, maskable = corruption
    moved = diffusion.loss(X[:, order], corruption=Corruption(z[:, order], mask[:, order], t, weight, maskable))
    torch.testing.assert_close(moved.loss, out.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(moved.per_token, out.per_token[:, order], rtol=1e-12, atol=1e-14)
    rows = [
        diffusion.loss(X[i : i + 1], corruption=Corruption(*(f[i : i + 1] for f in corruption))) for i in range(len(X))
    ]
    torch.testing.assert_close(torch.stack([row.loss for row in rows]).mean(), out.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gathered_rows_give_the_dense_loss_and_gradients(shift: bool, tied: bool) -> None:
    results = []
    for dense in (False, True):
        model = network(tied=tied)
        diffusion = MaskedDiffusion(model, 5, dense=dense, shift_logits=shift)
        corruption = diffusion.corrupt(X, t=0.6, generator=generator(1, "z"))
        loss = diffusion.loss(X, corruption=corruption).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_gathering_saves_the_memory_of_logits() -> None:
    """Of what the backward pass keeps, tensors over the vocabulary shrink to the share of masks."""
    kept = {}
    for dense in (False, True):
        diffusion = MaskedDiffusion(network(vocab_size=200, vocab_rows=200), 199, dense=dense)
        x = torch.randint(199, (8, 32), generator=generator(0, "x"))
        corruption = diffusion.corrupt(x, n_masked=8)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            if tensor.shape[-1:] == (200,) and tensor.shape != (16, 200):  # which is the head's weight
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            diffusion.loss(x, corruption=corruption)
        kept[dense] = sum(sizes)
    assert kept[True] > 0
    assert kept[False] == kept[True] / 4


def test_reductions_are_means_of_what_they_say() -> None:
    maskable = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    losses = {}
    for reduction in ("token", "sequence", "batch", "padded"):
        diffusion = MaskedDiffusion(network(), 5, reduction=reduction)
        corruption = diffusion.corrupt(X, mask_level=1.0, maskable=maskable)
        out = diffusion.loss(X, corruption=corruption)
        losses[reduction] = out.loss.item()
        assert out.n_tokens == 7
        assert (out.per_token[~maskable] == 0).all()
    one, two, _ = out.per_token.sum(1).tolist()
    assert losses["token"] == pytest.approx((one + two) / 7)
    assert losses["sequence"] == pytest.approx((one / 5 + two / 2) / 2)
    assert losses["batch"] == pytest.approx((one + two) / 2) == out.nelbo_nats.item()
    assert losses["padded"] == pytest.approx((one + two) / 10)


def test_loss_terms_are_the_loss_in_two_parts() -> None:
    batch = {
        "input_ids": X,
        "labels": torch.tensor([[-100, 1, 2, 3, 4], [4, 3, 2, 1, 0], [-100] * 5]),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5]),
        "doc_ids": torch.zeros_like(X),
        "t": torch.ones(3),
    }
    maskable = (batch["labels"] != -100) & batch["attention_mask"].bool()
    for reduction, count in (("token", 7), ("sequence", 2), ("batch", 2), ("padded", 10)):
        diffusion = MaskedDiffusion(network(), 5, reduction=reduction)
        total, terms = diffusion.loss_terms(network(), batch)
        assert terms == count
        corruption = diffusion.corrupt(X, t=1.0, maskable=maskable)
        expected = diffusion.loss(X, corruption=corruption, attention_mask=batch["attention_mask"]).loss
        torch.testing.assert_close(total / terms, expected, rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match=r"^labels: got shape \(3, 4\), expected \(3, 5\)$"):
        diffusion.loss_terms(network(), {"input_ids": X, "labels": X[:, 1:]})
    with pytest.raises(ConfigError, match=r"^batch: got ids, expected input_ids among its keys$"):
        diffusion.loss_terms(network(), {"ids": X})


@pytest.mark.parametrize("compile", [False, True])
def test_the_cores_step_trains(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compile:
        monkeypatch.setattr("effml_shared.steps._compiled", lambda model: torch.compile(model, backend="eager"))
    torch.manual_seed(0)
    model = network().float()
    diffusion = MaskedDiffusion(model, 5, reduction="token")
    step = GradientStep(
        model, torch.optim.Adam(model.parameters(), lr=0.03), diffusion.loss_terms, micro_batch=16, compile=compile
    )
    x = (torch.arange(30) % 5)[:, None].repeat(1, 8)  # one token eight times over: ln 5 for all of them
    metrics = [step(x, Plan(batch_size=30)) for _ in range(60)]
    assert metrics[0]["loss"] == pytest.approx(math.log(5), abs=0.6)
    assert 0.7 * math.log(5) / 8 < sum(m["loss"] for m in metrics[-20:]) / 20 < 1.5 * math.log(5) / 8
    assert metrics[0]["tokens"] == 240


def test_loss_compiles_in_one_graph() -> None:
    diffusion = MaskedDiffusion(network(), 5)
    corruption = diffusion.corrupt(X, t=0.7, generator=generator(2, "z"))
    compiled = torch.compile(diffusion.loss, backend="eager", fullgraph=True)
    out, expected = compiled(X, corruption=corruption), diffusion.loss(X, corruption=corruption)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.per_token, expected.per_token, rtol=1e-12, atol=1e-14)
    assert compiled(X).loss.isfinite()


def test_padding_is_neither_masked_nor_seen_nor_predicted() -> None:
    padded = torch.tensor([[0, 1, 2, 3], [2, 1, 4, 4]])
    diffusion = MaskedDiffusion(network(), 5, pad_id=4, reduction="batch")
    out = diffusion.loss(padded, corruption=diffusion.corrupt(padded, t=1.0))
    assert out.n_tokens == 6
    short = padded[1:, :2]
    alone = diffusion.loss(short, corruption=diffusion.corrupt(short, t=1.0))
    torch.testing.assert_close(out.per_token[1, :2], alone.per_token[0], rtol=1e-12, atol=0)
    logits = torch.zeros(2, 4, 6, dtype=torch.float64)
    flat = diffusion.loss(padded, corruption=diffusion.corrupt(padded, t=1.0), logits=logits)
    assert flat.per_token[0, 0].item() == pytest.approx(math.log(4))


def test_logits_at_positions_and_shifted_ones() -> None:
    at = torch.tensor([[True, False, True, False, False], [False] * 5, [False, True, True, True, False]])
    for shift in (False, True):
        diffusion = MaskedDiffusion(network(), 5, shift_logits=shift)
        full = diffusion.logits(X)
        torch.testing.assert_close(diffusion.logits(X, at=at), full[at], rtol=1e-12, atol=0)
        index = torch.tensor([14, 0, 5, 5, 1])  # any order, and twice
        torch.testing.assert_close(diffusion.logits(X, at=index), full.flatten(0, 1)[index], rtol=1e-12, atol=0)
    own = network()(X).logits
    assert own is not None
    torch.testing.assert_close(full[:, 1:], own[:, :-1], rtol=0, atol=0)
    torch.testing.assert_close(full[:, 0], own[:, 0], rtol=0, atol=0)
    for wrong, got in (
        (at[:2], r"torch.bool of shape \(2, 5\), expected torch.bool of \(3, 5\) or torch.int64 of \(n,\)"),
        (index.int(), r"torch.int32 of shape \(5,\)"),
        (index[None], r"torch.int64 of shape \(1, 5\)"),
        (at[0], r"torch.bool of shape \(5,\)"),
        (torch.tensor([0, 15]), r"15, expected positions below batch x seq = 15"),
        (torch.tensor([-1]), r"-1, expected positions"),
    ):
        with pytest.raises(ConfigError, match=f"^at: got {got}"):
            diffusion.logits(X, at=wrong)


@pytest.mark.parametrize(
    ("conditioning", "expected"),
    [(False, None), (True, 0.25), ("time", 0.25), ("alpha", 0.75025), ("sigma", -math.log(0.75025))],
)
def test_time_is_fed_as_asked(conditioning: bool | str, expected: float | None) -> None:
    seen = []

    def model(ids: Tensor, t: Tensor | None = None) -> Tensor:
        seen.append(t)
        return torch.zeros(*ids.shape, 6)

    diffusion = MaskedDiffusion(model, 5, schedule="loglinear(1e-3)", time_conditioning=conditioning)
    diffusion.logits(X, t=0.25)
    diffusion.loss(X, corruption=diffusion.corrupt(X, t=0.25))
    for t in seen:
        assert (t is None) == (expected is None)
        if t is not None:
            assert t.dtype == torch.float32
            assert t.tolist() == pytest.approx([expected] * 3)
    if expected is not None:
        with pytest.raises(ConfigError, match=r"^t: got None, expected the time for time_conditioning="):
            diffusion.logits(X)


def test_corruption_has_the_weight_of_its_law() -> None:
    diffusion = MaskedDiffusion(network(), 5, schedule="polynomial_mask(2)")
    at_time = diffusion.corrupt(X, t=torch.tensor([0.0, 0.5, 1.0]))
    assert at_time.weight.tolist() == [0.0, 4.0, 2.0]
    assert not at_time.mask[0].any()
    assert at_time.mask[2].all()
    at_level = diffusion.corrupt(X, mask_level=0.25)
    assert at_level.weight.tolist() == [4.0] * 3
    assert at_level.t.tolist() == pytest.approx([0.5] * 3)
    counted = diffusion.corrupt(X, n_masked=torch.tensor([0, 2, 5]))
    assert counted.weight.tolist() == [0.0, 2.5, 1.0]
    assert counted.mask.sum(1).tolist() == [0, 2, 5]
    for z, mask, *_ in (at_time, at_level, counted):
        assert torch.equal(z, torch.where(mask, 5, X))
    times = diffusion.corrupt(torch.zeros(1000, 1, dtype=torch.int64)).t
    assert times.min() > 1e-3
    assert times.max() <= 1
    assert torch.equal(X, torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 1, 3, 3, 2]]))


@pytest.mark.parametrize("dense", [False, True])
def test_nothing_to_mask_is_a_loss_of_zero(dense: bool) -> None:
    for x in (X, X[:0]):
        model = network()
        diffusion = MaskedDiffusion(model, 5, dense=dense)
        out = diffusion.loss(x, maskable=torch.zeros_like(x, dtype=torch.bool))
        out.loss.backward()
        assert out.loss.item() == 0
        assert out.nelbo_nats.item() == 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    out = diffusion.loss(X, corruption=diffusion.corrupt(X, t=0.0))
    assert out.loss.item() == 0


def test_narrow_types_are_widened_and_views_accepted() -> None:
    model = network().bfloat16()
    x = torch.stack([X, X], dim=2)[..., 0]
    assert not x.is_contiguous()
    out = MaskedDiffusion(model, 5).loss(x.int())
    assert out.per_token.dtype == torch.float32
    out.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert MaskedDiffusion(network().float(), 5).loss(x).per_token.dtype == torch.float32


def test_other_peoples_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForMaskedLM(config)
    diffusion = MaskedDiffusion(model, 5, pad_id=6)
    x = torch.tensor([[0, 1, 2, 3], [4, 0, 6, 6]])
    out = diffusion.loss(x, generator=generator(0, "bert"))
    out.loss.backward()
    assert out.n_tokens == 6
    assert diffusion.logits(x).shape == (2, 4, 7)

    def remote_code(input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5), past_key_values=None)

    flat = MaskedDiffusion(remote_code, 126336, reduction="batch").loss(X)  # a mask beyond the vocabulary
    per_token = flat.per_token[flat.per_token > 0]
    assert len(per_token) > 0


def test_bad_input_is_one_clear_line() -> None:
    diffusion = MaskedDiffusion(network(), 5, pad_id=None)
    for wrong, message in (
        (X.float(), r"x: got torch.float32 of shape \(3, 5\), expected int64 or int32 ids \(batch, seq\)"),
        (X.to(torch.uint8), r"x: got torch.uint8 of shape \(3, 5\), expected int64 or int32"),
        (X[0], r"x: got torch.int64 of shape \(5,\), expected int64 or int32"),
        (torch.tensor(3), r"x: got torch.int64 of shape \(\), expected int64 or int32"),
        (torch.where(X == 4, 5, X), r"x: got 5, expected no mask \(5\) and no negative id where it is maskable"),
        (torch.where(X == 4, -100, X), r"x: got -100, expected no mask"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            diffusion.loss(wrong)
    for options, message in (
        ({"t": 0.1, "n_masked": 2}, r"corrupt: got t, n_masked, expected at most one of them"),
        ({"t": 1.5}, r"t: got 1.5, expected numbers in \[0, 1\]"),
        ({"t": torch.zeros(2)}, r"t: got torch.float32 of shape \(2,\), expected a number or numbers \(3,\)"),
        ({"mask_level": math.nan}, r"mask_level: got nan, expected numbers in \[0, 1\]"),
        ({"n_masked": 6}, r"n_masked: got 6, expected at least 0 and at most the maskable tokens"),
        ({"n_masked": -1}, r"n_masked: got -1, expected at least 0"),
        ({"n_masked": 1.5}, r"n_masked: got torch.float32 of shape \(\), expected an integer or integers \(3,\)"),
        ({"maskable": torch.ones(3, 4)}, r"maskable: got shape \(3, 4\), expected \(3, 5\)"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            diffusion.corrupt(X, **options)
    with pytest.raises(ConfigError, match=r"^corruption: got None beside logits"):
        diffusion.loss(X, logits=torch.zeros(3, 5, 6))
    with pytest.raises(ConfigError, match=r"^corruption: got ids or logits of shape \(3, 5\), expected .* \(2, 5\)$"):
        diffusion.loss(X[:2], corruption=diffusion.corrupt(X))
    corruption = diffusion.corrupt(X, t=1.0)
    for dense in (False, True):
        with pytest.raises(ConfigError, match=r"^x: got 4, expected ids below the vocabulary of the logits, 4$"):
            MaskedDiffusion(network(), 5, dense=dense).loss(X, corruption=corruption, logits=torch.zeros(3, 5, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_id": -1}, r"mask_id: got -1"),
        ({"mask_id": 5, "pad_id": 5}, r"pad_id: got 5, expected another id than mask_id = 5"),
        ({"mask_id": 5, "pad_id": -1}, r"pad_id: got -1"),
        ({"mask_id": 5, "eps": 1.0}, r"eps: got 1.0"),
        ({"mask_id": 5, "reduction": "mean"}, r"reduction: got 'mean', expected one of 'token', 'sequence'"),
        ({"mask_id": 5, "time_conditioning": "t"}, r"time_conditioning: got 't', expected one of 'none', 'time'"),
        ({"mask_id": 5, "time_conditioning": "sigma"}, r"time_conditioning: got 'sigma', expected a schedule whose"),
        ({"mask_id": 5, "schedule": "lin"}, r"schedule: got 'lin'"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        MaskedDiffusion(network(), **options)


def several_processes(reduction: str, strategy: str | None) -> list[list[float]]:
    """Gradients of the loss of a fixed corruption, each rank holding a row or two, or one process holding all."""
    rank, world_size = distributed.rank(), distributed.world_size()
    model = network()
    diffusion = MaskedDiffusion(model if strategy is None else distributed.parallelize(model, strategy), 5)
    diffusion.reduction = reduction
    maskable = torch.tensor([[True] * 5, [True, False, False, False, True], [False] * 5])
    corruption = diffusion.corrupt(X, t=0.8, maskable=maskable, generator=generator(0, "ranks"))
    part = slice(rank, None, world_size)
    loss = diffusion.loss(X[part], corruption=Corruption(*(field[part] for field in corruption))).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [(g.full_tensor() if distributed.is_sharded(g) else g).flatten().tolist() for g in gradients]


def worker() -> None:
    """Entry point under torchrun: the file that results go to."""
    with distributed.launched():
        results = {
            f"{reduction} {strategy}": several_processes(reduction, strategy)
            for reduction in ("token", "sequence", "batch", "padded")
            for strategy in ("ddp", "fsdp")
        }
        if distributed.is_main():
            Path(sys.argv[1]).write_text(json.dumps(results))


@pytest.mark.parametrize("reduction", ["token", "sequence", "batch", "padded"])
def test_ranks_share_one_count(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two more ranks that bring the same rows, the mean of the ranks' gradients is that of one, in float64."""
    diffusion = MaskedDiffusion(network(), 5, reduction=reduction)
    corruption = diffusion.corrupt(X, t=0.7, generator=generator(0, "shared"))
    alone = diffusion.loss(X, corruption=corruption)
    monkeypatch.setattr("effml_shared.distributed.world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda count: count.mul_(3))
    together = diffusion.loss(X, corruption=corruption)
    torch.testing.assert_close(together.loss, alone.loss, rtol=1e-14, atol=0)
    assert together.n_tokens == alone.n_tokens == 15


@pytest.mark.slow
def test_several_processes_have_the_gradient_of_the_global_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    file = tmp_path / "results.json"
    done = subprocess.run([*command, __file__, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, gradients in json.loads(file.read_text()).items():
        for got, expected in zip(gradients, several_processes(name.split()[0], None), strict=True):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-6, atol=1e-9, msg=name)


if __name__ == "__main__":
    worker()
