from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effml_diffusion.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from effml_diffusion.flex import Flex, FlexMDM
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_shared.errors import ConfigError
from effml_shared.layers import rotary_tables, rotate
from effml_shared.testing.modules import ModuleKit
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

MASK, PAD = 6, 7
PLAIN = DiffusionTransformerConfig(n_layers=2, d_model=32, n_heads=4, d_ff=48, vocab_size=8, cond_dim=12)
TIMED = replace(PLAIN, conditioning="time")
FLEX = replace(TIMED, conditioning="alpha", gap_head="expectation", max_length=9, pad_id=PAD)
PLACED = replace(PLAIN, position="none", coordinates=((0, 0, 0, 1, 1, 1), (0, 1, 2, 0, 1, 2)))


def waves(module: nn.Module, height: float = 0.3) -> Any:
    """Give every parameter values that depend on its place alone, so that nothing is zero and a device moves it."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            wave = torch.arange(parameter.numel()).add(number).mul(0.7).sin().view(parameter.shape)
            parameter.copy_(height * wave + (1.0 if parameter.ndim == 1 else 0.0))
    return module


def model64(config: DiffusionTransformerConfig, *, started: bool = False) -> DiffusionTransformer:
    model = DiffusionTransformer(config)
    return (model if started else waves(model)).double().eval().requires_grad_(False)


def random_ids(batch: int = 3, seq: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(MASK + 1, (batch, seq), generator=torch.Generator().manual_seed(seed))


def times(batch: int = 3) -> Tensor:
    return torch.linspace(0.2, 0.9, batch, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


class TestPlainConforms(ModuleKit):
    def make(self) -> DiffusionTransformer:
        return waves(DiffusionTransformer(PLACED))

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": random_ids(), "hidden_states": True}

    @pytest.mark.slow  # the other one has all that this one has, but coordinates
    def test_compiled_equals_eager(self) -> None:
        super().test_compiled_equals_eager()


class TestConditionedConforms(ModuleKit):
    def make(self) -> DiffusionTransformer:
        return waves(DiffusionTransformer(replace(FLEX, n_layers=1, length_conditioning=True)), 0.1)

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": random_ids(), "lengths": torch.tensor([6, 0, 3]), "cond": times().float()}


# The mathematics.


def naive_logits(model: DiffusionTransformer, ids: Tensor, t: float) -> Tensor:
    """The network's definition for one text (seq,), head by head."""
    config, p = model.config, dict(model.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return p[name] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    angles = [t * math.exp(-math.log(1e4) * k / 128) for k in range(128)]
    temb = torch.tensor([f(a) for f in (math.cos, math.sin) for a in angles], dtype=torch.float64)
    silu = torch.nn.functional.silu
    c = silu(linear(silu(linear(temb, "time_embedding.hidden")), "time_embedding.output"))
    cos, sin = rotary_tables(torch.arange(len(ids))[None], config.head_dim, 1e4, torch.float64)
    x = p["model.embed_tokens.weight"][ids]
    for layer in range(config.n_layers):
        at = f"model.layers.{layer}"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(c, f"{at}.modulation").split(config.d_model)
        y = norm(x, f"{at}.input_layernorm.weight") * (1 + scale_1) + shift_1
        outs = []
        q, k, v = (linear(y, f"{at}.self_attn.{name}_proj").split(config.head_dim, -1) for name in "qkv")
        for head in range(config.n_heads):
            turned_q, turned_k = (rotate(h[head][None, None], cos, sin)[0, 0] for h in (q, k))
            outs.append((turned_q @ turned_k.T / config.head_dim**0.5).softmax(-1) @ v[head])
        x = x + gate_1 * linear(torch.cat(outs, -1), f"{at}.self_attn.o_proj")
        y = norm(x, f"{at}.post_attention_layernorm.weight") * (1 + scale_2) + shift_2
        y = F.gelu(linear(y, f"{at}.mlp.up_proj"), approximate="tanh")
        x = x + gate_2 * linear(y, f"{at}.mlp.down_proj")
    shift, scale = linear(c, "norm_modulation").split(config.d_model)
    return linear(norm(x, "model.norm.weight") * (1 + scale) + shift, "lm_head")


def test_is_its_definition() -> None:
    model, ids, t = model64(TIMED), random_ids(), times()
    expected = torch.stack([naive_logits(model, row, float(time)) for row, time in zip(ids, t, strict=True)])
    close(model(ids, t=t).logits, expected)
    scaled = DiffusionTransformer(replace(TIMED, time_scale=1000.0)).double()
    scaled.load_state_dict(model.state_dict())
    close(scaled(ids, t=t / 1000).logits, expected)


@pytest.mark.parametrize("config", [PLAIN, TIMED, FLEX, PLACED], ids=["plain", "timed", "flex", "placed"])
def test_starts_without_a_preference(config: DiffusionTransformerConfig) -> None:
    model, ids = model64(config, started=True), random_ids()
    out = model(ids, t=times() if config.conditioned else None)
    assert (out.logits == 0).all()
    loss = F.cross_entropy(out.logits.flatten(0, 1), ids.flatten())
    assert float(loss) == pytest.approx(math.log(8), rel=2 * 2.0**-52)
    if config.gap_head != "none":
        close(out.gaps, torch.ones(3, 7).double(), 1e-6)  # a float32 bias


@pytest.mark.parametrize("config", [TIMED, FLEX], ids=["timed", "flex"])
def test_conditioned_layers_start_as_the_identity(config: DiffusionTransformerConfig) -> None:
    model = DiffusionTransformer(config)
    out = model(random_ids(), t=times().float(), hidden_states=True)
    first, *others = out.hidden_states
    assert len(others) == config.n_layers
    assert all(torch.equal(state, first) for state in others)
    F.cross_entropy(out.logits.flatten(0, 1), random_ids().flatten()).backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"lm_head.weight", "lm_head.bias"}


