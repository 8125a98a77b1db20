import math

import pytest
import torch
import torch.nn.functional as F
from effml_quant.casting import fake_quantize
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.operations import ACTIVATIONS, PrecisionMode, attend, rounded, watches
from effml_quant.precision.scheme import PrecisionScheme
from torch import nn
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

BF16 = PrecisionScheme(softmax="bfloat16", residual="bfloat16")
NONE = PrecisionScheme(w_fwd=None, a_fwd=None, vector=None)
MX4 = NONE.replace(attention="mxfp4")


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bf16(x):
    return x.bfloat16().to(x.dtype)


@pytest.mark.parametrize("function", sorted(ACTIVATIONS, key=str), ids=lambda f: f.__name__)
def test_activations_and_their_gradients_are_rounded(function):
    x, g = numbers(3, 8), numbers(3, 4 if function is F.glu else 8, seed=1)
    leaf, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    with PrecisionMode(BF16):
        y = function(leaf)
    y.backward(g)
    plain = function(own)
    plain.backward(bf16(g))
    assert torch.equal(y, bf16(plain))
    assert torch.equal(leaf.grad, bf16(own.grad))
    assert not torch.equal(y, plain) or function in (F.relu6, F.hardtanh)


def test_forward_only_leaves_the_gradients():
    x, g = numbers(3, 8).requires_grad_(), numbers(3, 8, seed=1)
    with PrecisionMode(PrecisionScheme.forward_only()):
        y = F.gelu(x)
    (found,) = torch.autograd.grad(y, x, g)
    assert torch.equal(found, torch.autograd.grad(F.gelu(x), x, g)[0])
    assert torch.equal(y, bf16(F.gelu(x)))


def test_an_activation_in_place_stays_so():
    x = numbers(3, 8).requires_grad_()
    with PrecisionMode(BF16):
        y = nn.ReLU(inplace=True)(x * 1.0)
    y.sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


@pytest.mark.parametrize("softmax", [F.softmax, torch.softmax, torch.Tensor.softmax])
def test_every_softmax_is_rounded(softmax):
    x = numbers(3, 8)
    with PrecisionMode(BF16):
        assert torch.equal(softmax(x, -1), bf16(x.softmax(-1)))
        assert torch.equal(F.log_softmax(x, -1), x.log_softmax(-1))


def test_a_residual_is_a_sum_of_two_activations():
    x, y, wide = numbers(3, 8), numbers(3, 8, seed=1), numbers(1, 2, 3, 8)
    weight = nn.Parameter(numbers(3, 8))
    with PrecisionMode(BF16):
        for out in (x + y, torch.add(x, y), x.add(y)):
            assert torch.equal(out, bf16(x.clone() + y.clone()))
        z = x.clone()
        z += y
        others = [(x + 1, x, 1), (x + y[0], x, y[0]), (wide + wide, wide, wide), (x + weight, x, weight)]
    assert torch.equal(z, bf16(x + y))
    assert all(torch.equal(out, a + b) for out, a, b in others)
    assert torch.equal(torch.ones(2, 2, dtype=torch.int64) + 1, torch.full((2, 2), 2))


def test_gradients_pass_rounded_through_rounded():
    x = numbers(3, 8).requires_grad_()
    scheme = PrecisionScheme(activation="mxfp4")
    y = rounded(x, scheme, "activation")
    y.backward(numbers(3, 8, seed=1))
    assert torch.equal(y, fake_quantize(x, "mxfp4"))
    assert torch.equal(x.grad, bf16(numbers(3, 8, seed=1)))
    assert rounded(x, NONE, "activation") is x
    whole = torch.arange(3)
    assert rounded(whole, scheme, "activation") is whole


@pytest.mark.parametrize("case", ["plain", "causal", "bool", "bias", "gqa", "blind", "scale", "lengths"])
def test_attention_in_its_plain_form_is_pytorchs(case):
    q, k, v = (numbers(2, 4, 5, 8, seed=i, dtype=torch.float64) for i in range(3))
    options = {}
    if case == "causal":
        options["is_causal"] = True
    elif case in ("bool", "blind"):
        options["attn_mask"] = numbers(2, 1, 5, 5) > 0
        options["attn_mask"][..., 0] = True
        if case == "blind":
            options["attn_mask"][:, :, 2] = False
    elif case == "bias":
        options["attn_mask"] = numbers(5, 5, dtype=torch.float64)
    elif case == "gqa":
        k, v, options["enable_gqa"] = k[:, :2], v[:, :2], True
    elif case == "scale":
        options["scale"] = 0.3
    elif case == "lengths":
        q = q[:, :, :2]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*leaves, **options)
    found = attend(*leaves, **options, scheme=NONE)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    g = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, g), torch.autograd.grad(expected, leaves, g), rtol=1e-9, atol=1e-11
    )


