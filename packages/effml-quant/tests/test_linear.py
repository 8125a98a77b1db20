import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from effml_quant.casting import fake_quantize
from effml_quant.precision.hadamard import hadamard_rotate
from effml_quant.precision.linear import MXLinear, keeps, mx_linear, operands, round_to
from effml_quant.precision.scheme import PrecisionScheme
from effml_quant.quantizer import Quantizer
from effml_shared.errors import ConfigError
from effml_shared.testing.modules import ModuleKit
from torch import nn
from torch.utils.checkpoint import checkpoint

MX = PrecisionScheme.mx
EXACT = PrecisionScheme(w_fwd=None, a_fwd=None, vector=None)  # the same code with every quantiser the identity
SCHEMES = {
    "e4m3": MX("mxfp8_e4m3"),
    "e2m1": MX("mxfp4", vector=None, rounding="away"),
    "mix": PrecisionScheme.mx_mix(scale_rule="rceil"),
    "all six": PrecisionScheme("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8", "mxfp6_e3m2", "mxfp8_e5m2", vector=None),
    "weights": PrecisionScheme.bf16_act_all("mxfp4"),
    "forward": PrecisionScheme.forward_only("mxfp4"),
    "sequence": MX("mxfp4", dw_axis="sequence"),
    "tile": MX("mxfp4", weight_tile=32),
    "hadamard": MX("mxfp4", hadamard=True),
    "nvfp4": PrecisionScheme.nvfp4_training(gradient_rounding=None),
}