def test_time_reaches_logits_only_through_both_adaln_and_head() -> None:
    model, ids = model64(TIMED, started=True), random_ids()

    def logits_and_hidden(t: float) -> tuple[Tensor, Tensor]:
        out = model(ids, t=torch.full((3,), t), hidden_states=True)
        return out.logits, out.hidden_states[-1]

    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    (logits, hidden), (later, later_hidden) = logits_and_hidden(0.2), logits_and_hidden(0.8)
    assert not torch.equal(hidden, later_hidden)
    assert torch.equal(logits, later)
    model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert (logits_and_hidden(0.2)[0] - logits_and_hidden(0.8)[0]).abs().min() > 0


def test_zero_is_the_time_zero() -> None:
    model, never = model64(TIMED), model64(replace(TIMED, conditioning="zero"))
    assert torch.equal(never(random_ids()).logits, model(random_ids(), t=torch.zeros(3)).logits)


def test_cond_is_another_name_of_t() -> None:
    model = model64(TIMED)
    assert torch.equal(model(random_ids(), t=times()).logits, model(random_ids(), cond=times()).logits)


def test_without_conditioning_it_is_the_shared_transformer() -> None:
    fields = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48, "vocab_size": 8, "vocab_rows": 8}
    same = {"norm": "layer", "norm_eps": 1e-5, "mlp": "gelu_tanh", "mlp_bias": True}
    causal = waves(Transformer(TransformerConfig(**fields, **same, causal=True))).double()  # type: ignore[arg-type]
    other = Transformer(TransformerConfig(**fields, **same, causal=False)).double()  # type: ignore[arg-type]
    other.load_state_dict(causal.state_dict())
    model = model64(PLAIN)
    missing, unexpected = model.load_state_dict(causal.state_dict(), strict=False)
    assert missing == ["lm_head.bias"]
    assert not unexpected
    model.lm_head.bias.zero_()
    close(model(random_ids()).logits, other(random_ids()).logits)


def test_a_length_is_told_once_it_has_been_learned() -> None:
    config = replace(TIMED, length_conditioning=True, max_length=6)
    ids, lengths = random_ids(), torch.tensor([2, 4, 6])
    model, plain = DiffusionTransformer(config).double(), DiffusionTransformer(TIMED).double()
    waves(plain)
    model.load_state_dict(plain.state_dict(), strict=False)
    told = model(ids, t=times(), lengths=lengths).logits
    assert torch.equal(told, plain(ids, t=times(), lengths=lengths).logits)
    model = model64(config)
    whole, part = model(ids[:1], t=times(1)).logits, model(ids[:1, :4], t=times(1)).logits
    assert torch.equal(whole, model(ids[:1], t=times(1), lengths=torch.tensor([6])).logits)
    assert torch.equal(whole, model(ids[:1], t=times(1), attention_mask=torch.ones(1, 6)).logits)
    close(part, model(ids[:1], t=times(1), lengths=torch.tensor([4])).logits[:, :4])