def test_both_products_of_attention_are_quantised_along_their_sums():
    q, k, v, g = (numbers(2, 3, 40, 48, seed=i, dtype=torch.float64) for i in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with PrecisionMode(MX4):
        y = F.scaled_dot_product_attention(*leaves)
    y.backward(g)

    def fq(x, axis=-1):
        return fake_quantize(x, "mxfp4", axis=axis)

    p = (fq(q) @ fq(k).mT / math.sqrt(48)).softmax(-1)
    torch.testing.assert_close(y.detach(), fq(p) @ fq(v, -2), rtol=1e-9, atol=1e-12)
    dp = fq(g) @ fq(v).mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(48)
    for leaf, value in zip(
        leaves, (fq(ds) @ fq(k, -2), fq(ds, -2).mT @ fq(q, -2), fq(p, -2).mT @ fq(g, -2)), strict=True
    ):
        torch.testing.assert_close(leaf.grad, value, rtol=1e-9, atol=1e-12)


def test_matmul_of_heads_is_a_product_of_attention_and_of_others_is_not():
    a, b = numbers(2, 3, 5, 40), numbers(1, 3, 40, 6, seed=1).requires_grad_()
    with PrecisionMode(MX4):
        found, positions = a @ b, a[0] @ b[0]
    assert torch.equal(found, fake_quantize(a, "mxfp4") @ fake_quantize(b, "mxfp4", axis=-2))
    assert torch.equal(positions, a[0] @ b[0])
    found.sum().backward()
    assert b.grad.shape == b.shape


def test_probabilities_alone_are_rounded_in_attention():
    q, k, v = (numbers(1, 2, 4, 8, seed=i) for i in range(3))
    with PrecisionMode(NONE.replace(softmax="bfloat16")):
        y = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(y, bf16((q @ k.mT * 8**-0.5).softmax(-1)) @ v)
    with PrecisionMode(NONE.replace(attention="mxfp8_e4m3")), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16


def test_only_schemes_that_round_functions_watch():
    assert watches(PrecisionScheme())
    assert not watches(None)
    assert not watches(PrecisionScheme(vector=None))
    assert not watches(PrecisionScheme(activation=None))
    assert watches(PrecisionScheme(activation=None, residual="bfloat16"))


class Block(nn.Module):
    """A block with functions of its own."""

    def __init__(self, fail=False):
        super().__init__()
        self.up, self.down, self.fail = nn.Linear(16, 32), nn.Linear(32, 16), fail

    def forward(self, x, *, scale=1.0):
        """Has a signature."""
        h = F.gelu(self.up(x))
        if self.fail:
            raise ValueError("no")
        return x + scale * self.down(h)


def test_the_mode_ends_with_the_forward_pass_whatever_happens():
    x = numbers(4, 16)
    for fail in (False, True):
        model = nn.Sequential(Block(), Block(fail))
        apply_scheme(model, BF16)
        if fail:
            with pytest.raises(ValueError, match=r"no"):
                model(x)
        else:
            model(x)
        assert _len_torch_function_stack() == 0
        assert torch.equal(F.gelu(x), nn.GELU()(x))
        assert not torch.equal(F.gelu(x), bf16(F.gelu(x)))


def test_a_checkpointed_module_is_recomputed_as_it_was():
    torch.manual_seed(0)
    block, x = Block(), numbers(4, 16)
    model = nn.Sequential(block)
    apply_scheme(model, BF16)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_watched_module_looks_as_before():
    import inspect

    model = nn.Sequential(Block())
    handle = apply_scheme(model, BF16)
    assert list(inspect.signature(model[0].forward).parameters) == ["x", "scale"]
    assert (type(model[0]).__name__, str(type(model[0]))) == ("Block", str(Block))
    assert isinstance(model[0], Block)
    handle.restore()
    assert type(model[0]) is Block
