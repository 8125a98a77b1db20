import pytest
import torch
from effml_quant.casting import fake_quantize
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.norms import MXNorm, has_gain, is_norm
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared import layers
from torch import nn

EXACT = PrecisionScheme(w_fwd=None, a_fwd=None, vector=None)
GAINS = EXACT.replace(norm_affine="mxfp8_e4m3")


class OddRMSNorm(nn.Module):
    """Somebody's norm, known by its name."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(dim)), 1e-6

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


NORMS = {
    "layer": lambda: nn.LayerNorm(64),
    "rms": lambda: nn.RMSNorm(64),
    "shared layer": lambda: layers.LayerNorm(64, 1e-5),
    "shared rms": lambda: layers.RMSNorm(64, 1e-5),
    "by name": lambda: OddRMSNorm(64),
}


def covered(make, scheme, dtype=torch.float64):
    """Return a norm under a scheme (beside a linear layer, which there must be), and its handle."""
    norm = make().to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.9, 1.1, generator=torch.Generator().manual_seed(0))
    handle = apply_scheme(nn.ModuleList([norm, nn.Linear(64, 1).to(dtype)]), scheme)
    return norm, handle


def normalised(norm, x):
    gain = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight.fill_(1.0)
        out = norm(x)
        norm.weight.copy_(gain)
    return out


@pytest.mark.parametrize("name", NORMS)
def test_the_gain_is_encoded_and_its_gradient_passes_straight_through(name):
    norm, handle = covered(NORMS[name], None)
    x = torch.randn(5, 64, dtype=torch.float64)
    g = torch.randn(5, 64, dtype=torch.float64)
    xhat = normalised(norm, x)
    handle.set(GAINS)
    leaf = x.clone().requires_grad_()
    y = norm(leaf)
    y.backward(g)
    gain = fake_quantize(norm.weight.detach(), "mxfp8_e4m3")
    assert gain.unique().numel() < 10
    torch.testing.assert_close(y.detach(), xhat * gain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.weight.grad, (g * xhat).sum(0), rtol=1e-12, atol=1e-12)
    handle.set(None)
    other = x.clone().requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(gain)
    norm(other).backward(g)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_the_bias_of_a_norm_trains():
    for scheme in (EXACT.replace(norm_affine="mxfp8_e4m3"), PrecisionScheme(norm_affine="bfloat16")):
        norm, _ = covered(NORMS["layer"], scheme)
        g = torch.randn(5, 64, dtype=torch.float64)
        norm(torch.randn(5, 64, dtype=torch.float64)).backward(g)
        torch.testing.assert_close(norm.bias.grad, g.sum(0), rtol=2**-7, atol=2**-7)


def test_vector_rounding_is_of_input_output_and_gradients():
    norm, handle = covered(NORMS["layer"], PrecisionScheme(norm_affine="bfloat16"), torch.float32)
    x, g = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    y = norm(x)
    y.backward(g)
    handle.restore()
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(p.bfloat16())
    leaf = x.detach().bfloat16().float().requires_grad_()
    expected = norm(leaf)
    expected.backward(g.bfloat16().float())
    assert torch.equal(y, expected.bfloat16().float())
    assert torch.equal(x.grad, leaf.grad.bfloat16().float())


def gain_after(values, **fields):
    """What a norm multiplies with, given its gain."""
    norm, _ = covered(lambda: nn.RMSNorm(len(values)), GAINS.replace(**fields), torch.float32)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(values))
    eye = torch.eye(len(values))
    out = norm(eye * 1e6).diagonal()  # a row of RMS 1e6 / sqrt(n)
    return out / len(values) ** 0.5


@pytest.mark.parametrize(
    ("values", "rule", "expected"),
    [
        (torch.linspace(0.90, 0.99, 64).tolist(), "floor", {0.875}),
        ((torch.linspace(0.90, 0.99, 64) * 1.9).tolist(), "floor", {1.75}),
        (torch.linspace(1.0, 1.05, 64).tolist(), "floor", {1.0}),
        (torch.linspace(0.90, 0.99, 64).tolist(), "rceil", {0.875, 0.9375, 1.0}),
        (torch.linspace(0.90, 0.99, 64).tolist(), "bump", {0.875, 0.9375, 1.0}),
        ([*[0.8974, 0.8963, 0.8836, 0.8847, 0.9037] * 12, 0.9, 0.95, 0.99, 0.88], "floor", {0.875}),
        ([0.95] * 32 + [1.0] * 32, "bump", {0.9375, 1.0}),
        ([0.95] + [1.0] * 63, "floor", {0.9375, 1.0}),
    ],
)
def test_clustered_gains_fall_into_one_code(values, rule, expected):
    found = gain_after(values, scale_rule=rule)
    codes = {min(expected, key=lambda code: abs(code - value)) for value in found.tolist()}
    assert codes == expected
    torch.testing.assert_close(
        found, torch.tensor([min(expected, key=lambda code: abs(code - v)) for v in found.tolist()]), rtol=1e-5, atol=0
    )


def test_moving_a_factor_from_the_gain_into_the_weight():
    """Powers of two change nothing unless something saturates; other factors do once the gain is encoded."""
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.uniform_(1.0, 1.05)

    def outputs(scheme, factor):
        handle = apply_scheme(model, scheme)
        before = model(x)
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[0].bias.mul_(factor)
            model[1].weight.div_(factor)
        after = model(x)
        with torch.no_grad():
            model[0].weight.div_(factor)
            model[0].bias.div_(factor)
            model[1].weight.mul_(factor)
        handle.restore()
        return before, after

    plain, moved = outputs(None, 0.97)
    torch.testing.assert_close(plain, moved)
    exempt = PrecisionScheme(vector=None)
    assert torch.equal(*outputs(exempt, 2.0))
    encoded = exempt.replace(norm_affine="mxfp8_e4m3")
    assert torch.equal(*outputs(encoded, 0.5))
    before, after = outputs(encoded, 0.97)
    assert (before - after).abs().max() > 0.05


def test_parameters_are_themselves_again_after_the_forward_pass():
    norm, handle = covered(NORMS["layer"], GAINS)
    weight, names = norm.weight, [name for name, _ in norm.named_parameters()]
    with pytest.raises(RuntimeError):
        norm(torch.randn(5, 63, dtype=torch.float64))
    norm(torch.randn(5, 64, dtype=torch.float64))
    assert norm.weight is weight
    assert [name for name, _ in norm.named_parameters()] == names
    assert isinstance(norm, MXNorm)
    handle.restore()
    assert type(norm) is nn.LayerNorm


def test_a_norm_without_gain_is_left_alone_and_named(caplog):
    model = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    expected = model[0](x)
    apply_scheme(model, PrecisionScheme(norm_affine="mxfp4"))
    assert "0 has no gain to encode" in caplog.text
    assert torch.equal(model[0](x), expected)
    assert not has_gain(model[0])


def test_what_counts_as_a_norm():
    assert all(is_norm(make()) for make in NORMS.values())
    assert not any(is_norm(m) for m in (nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Identity()))


def test_norms_are_untouched_without_a_format_for_them():
    norm, handle = covered(NORMS["layer"], PrecisionScheme())
    assert type(norm) is nn.LayerNorm
    handle.set(PrecisionScheme(norm_affine="bfloat16"))
    assert type(norm) is not nn.LayerNorm
    x = torch.randn(3, 64, dtype=torch.float64)
    handle.set(PrecisionScheme())
    found = norm(x)
    handle.restore()
    assert torch.equal(found, norm(x))
