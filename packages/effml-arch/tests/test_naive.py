"""The definition of the layer against closed forms and independent numbers; every oracle binds both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.naive import naive_scan
from effml_arch.recurrent.pair_bias import PairBias
from effml_shared.layers import Block, Context, TransformerConfig, rotary_tables
from torch import Tensor, nn

SINES = {
    "self_attn.q_proj": (1.3, 0.7, 0.1),
    "self_attn.k_proj": (0.9, 1.1, 0.2),
    "self_attn.v_proj": (1.7, 0.5, 0.3),
    "self_attn.o_proj": (0.6, 1.9, 0.4),
    "mlp.up_proj": (1.1, 0.8, 0.5),
    "mlp.down_proj": (0.4, 1.4, 0.6),
}


@pytest.fixture(params=["naive", "tiled"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make(backend: str, *, norms: bool = True, **options: Any) -> RecurrentTransformerLayer:
    base = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 16, "mlp": "gelu", "base_block": 4}
    torch.manual_seed(0)
    layer = RecurrentTransformerLayer(RecurrentTransformerConfig(**{**base, **options}, backend=backend)).double()
    if not norms:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()  # type: ignore[assignment]
    return layer


@torch.no_grad()
def fill(layer: nn.Module, **matrices: Any) -> None:
    """Set matrices by the last part of their module's name, and all others to 0."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            value = matrices.get(name.split(".")[-1], 0.0)
            module.weight.copy_(torch.as_tensor(value, dtype=torch.float64).expand(module.weight.shape))


@torch.no_grad()
def sines(layer: nn.Module) -> None:
    for name, (a, b, c) in SINES.items():
        weight = layer.get_submodule(name).weight
        rows, cols = (torch.arange(size, dtype=torch.float64) for size in weight.shape)
        weight.copy_(0.5 * torch.sin(a * rows[:, None] + b * cols + c))


def sine_input() -> Tensor:
    t, d = torch.arange(6, dtype=torch.float64), torch.arange(8, dtype=torch.float64)
    return torch.cos(0.3 * t[:, None] + 0.5 * d)[None].requires_grad_()


def test_deterministic_vector_with_rotary_positions_and_key_norms(backend: str) -> None:
    layer, x = make(backend, qk_norm="head"), sine_input()
    sines(layer)
    z = layer(x)
    loss = z.square().mean()
    assert loss.item() == pytest.approx(12.989966235712, abs=1e-11)
    expected = [4.2620962335, 1.0017749502, -1.2269043422, -2.6871815075, -3.2353677259, -3.7899358290]
    assert z[0, :, 0].tolist() == pytest.approx(expected, abs=1e-9)
    names = [name.removesuffix(".weight").split(".")[-1] for name, _ in layer.named_parameters()]
    norms = dict(zip(["x", *names], (g.norm().item() for g in grads(loss, x, layer)), strict=True))
    assert norms == pytest.approx(
        {
            "x": 1.6804582397,
            "q_proj": 1.6100710754,
            "k_proj": 5.2110386335,
            "v_proj": 9.4513284418,
            "o_proj": 9.4176440830,
            "up_proj": 10.6583838106,
            "down_proj": 9.7043574973,
            "input_layernorm": 7.7344212104,
            "post_attention_layernorm": 1.6400984525,
            "q_norm": 0.8687707067,
            "k_norm": 0.8773903643,
        },
        abs=1e-9,
    )


def test_deterministic_vector_without_positions(backend: str) -> None:
    layer, x = make(backend, position="none"), sine_input()
    sines(layer)
    z = layer(x)
    loss = z.square().mean()
    assert loss.item() == pytest.approx(15.114997621339, abs=1e-11)
    assert z[0, 5, 0].item() == pytest.approx(-4.4356395763, abs=1e-9)
    names = ["x", *dict(layer.named_parameters())]
    norms = {name: g.norm().item() for name, g in zip(names, grads(loss, x, layer), strict=True)}
    assert norms["self_attn.k_proj.weight"] == pytest.approx(3.2933863311, abs=1e-9)
    assert norms["self_attn.v_proj.weight"] == pytest.approx(10.4142675553, abs=1e-9)
    assert norms["x"] == pytest.approx(1.3581072958, abs=1e-9)


def grads(loss: Tensor, x: Tensor, layer: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [x, *layer.parameters()])


def test_constant_input_adds_up_to_harmonic_numbers(backend: str) -> None:
    layer = make(backend, norms=False, d_model=1, n_heads=1, d_ff=1, position="none")
    fill(layer, k_proj=1, v_proj=1, o_proj=1)
    z = layer(torch.ones(1, 8, 1, dtype=torch.float64))
    harmonic = torch.tensor([1 + sum(1 / i for i in range(1, t + 1)) for t in range(1, 9)], dtype=torch.float64)
    torch.testing.assert_close(z[0, :, 0], harmonic, rtol=0, atol=1e-14)