# Padding, places, and the terminal slot.


@pytest.mark.parametrize("config", [PLAIN, TIMED, FLEX], ids=["plain", "timed", "flex"])
def test_padding_changes_nothing(config: DiffusionTransformerConfig) -> None:
    model, ids, lengths = model64(config), random_ids(), torch.tensor([6, 1, 4])
    t = times() if config.conditioned else None
    whole = model(ids, t=t, lengths=lengths)
    masked = model(ids, (torch.arange(6) < lengths[:, None]).long(), t)
    assert torch.equal(whole.logits, masked.logits)
    for row, k in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :k], t=None if t is None else t[row : row + 1])
        close(whole.logits[row, :k], alone.logits[0])
        if whole.gaps is not None:
            close(whole.gaps[row, : k + 1], alone.gaps[0])
            close(whole.log_gaps[row, : k + 1], alone.log_gaps[0])


def test_left_padding_and_holes_change_nothing() -> None:
    model, ids = model64(PLAIN), random_ids(1)
    alone = model(ids).logits[0]
    places = torch.tensor([1, 2, 5, 6, 7, 9])
    spread, mask = torch.full((1, 11), PAD), torch.zeros(1, 11)
    spread[:, places], mask[:, places] = ids, 1.0
    close(model(spread, mask).logits[0, places], alone)


def test_what_stands_beyond_the_length_is_not_read() -> None:
    model, ids, lengths = model64(FLEX), random_ids(), torch.tensor([6, 1, 4])
    beyond = torch.arange(6) >= lengths[:, None]
    out = model(ids, lengths=lengths, cond=times())
    for value in (PAD, -1, 99):  # and need not be an id
        other = model(ids.masked_fill(beyond, value), lengths=lengths, cond=times())
        assert torch.equal(out.gaps, other.gaps)
        assert torch.equal(out.logits, other.logits)


def test_an_empty_text_has_one_gap_and_no_logits() -> None:
    out = model64(FLEX)(torch.zeros(2, 0, dtype=torch.int64), lengths=torch.zeros(2, dtype=torch.int64), cond=times(2))
    assert out.logits.shape == (2, 0, 8)
    assert out.gaps.shape == (2, 1)
    padded = model64(FLEX)(torch.full((2, 3), PAD), lengths=torch.zeros(2, dtype=torch.int64), cond=times(2))
    close(padded.gaps[:, :1], out.gaps)
    assert DiffusionTransformer(PLAIN)(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, 8)


def test_without_places_tokens_are_a_set() -> None:
    model, ids = model64(replace(TIMED, position="none")), random_ids()
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    close(model(ids[:, order], t=times()).logits, model(ids, t=times()).logits[:, order])
    assert (model64(TIMED)(ids[:, order], t=times()).logits - model64(TIMED)(ids, t=times()).logits[:, order]).any()


def test_coordinates_are_added_axis_by_axis() -> None:
    model, ids = model64(PLACED), random_ids()
    first = model(ids, hidden_states=True).hidden_states[0]
    p = dict(model.named_parameters())
    for place, (row, column) in enumerate(zip(*PLACED.coordinates, strict=True)):
        tokens = p["model.embed_tokens.weight"][ids[:, place]]
        axes = p["coordinate_embeddings.0.weight"][row] + p["coordinate_embeddings.1.weight"][column]
        close(first[:, place], tokens + axes)
    close(model(ids[:, :4], hidden_states=True).hidden_states[0], first[:, :4])
    with pytest.raises(ConfigError, match=r"^input_ids: got 7 tokens, expected at most 6$"):
        model(random_ids(seq=7))


def test_rows_without_an_id_are_never_predicted() -> None:
    logits = DiffusionTransformer(replace(PLAIN, vocab_rows=16))(random_ids()).logits
    assert logits.shape == (3, 6, 16)
    assert (logits[..., 8:] == -torch.inf).all()
    assert logits[..., :8].isfinite().all()


# In the objectives, and in training.


def test_masked_diffusion_runs_the_head_at_masks_only() -> None:
    model, x = waves(DiffusionTransformer(TIMED)), random_ids().clamp(max=MASK - 1)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    diffusion = MaskedDiffusion(model, MASK, pad_id=PAD, time_conditioning="time")
    corruption = diffusion.corrupt(x, t=0.5, generator=torch.Generator().manual_seed(0))
    loss = diffusion.loss(x, corruption=corruption).loss
    assert seen == [int(corruption.mask.sum())]
    dense = MaskedDiffusion(model, MASK, pad_id=PAD, time_conditioning="time", dense=True)
    torch.testing.assert_close(dense.loss(x, corruption=corruption).loss, loss)