def spread(*shape, seed=0, dtype=torch.float64):
    """Numbers whose magnitude depends on the row and the column, so that blocks along a wrong axis show."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=stream, dtype=torch.float64)
    for axis, size in enumerate(shape):
        shift = torch.randint(-6, 7, (size,), generator=stream)
        x = x * (2.0**shift).view([size if a == axis else 1 for a in range(len(shape))])
    return x.to(dtype)


def reference(x, w, b, g, scheme):
    """The formulas, product by product, for x (batch, seq, in)."""

    def q(tensor, role, axis, *, gradient=False):
        fmt = scheme.format(role)
        if fmt is None:
            return tensor
        block = (scheme.weight_tile,) * 2 if scheme.weight_tile and role.startswith("w") else scheme.block_size
        options = {} if fmt.scale == "none" else {"block_size": block, "scale_rule": scheme.scale_rule}
        return fake_quantize(tensor, fmt, axis=axis, rounding=scheme.rounding, **options)

    def r(tensor):
        away = "away" if scheme.rounding == "away" else "rne"
        return tensor if scheme.vector is None else fake_quantize(tensor, scheme.vector, rounding=away)

    y = r(q(r(x), "a_fwd", -1) @ q(r(w), "w_fwd", 1).T)
    y = y if b is None else r(y + r(b))
    flat_x, flat_g = x.flatten(0, 1), g.flatten(0, 1)
    if not scheme.quantize_backward:
        return y, g @ w, flat_g.T @ flat_x, flat_g.sum(0)
    dx = r(q(r(g), "g_dx", -1) @ q(r(w), "w_bwd", 0))
    if scheme.dw_axis == "sequence":
        dw = sum(q(r(gs), "g_dw", 0).T @ q(r(xs), "a_bwd", 0) for gs, xs in zip(g, x, strict=True))
    else:
        turn = hadamard_rotate if scheme.hadamard else lambda v: v
        dw = q(turn(r(flat_g)), "g_dw", 0).T @ q(turn(r(flat_x)), "a_bwd", 0)
    return y, dx, r(dw), r(r(flat_g).sum(0))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_product_is_the_formula(name, bias):
    scheme = SCHEMES[name]
    x, w, g = spread(2, 45, 70), spread(40, 70, seed=1), spread(2, 45, 40, seed=2)
    b = spread(40, seed=3) if bias else None
    leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    y = mx_linear(*leaves, *(() if bias else (None,)), scheme)
    y.backward(g)
    expected = reference(x, w, b, g, scheme)
    for found, value in zip((y, *(leaf.grad for leaf in leaves)), expected, strict=False):
        torch.testing.assert_close(found.detach(), value, rtol=1e-6, atol=1e-6 * value.abs().max().item())


def test_a_wrong_axis_would_be_seen():
    x, w, g = spread(1, 64, 64), spread(64, 64, seed=1), spread(1, 64, 64, seed=2)
    right = reference(x, w, None, g, SCHEMES["e2m1"])
    for a, b, value in ((x[0], w.T, right[0]), (g[0], w, right[1]), (g[0].T, x[0], right[2])):
        for axes in ((0, 0), (1, 1), (0, 1)):  # the right one is (1, 0)
            wrong = fake_quantize(a, "mxfp4", axis=axes[0]) @ fake_quantize(b, "mxfp4", axis=axes[1])
            assert (wrong - value).abs().max() > 1e-3 * value.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_scheme_it_is_nn_linear_bit_for_bit(dtype):
    torch.manual_seed(0)
    plain = nn.Linear(48, 24).to(dtype)
    own = MXLinear(48, 24).to(dtype)
    own.load_state_dict(plain.state_dict())
    grads = []
    for layer in (plain, own):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        x = spread(3, 7, 48, dtype=dtype).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        optimizer.step()
        grads.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_forward_only_takes_the_original_tensors_backward():
    x, w, g = spread(1, 40, 64), spread(32, 64, seed=1), spread(1, 40, 32, seed=2)
    x.requires_grad_()
    w.requires_grad_()
    y = mx_linear(x, w, None, PrecisionScheme.forward_only("mxfp4"))
    y.backward(g)
    assert not torch.allclose(y, x @ w.T)
    torch.testing.assert_close(x.grad, g @ w, rtol=1e-12, atol=0)
    torch.testing.assert_close(w.grad, g[0].T @ x[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_bias_gradient_is_the_sum_over_tokens(name):
    layer = MXLinear(32, 16, scheme=SCHEMES[name])
    g = spread(5, 9, 16, seed=4, dtype=torch.float32)
    layer(spread(5, 9, 32, dtype=torch.float32)).backward(g)
    torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)), rtol=2**-7, atol=2**-7)


def test_all_bias_free_frozen_and_leaf_combinations():
    for bias, train_weight, train_bias, train_input in itertools.product([True, False], repeat=4):
        layer = MXLinear(16, 8, bias=bias, scheme=SCHEMES["e4m3"])
        layer.weight.requires_grad_(train_weight)
        if bias:
            layer.bias.requires_grad_(train_bias)
        x = torch.randn(4, 16, requires_grad=train_input)
        y = layer(x)
        assert y.requires_grad == (train_weight or train_input or (bias and train_bias))
        if y.requires_grad:
            y.sum().backward()
        assert (x.grad is not None) == train_input
        assert (layer.weight.grad is not None) == train_weight
        assert not bias or (layer.bias.grad is not None) == train_bias


@pytest.mark.parametrize("shape", [(20,), (1, 20), (0, 20), (2, 0, 20), (3, 5, 20), (2, 3, 2, 5, 20)])
@pytest.mark.parametrize("name", ["e4m3", "sequence", "hadamard", "nvfp4"])
def test_any_number_of_axes(shape, name):
    layer = MXLinear(20, 6, scheme=SCHEMES[name])
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 6)
    assert x.grad.shape == x.shape
    assert layer.weight.grad.isfinite().all()
    rows = x.detach().reshape(-1, 20)
    torch.testing.assert_close(y.detach().reshape(-1, 6), layer(rows).detach(), rtol=0, atol=0)


def test_no_input_features_leave_the_bias():
    with pytest.warns(UserWarning, match=r"zero-element"):
        layer = MXLinear(0, 4, scheme=SCHEMES["e4m3"])
    y = layer(torch.zeros(3, 0))
    y.sum().backward()
    assert torch.equal(y, fake_quantize(layer.bias, "bfloat16").expand(3, 4))


def test_shapes_are_known_on_meta():
    with torch.device("meta"):
        assert MXLinear(8, 4, scheme=SCHEMES["e4m3"])(torch.zeros(2, 8)).shape == (2, 4)


def test_a_view_that_is_not_contiguous_is_the_same():
    x = spread(64, 40, dtype=torch.float32)
    w = spread(32, 40, seed=1, dtype=torch.float32)
    expected = mx_linear(x, w, None, SCHEMES["e2m1"])
    assert torch.equal(mx_linear(x.T.contiguous().T, w.T.contiguous().T, None, SCHEMES["e2m1"]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parameters_keep_their_dtype(dtype):
    scheme = MX("mxfp8_e4m3", vector=None)
    layer = MXLinear(64, 32, scheme=scheme).to(dtype)
    x = torch.randn(8, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert {y.dtype, x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype} == {dtype}
    wide = mx_linear(x.double(), layer.weight.double(), layer.bias.double(), scheme)
    torch.testing.assert_close(
        y.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 if dtype.itemsize == 2 else 1e-5
    )


def test_autocast_casts_the_output_only():
    layer, x = MXLinear(64, 32, scheme=MX("mxfp4", vector=None)), torch.randn(8, 64)
    for given in (x, x.bfloat16().float()):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(given)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, layer(given).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16  # the input came in another dtype than the weight
        layer(x).float().sum().backward()  # and the backward pass is inside of autocast
        assert layer.double()(x.double()).dtype == torch.float64
    gradient, layer.weight.grad = layer.float().weight.grad, None
    layer(x).sum().backward()
    assert torch.equal(gradient, layer.weight.grad)


def test_stochastic_gradients_are_unbiased_and_reproducible():
    scheme = MX(
        "mxfp4", gradient_rounding="stochastic", scale_rule="rceil", vector=None, w_fwd=None, a_fwd=None
    ).replace(w_bwd=None, a_bwd=None, g_dw="mxfp4", g_dx="mxfp4")
    x, w, g = spread(40, 32, seed=5), spread(32, 32, seed=6), torch.randn(40, 32, dtype=torch.float64)

    def gradients(seed):
        torch.manual_seed(seed)
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        mx_linear(*leaves, None, scheme).backward(g)
        return torch.cat([leaf.grad.flatten() for leaf in leaves])

    draws = torch.stack([gradients(seed) for seed in range(300)])
    assert torch.equal(draws[0], gradients(0))
    exact = torch.cat([(g @ w).flatten(), (g.T @ x).flatten()])
    error = (draws.mean(0) - exact) / (draws.std(0) / 300**0.5).clamp(min=1e-12)
    assert error.square().mean() == pytest.approx(1.0, abs=0.15)
    assert not torch.equal(draws[0], draws[1])


def test_tiles_make_forward_and_backward_see_one_weight():
    w = spread(64, 64, dtype=torch.float32)
    eye = torch.eye(64)
    for scheme, agree in ((SCHEMES["tile"], True), (MX("mxfp4"), False)):
        x = torch.zeros(64, 64, requires_grad=True)
        mx_linear(x, w, None, scheme).backward(eye)
        assert torch.equal(mx_linear(eye, w, None, scheme).T, x.grad) == agree


def test_activation_checkpointing_changes_nothing():
    layer, x = MXLinear(32, 16, scheme=SCHEMES["e4m3"]), torch.randn(4, 32)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), expected, strict=True))


def test_the_scheme_in_force_at_the_forward_pass_rules_the_backward_pass():
    layer, x = MXLinear(32, 16, scheme=MX("mxfp4")), torch.randn(4, 32)
    layer(x).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    y = layer(x)
    layer.precision_scheme = None
    y.sum().backward()
    assert torch.equal(layer.weight.grad, expected)


def test_operands_lose_nothing():
    q, wide = Quantizer("mxfp4"), Quantizer("nvfp4")
    half = torch.tensor([[6e4, 1e-7, 3e-6]], dtype=torch.float16)
    for x in (half, half.bfloat16(), half.float()):
        for quantizer in (q, wide, None):
            a, _ = operands(x, quantizer, x, quantizer)
            assert a.dtype == torch.float32
            assert torch.equal(a, x.float() if quantizer is None else fake_quantize(x.float(), quantizer))
    assert operands(half.double(), q, half.float(), q)[1].dtype == torch.float64


def test_rounding_what_is_rounded_costs_nothing():
    x = torch.randn(3).bfloat16()
    assert round_to(x, Quantizer("bfloat16")) is x
    assert round_to(x, None) is x
    assert not keeps(x.float(), Quantizer("bfloat16"))
    assert torch.equal(round_to(x.float() * 1.001, Quantizer("bfloat16")), (x.float() * 1.001).bfloat16().float())


def test_gradients_can_be_differentiated_straight_through():
    w = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mx_linear(x, w, None, EXACT).pow(3).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), w)
    (plain,) = torch.autograd.grad(F.linear(x, w).pow(3).sum(), w, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(plain.sum(), w)[0])


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(3, 4), r"input: got shape \(2, 5\), expected \(..., 4\)"),
        (torch.zeros(()), torch.zeros(3, 4), r"input: got shape \(\)"),
        (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 4), r"input: got torch.int64"),
        ([1.0], torch.zeros(3, 4), r"input: got list"),
        (
            torch.zeros(2, 4).double(),
            torch.zeros(3, 4),
            r"input: got torch.float64, expected the weight's torch.float32",
        ),
        (torch.zeros(2, 4).half(), torch.zeros(3, 4).half(), r"weight: got float16 with vector='bfloat16'"),
        (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int8), r"weight: got torch.int8|input: got torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(x, weight, message):
    with pytest.raises(ConfigError, match=message):
        mx_linear(x, weight, None, PrecisionScheme())


class TestMXLinearKit(ModuleKit):
    scheme = SCHEMES["e4m3"]

    def make(self):
        torch.manual_seed(0)
        return nn.Sequential(MXLinear(40, 24, scheme=self.scheme), nn.Tanh(), MXLinear(24, 8, scheme=self.scheme))

    def inputs(self):
        return {"input": spread(6, 40, dtype=torch.float32)}

    def test_gradient_is_the_slope(self):
        self.scheme = EXACT
        super().test_gradient_is_the_slope()

    def test_compiled_equals_eager(self):
        module, other = self.make()[0], self.make()[0]
        whole = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)  # before, the layer stays out of the graph
        self.loss(torch.compile(module, backend="aot_eager", fullgraph=whole)).backward()
        self.loss(other).backward()
        for found, expected in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)

    def test_a_copy_keeps_its_scheme(self):
        assert copy.deepcopy(self.make())[0].precision_scheme == self.scheme