def test_uniform_attention_is_a_linear_recurrence(backend: str) -> None:
    layer, x = make(backend, norms=False, d_model=6, n_heads=1, position="none"), torch.randn(2, 20, 6).double()
    value, out = (0.3 * torch.randn(6, 6).double() for _ in range(2))
    fill(layer, v_proj=value, o_proj=out)
    w, total, expected = out @ value, torch.zeros(2, 6).double(), []
    for t in range(1, 21):
        z = x[:, t - 1] + (total + x[:, t - 1]) @ w.T / t
        total = total + z
        expected.append(z)
    torch.testing.assert_close(layer(x), torch.stack(expected, 1), rtol=0, atol=1e-13)


def test_one_layer_computes_prefix_parity(backend: str) -> None:
    # Channels: bit, state, flag, 1. The flag, set by the MLP, makes position t attend to t - 1 and not to itself.
    layer = make(backend, norms=False, d_model=4, n_heads=1, d_ff=3, mlp="relu", position="none", window=2)
    state = torch.zeros(4, 4)
    state[1, 1] = 1
    q, k, up, down = torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(3, 4), torch.zeros(4, 3)
    q[0, 3] = 2 * 60 * 2  # content logit 2 s f, times sqrt(head_dim)
    k[0, 2] = 1
    up[0, 0] = up[1, 0] = up[1, 1] = up[2, 3] = 1
    up[1, 3] = -1
    down[1, 0], down[1, 1], down[2, 2] = 1, -2, 1
    fill(layer, q_proj=q, k_proj=k, v_proj=state, o_proj=state, up_proj=up, down_proj=down)
    bits = torch.randint(2, (2, 512), generator=torch.Generator().manual_seed(1)).double()
    x = torch.stack([bits, torch.zeros_like(bits), torch.zeros_like(bits), torch.ones_like(bits)], -1)
    torch.testing.assert_close(layer(x)[..., 1], bits.cumsum(1) % 2, rtol=0, atol=1e-12)


def test_disjoint_read_and_write_channels_give_the_standard_layer(backend: str) -> None:
    layer, x = make(backend, norms=False, d_model=16, qk_norm="head"), torch.randn(1, 40, 16).double()
    with torch.no_grad():
        for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight[:, 8:] = 0  # read the first half only
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight[:8] = 0  # write the second half only
    cos, sin = rotary_tables(torch.arange(40)[None], 8, layer.config.rope_base, torch.float64)
    expected = Block.forward(layer, x, Context(rotary=(cos, sin)))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


def test_the_first_position_is_the_standard_layer_and_reads_its_own_value(backend: str) -> None:
    layer, x = make(backend, qk_norm="head"), torch.randn(2, 9, 8).double()
    context = Context(rotary=rotary_tables(torch.zeros(1, 1), 4, layer.config.rope_base, torch.float64))
    expected = Block.forward(layer, x[:, :1], context)
    torch.testing.assert_close(layer(x[:, :1]), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(x)[:, :1], expected, rtol=0, atol=1e-14)


def test_the_past_does_not_depend_on_the_future(backend: str) -> None:
    layer, x = make(backend, qk_norm="head"), torch.randn(2, 11, 8).double()
    changed = x.clone()
    changed[:, 7:] += 1
    assert torch.equal(layer(x)[:, :7], layer(changed)[:, :7])
    assert not torch.isclose(layer(x)[:, 7:], layer(changed)[:, 7:]).any(-1).all()


def test_no_mixture_is_the_standard_layer(backend: str) -> None:
    layer, x = make(backend, write_mix=0.0, position="none"), torch.randn(2, 9, 8).double()
    block = Block(TransformerConfig(n_layers=1, d_model=8, n_heads=2, d_ff=16, mlp="gelu", position="none")).double()
    block.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), block(x, Context()), rtol=0, atol=1e-13)


def test_naive_scan_is_the_definition_written_out() -> None:
    layer, x = make("naive", norms=False, n_kv_heads=1, position="none", mlp="relu"), torch.randn(1, 5, 8).double()
    w = {name.split(".")[-2]: p for name, p in layer.named_parameters()}
    keys, values, expected = [], [], []
    for x_t in x[0]:
        k, v, q = (
            torch.stack([*keys, w["k_proj"] @ x_t]),
            torch.stack([*values, w["v_proj"] @ x_t]),
            w["q_proj"] @ x_t,
        )
        a = torch.cat([(k @ head / 2).softmax(0) @ v for head in q.split(4)])
        u = x_t + w["o_proj"] @ a
        z = u + w["down_proj"] @ (w["up_proj"] @ u).relu()
        keys.append(w["k_proj"] @ z)
        values.append(w["v_proj"] @ z)
        expected.append(z)
    z, k, v = naive_scan(layer, x, PairBias())
    torch.testing.assert_close(z[0], torch.stack(expected), rtol=0, atol=1e-13)
    torch.testing.assert_close(k[0, 0], torch.stack(keys), rtol=0, atol=1e-13)
    torch.testing.assert_close(v[0, 0], torch.stack(values), rtol=0, atol=1e-13)