@pytest.mark.parametrize("kind", ["expectation", "distribution"])
def test_learns_and_generates_as_a_flex_model(kind: str) -> None:
    """Texts 0 1 2 and 3 4 5 4 5: after a few steps the lengths that come out are about right."""
    model = DiffusionTransformer(replace(FLEX, gap_head=kind, mlp="gelu"))
    flex = FlexMDM(model, MASK, PAD, max_length=9, reduction="batch")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    texts = [[0, 1, 2], [3, 4, 5, 4, 5]] * 16
    losses = []
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = flex.loss(texts).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())  # what DDP needs
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    out = Flex(16)(flex, 32, generator=torch.Generator().manual_seed(0))
    assert 2 < out.lengths.double().mean() < 6


def test_dropout_acts_in_training_alone() -> None:
    model = waves(DiffusionTransformer(replace(TIMED, resid_dropout=0.5)))
    torch.manual_seed(0)
    ids, t = random_ids(), times().float()
    assert not torch.equal(model(ids, t=t).logits, model(ids, t=t).logits)
    model.eval()
    assert torch.equal(model(ids, t=t).logits, waves(DiffusionTransformer(TIMED))(ids, t=t).logits)


def test_seeds_draw_and_meta_waits() -> None:
    first, again, other = (DiffusionTransformer(TIMED, seed) for seed in (0, 0, 1))
    weights = [model.get_parameter("model.embed_tokens.weight") for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for config in (FLEX, PLACED):
        with torch.device("meta"):
            model = DiffusionTransformer(config)
        model.to_empty(device="cpu").reset_parameters()
        expected = DiffusionTransformer(config).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_runs_on_meta_for_whoever_counts_flops() -> None:
    with torch.device("meta"):
        model, ids = DiffusionTransformer(FLEX), torch.zeros(3, 6, dtype=torch.int64)
        out = model(ids, lengths=torch.ones(3), cond=torch.ones(3))
    assert out.logits.shape == (3, 6, 8)
    assert out.gaps.shape == (3, 7)


# Bad input.


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (PLAIN, {"input_ids": torch.zeros(3, dtype=torch.int64)}, r"^input_ids: got shape \(3,\), expected \(batch, "),
        (PLAIN, {"input_ids": torch.tensor([[8]])}, r"^input_ids: got 8, expected 0 to 7$"),
        (PLAIN, {"input_ids": torch.tensor([[-1]])}, r"^input_ids: got -1, expected 0 to 7$"),
        (PLAIN, {"attention_mask": torch.ones(3, 5)}, r"^attention_mask: got shape \(3, 5\), expected \(3, 6\)$"),
        (PLAIN, {"lengths": torch.tensor([1])}, r"^lengths: got shape \(1,\), expected \(3,\)$"),
        (PLAIN, {"lengths": torch.tensor([1, 7, 2])}, r"^lengths: got 7, expected 0 to 6$"),
        (PLAIN, {"lengths": torch.ones(3), "attention_mask": torch.ones(3, 6)}, r"^lengths: got them beside"),
        (PLAIN, {"t": torch.ones(3)}, r"^t: got some, expected none for conditioning='none'$"),
        (TIMED, {}, r"^t: got none, expected some for conditioning='time'$"),
        (TIMED, {"t": torch.ones(3), "cond": torch.ones(3)}, r"^cond: got it beside t, expected one of them$"),
        (TIMED, {"t": torch.ones(())}, r"^t: got shape \(\), expected \(3,\)$"),
        (TIMED, {"t": torch.tensor([0.0, 1.5, 0.0])}, r"^t: got 1\.5, expected numbers in \[0, 1\]"),
        (TIMED, {"t": torch.tensor([0.0, math.nan, 0.0])}, r"^t: got nan, expected numbers in \[0, 1\]"),
        (
            FLEX,
            {"cond": torch.ones(3), "attention_mask": torch.tensor([[0.0, 1, 1, 1, 1, 1]] * 3)},
            r"^attention_mask: got 1, expected padding at the right only, beside a gap head$",
        ),
    ],
)
def test_bad_inputs_are_named(config: DiffusionTransformerConfig, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusionTransformer(config)(**{"input_ids": random_ids(), **inputs})
