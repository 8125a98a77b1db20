from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effml_diffusion.denoiser import output_head
from effml_diffusion.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from effml_diffusion.flex import Flex, FlexMDM
from effml_diffusion.flex.flex_state import FlexState
from effml_diffusion.masked_diffusion import Corruption, MaskedDiffusion
from effml_diffusion.retrofit import FlexWrapper
from effml_shared.errors import ConfigError
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

Law = dict[tuple[int, ...], float]


class Tiny(nn.Module):
    """A network of the protocol: every column sees its neighbours' embeddings, its place, the length and cond."""

    def __init__(self, vocab: int = 4, width: int = 16, longest: int = 8) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(longest + 2, width)
        self.body = nn.Sequential(
            nn.Linear(3 * width + 2, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.GELU()
        )
        self.token_head, self.gap_head = nn.Linear(width, vocab), nn.Linear(width, 1)

    def forward(self, ids: Tensor, *, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        slots = nn.functional.pad(ids, (0, 1), value=self.tokens.num_embeddings - 1)
        here = self.tokens(slots)
        before, after = nn.functional.pad(here, (0, 0, 1, -1)), nn.functional.pad(here, (0, 0, -1, 1))
        told = torch.stack([cond, lengths / 8], -1)[:, None].expand(-1, slots.shape[1], -1)
        place = self.places(torch.arange(slots.shape[1], device=ids.device))
        hidden = self.body(torch.cat([here + place, before, after, told], -1))
        pre = self.gap_head(hidden).squeeze(-1)
        return SimpleNamespace(logits=self.token_head(hidden)[:, :-1], gaps=pre.exp(), log_gaps=pre)


def uniform_model(gap: float = 0.0, vocab: int = 4) -> Callable[..., SimpleNamespace]:
    def model(ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        batch, seq = ids.shape
        return SimpleNamespace(logits=torch.zeros(batch, seq, vocab), gaps=torch.full((batch, seq + 1), gap))

    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("unmask", ["linear", "polynomial(3)", "cosine"])
@pytest.mark.parametrize("insert", ["linear", "cosine"])
def test_posteriors_depend_on_a_alone(
    insert: str, unmask: str, flex_law: Law, exact_flex_posterior: Callable[..., Any]
) -> None:
    """Bayes over all texts and all states of their tokens, with the probabilities of both schedules."""
    model = exact_flex_posterior(flex_law, 2)
    flex = FlexMDM(model, 2, 3, 3, insert=insert, unmask=unmask, length_multiple=1)
    t = torch.tensor([0.3], dtype=torch.float64)
    chance = flex.interpolant.state_probabilities(t)[0].tolist()
    seen: dict[tuple[int, ...], list[tuple[float, FlexState]]] = {}
    for x, p in flex_law.items():
        for kinds in itertools.product(range(3), repeat=len(x)):
            kind = torch.tensor([kinds], dtype=torch.int64)
            state = flex.observe(flex.texts([x]), kind > 0, kind == 1, t)
            k = int(state.lengths)
            joint = p * math.prod(chance[i] for i in kinds)
            seen.setdefault(tuple(state.ids[0, :k].tolist()), []).append((joint, state))
    assert len(seen) == 20
    for ids, cases in seen.items():
        k, total = len(ids), sum(joint for joint, _ in cases)
        padded = torch.tensor([[*ids, 3]])
        prediction = flex.predict(padded, torch.tensor([k]), t)
        expected = sum(joint / total * state.gaps[0, : k + 1] for joint, state in cases)
        torch.testing.assert_close(prediction.gaps[0, : k + 1], expected, atol=2e-7, rtol=0.0, check_dtype=False)
        probs = flex.without_special(prediction.logits).softmax(-1)[0]
        for i in (i for i in range(k) if ids[i] == 2):
            share = sum(joint / total for joint, state in cases if int(state.targets[0, i]) == 1)
            assert float(probs[i, 1]) == pytest.approx(share, abs=2e-7)


def test_networks_are_told_a_and_so_the_same_at_equal_a() -> None:
    told: list[Tensor] = []

    def model(ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        told.append(cond)
        return uniform_model()(ids, lengths, cond)

    a = torch.tensor([0.25, 0.5])
    ids, lengths = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    for insert in ("linear", "cosine", "polynomial(2)"):
        flex = FlexMDM(model, 2, 3, 4, insert=insert)
        flex.predict(ids, lengths, flex.interpolant.insert.inverse(a))
        torch.testing.assert_close(told.pop(), a)
    flex = FlexMDM(model, 2, 3, 4, insert="cosine", condition_on="t")
    flex.predict(ids, lengths, a.double())
    assert torch.equal(told.pop(), a)


def test_without_insertion_it_is_masked_diffusion() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 4, (6, 5), generator=generator())
    net = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 4)).double()
    flex = FlexMDM(
        lambda ids, lengths, cond: SimpleNamespace(logits=net(ids), gaps=torch.full((6, 6), 0.5).double()),
        mask_id=4, pad_id=5, max_length=5, reduction="batch", unmask="polynomial(2)",
    )  # fmt: skip
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    masked = torch.rand(6, 5, generator=generator(1)) < 0.6
    texts = flex.texts(x)
    everything = torch.ones_like(masked)
    ours = flex.loss(x, state=flex.observe(texts, everything, masked, t))
    weight = flex.interpolant.unmask.rate(t)
    corruption = Corruption(x.masked_fill(masked, 4), masked, 1 - t, weight, everything)
    theirs = MaskedDiffusion(net, 4, reduction="batch").loss(x, corruption=corruption)
    torch.testing.assert_close(ours.unmask, theirs.loss.detach(), rtol=1e-13, atol=0.0)
    torch.testing.assert_close(ours.per_token, theirs.per_token.detach(), rtol=1e-13, atol=0.0)
    h_a = flex.interpolant.insert.rate(t)
    assert float(ours.insert) == pytest.approx(float((h_a * 6 * 0.5).mean()))
    assert int(ours.n_tokens) == 30


def test_reductions_divide_one_sum_by_their_counts() -> None:
    x, fixed = [[0, 1, 0], [1], []], [[True, False, False], [False], []]
    sums: dict[str, Tensor] = {}
    for reduction in ("padded", "token", "sequence", "batch"):
        flex = FlexMDM(uniform_model(0.3), 2, 3, 7, reduction=reduction)
        texts = flex.texts(x, fixed)
        state = flex.corrupt(texts, flow_t=0.5, generator=generator())
        out = flex.loss(x, fixed=fixed, state=state)
        sums[reduction] = out.loss
        assert float(out.loss) == pytest.approx(float(out.unmask + out.insert))
        assert int(out.n_tokens) == 3
    assert float(sums["padded"] * 21) == pytest.approx(float(sums["batch"] * 3))
    assert float(sums["token"] * 3) == pytest.approx(float(sums["batch"] * 3))
    terms = flex.terms(state)
    h_a = h_b = 2.0  # at t = 1/2
    per_text = h_b * terms.cross_entropy.sum(1) + h_a * terms.insertion
    assert float(sums["sequence"]) == pytest.approx(float((per_text / torch.tensor([2, 1, 1])).mean()))


def test_the_terms_of_a_step_are_the_loss() -> None:
    torch.manual_seed(0)
    net = Tiny()
    x = torch.tensor([[0, 1, 0, 3], [1, 3, 3, 3], [3, 3, 3, 3]])
    for reduction in ("padded", "token", "sequence", "batch"):
        flex = FlexMDM(uniform_model(), 2, 3, 4, reduction=reduction)
        torch.manual_seed(1)
        total, count = flex.loss_terms(net, {"input_ids": x})
        torch.manual_seed(1)
        flex.model = net
        torch.testing.assert_close(total / count, flex.loss(x).loss)
    nothing, none = flex.loss_terms(net, x[:0])  # the last micro-batch of a rank may be empty
    assert (float(nothing.detach()), int(none)) == (0.0, 0)
    assert nothing.requires_grad


def test_the_loss_estimates_the_bound_and_does_not_touch_what_it_is_given(
    flex_law: Law, exact_flex_posterior: Callable[..., Any]
) -> None:
    model = exact_flex_posterior(flex_law, 2)
    flex = FlexMDM(model, 2, 3, 3, reduction="batch", t_max=1 - 1e-4)
    texts = [x for x, p in flex_law.items() for _ in range(round(p * 4000))]
    ids, before = flex.texts(texts).ids, flex.texts(texts).ids
    out = flex.loss(ids, generator=generator())
    assert torch.equal(ids, before)
    assert float(out.nelbo_nats) == pytest.approx(model.entropy, abs=0.1)
    assert float(out.loss) == pytest.approx(0.554515 + 1.695740, abs=0.15)
    again = flex.loss(ids, generator=generator())
    assert torch.equal(out.loss, again.loss)


def test_fixed_tokens_are_always_there_and_no_target() -> None:
    flex = FlexMDM(uniform_model(), 2, 3, 4)
    fixed = torch.tensor([[True, False, True, False]]).expand(500, -1)
    state = flex.corrupt(torch.tensor([[0, 1, 1, 0]]).expand(500, -1), fixed=fixed, generator=generator())
    for place in (0, 2):
        assert bool(((state.places == place) & ~state.mask).any(1).all())
    assert bool((state.mask.sum(1) <= 2).all())


def test_a_head_of_counts_is_trained_by_cross_entropy(exact_flex_posterior: Callable[..., Any]) -> None:
    law = {(0,): 0.5, (0, 0): 0.5}
    flex = FlexMDM(exact_flex_posterior(law, 1, counts=True), 1, 2, 2)
    terms = flex.terms(flex.corrupt([[0], [0, 0]], flow_t=0.0))
    torch.testing.assert_close(terms.insertion, torch.full((2,), math.log(2.0), dtype=torch.float64))
    torch.testing.assert_close(
        terms.insertion_nll, torch.tensor([1.5, 1.5]) - torch.tensor([1, 2]) * (1 + math.log(1.5)), check_dtype=False
    )
    with pytest.raises(ConfigError, match=r"gap_logits: got 3, expected at most 2 missing tokens in a gap"):
        FlexMDM(flex.model, 1, 2, 3).loss(
            [[0, 0, 0]], state=FlexMDM(uniform_model(), 1, 2, 3).corrupt([[0, 0, 0]], flow_t=0.0)
        )


def test_special_tokens_are_never_predicted() -> None:
    logits = torch.zeros(1, 4, 4)
    assert FlexMDM(uniform_model(), 2, 3, 4).without_special(logits)[0, 0].tolist() == [0.0, 0.0, -math.inf, -math.inf]
    assert not logits.any()
    assert FlexMDM(uniform_model(), 4, 5, 4).without_special(logits.bfloat16()).dtype == torch.float32


def test_a_tiny_network_learns_a_text_with_the_ordinary_step_and_writes_it() -> None:
    torch.manual_seed(0)
    net = Tiny()
    flex = FlexMDM(net, 2, 3, 4, reduction="batch", length_multiple=1)
    step = GradientStep(net, torch.optim.AdamW(net.parameters(), lr=1e-2), flex.loss_terms, micro_batch=32)
    x = torch.tensor([[0, 1, 1, 3]]).expand(64, -1)
    for i in range(150):
        step({"input_ids": x}, Plan(lr_factor=1 - i / 150, batch_size=64))
    net.train()
    out = Flex(64, insert_last=True)(flex, 200, generator=generator())
    assert net.training
    right = (out.lengths == 3) & (out.ids[:, :3] == torch.tensor([0, 1, 1])).all(1)
    assert right.double().mean() > 0.6  # a Poisson number of insertions is too large or too small at times
    bound = flex.exact_nelbo([[0, 1, 1]], t_end=1 - 1e-3)
    assert abs(float(bound.nats)) < 0.5


@pytest.mark.parametrize("reduction", ["padded", "token", "sequence", "batch"])
def test_ranks_share_one_count(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second rank that brings the same rows, the mean of the ranks' gradients is that of one."""
    flex = FlexMDM(uniform_model(0.3), 2, 3, 4, reduction=reduction)
    state = flex.corrupt([[0, 1, 0], [1]], flow_t=0.5, generator=generator())
    alone = flex.loss([[0, 1, 0], [1]], state=state)
    monkeypatch.setattr("effml_shared.distributed.world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda count: count.mul_(2))
    torch.testing.assert_close(flex.loss([[0, 1, 0], [1]], state=state).loss, alone.loss)


def test_networks_of_low_precision_are_read_in_float32() -> None:
    flex = FlexMDM(Tiny(), 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = flex.loss([[0, 1, 0], [1]], generator=generator())
        assert flex.model(torch.tensor([[0]]), lengths=torch.ones(1), cond=torch.ones(1)).logits.dtype == torch.bfloat16
    assert out.loss.dtype == out.per_token.dtype == torch.float32
    out.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(Flex(4)(flex, 3, generator=generator()).ids) == 3


def test_bounds_are_those_of_the_network_in_evaluation() -> None:
    net = nn.Sequential(nn.Dropout(0.5))
    seen = []

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
            seen.append(self.inner[0].training)
            return uniform_model(0.1)(ids, lengths, cond)

    model = Wrapped()
    flex = FlexMDM(model, 2, 3, 4)
    flex.nelbo([[0]], n_mc=8)
    flex.exact_nelbo([[0]])
    flex.loss([[0]])
    assert seen == [False, False, True]
    assert model.training


def headed(dtype: torch.dtype = torch.float64) -> DiffusionTransformer:
    """A network with a head that is found, and gaps; nothing in it is zero."""
    config = DiffusionTransformerConfig(
        n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=6, conditioning="alpha", cond_dim=8,
        gap_head="expectation", pad_id=5, max_length=7,
    )  # fmt: skip
    model = DiffusionTransformer(config).to(dtype)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_head_is_computed_at_masks_only_with_the_same_values(wrapped: bool) -> None:
    model: nn.Module = headed()
    if wrapped:
        backbone = Transformer(
            TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=6, causal=False)
        )
        model = FlexWrapper(backbone, 7, 5).double()
    head, seen = output_head(model), []
    assert head is not None
    head.register_forward_hook(lambda module, args, output: seen.append(output.numel() // output.shape[-1]))
    x = [[0, 1, 2, 0], [3, 1], []]
    found = []
    for dense in (False, True):
        flex = FlexMDM(model, 4, 5, 7, reduction="batch", dense=dense)
        state = flex.corrupt(x, flow_t=0.4, generator=generator(1))
        model.zero_grad()
        out = flex.loss(x, state=state)
        out.loss.backward()
        found.append([out.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    masks = int(state.mask.sum())
    assert seen == [masks, state.ids.numel() + 3 * wrapped]
    assert masks > 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    full = flex.predict(state.ids, state.lengths, state.flow_t)
    at = torch.tensor([2, 0, 2])
    flex.dense = False
    some = flex.predict(state.ids, state.lengths, state.flow_t, at=at)
    torch.testing.assert_close(some.logits, full.logits.flatten(0, 1)[at], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(some.gaps, full.gaps, rtol=1e-12, atol=1e-12)
    with pytest.raises(
        ConfigError, match=r"^model: got logits of shape \(1, 2, \d+\) for 3 rows .* expected dense=True$"
    ):
        flex.predict(state.ids, state.lengths, state.flow_t, at=at, model=Cutting(model))


class Cutting(nn.Module):
    """Change what a network returns in a way that needs all positions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.extra_columns = getattr(inner, "extra_columns", 0)

    def get_output_embeddings(self) -> nn.Module | None:
        return output_head(self.inner)

    def forward(self, ids: Tensor, **inputs: Tensor) -> Any:
        output = self.inner(ids, **inputs)
        return output._replace(logits=output.logits[:, :2])


class LengthNet(nn.Module):
    """What is missing from one symbol repeated, from the number of tokens and a."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths = nn.Embedding(65, 64)
        self.body = nn.Sequential(nn.Linear(66, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, ids: Tensor, *, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        rest = (1 - cond).clamp(min=1e-6).log()[:, None]
        pre = self.body(torch.cat([self.lengths(lengths), cond[:, None], rest], -1)) + rest  # as many as are absent
        pre = pre.expand(-1, ids.shape[1] + 1)
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 1), gaps=pre.exp(), log_gaps=pre)


def test_expected_counts_are_learned() -> None:
    """Lengths 4, 16, 32, 64 with probabilities .1, .4, .4, .1, and the exact E[missing | tokens, t]."""
    torch.manual_seed(0)
    net = LengthNet()
    flex = FlexMDM(net, 1, 2, 64, reduction="batch")
    step = GradientStep(
        net, torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.0), flex.loss_terms, clip_norm=1.0
    )
    lengths, chance = torch.tensor([4, 16, 32, 64]), torch.tensor([0.1, 0.4, 0.4, 0.1])
    for i in range(800):
        n = lengths[torch.multinomial(chance, 128, replacement=True)]
        ids = torch.where(torch.arange(64) < n[:, None], 0, 2)
        step({"input_ids": ids}, Plan(lr_factor=1 - i / 800, batch_size=128))
    exact = {(2, 0.25): 11.164186, (4, 0.25): 14.595230, (8, 0.5): 8.197072, (16, 0.5): 15.999769, (20, 0.75): 12.0}
    for (k, t), missing in exact.items():
        gaps = flex.predict(torch.zeros(1, 8, dtype=torch.int64), torch.tensor([k]), torch.tensor([t])).gaps
        assert float(gaps[0, 0].detach()) * (k + 1) == pytest.approx(missing, rel=0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad_id": 2}, r"pad_id: got 2, expected another id than mask_id = 2"),
        ({"mask_id": -1}, r"mask_id: got -1"),
        ({"max_length": 0}, r"max_length: got 0"),
        ({"insert": "sin"}, r"schedule: got 'sin'"),
        ({"condition_on": "sigma"}, r"condition_on: got 'sigma'"),
        ({"reduction": "mean"}, r"reduction: got 'mean'"),
        ({"t_max": 1.0}, r"t_max: got 1.0"),
        ({"length_multiple": 0}, r"length_multiple: got 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlexMDM(**{"model": uniform_model(), "mask_id": 2, "pad_id": 3, "max_length": 4, **arguments})


def test_wrong_times_batches_and_networks() -> None:
    flex = FlexMDM(uniform_model(), 2, 3, 4)
    for wrong in (1.0, -0.1, math.nan, torch.zeros(3)):
        with pytest.raises(ConfigError, match=r"flow_t: got"):
            flex.corrupt([[0]], flow_t=wrong)
    with pytest.raises(ConfigError, match=r"batch: got input_ids, attention_mask, expected input_ids and at most"):
        flex.loss_terms(uniform_model(), {"input_ids": torch.zeros(1, 1), "attention_mask": torch.ones(1, 1)})
    with pytest.raises(ConfigError, match=r"x: got 7, expected ids below the vocabulary of the logits, 4"):
        flex.loss(
            [[7, 7, 7, 7]],
            state=FlexMDM(uniform_model(), 8, 9, 4).corrupt([[7, 7, 7, 7]], flow_t=0.8, generator=generator()),
        )
    for output in (SimpleNamespace(gaps=torch.zeros(1, 9)), SimpleNamespace(logits=torch.zeros(1, 8, 4)), None):
        with pytest.raises(ConfigError, match=r"model: got \w+ from it, expected .logits, and .gaps"):
            FlexMDM(lambda ids, out=output, **_: out, 2, 3, 4).predict(torch.zeros(1, 8), torch.ones(1), torch.zeros(1))
    short = SimpleNamespace(logits=torch.zeros(1, 8, 4), gaps=torch.zeros(1, 8))
    with pytest.raises(ConfigError, match=r"^model: got gaps of shape \(1, 8\), expected \(1, 9, \.\.\.\)$"):
        FlexMDM(lambda ids, **_: short, 2, 3, 4).predict(torch.zeros(1, 8), torch.ones(1), torch.zeros(1))
