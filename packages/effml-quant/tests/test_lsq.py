import pytest
import torch
from effml_quant import Quantizer
from effml_quant.qat import LSQ, attach
from effml_quant.qat.lsq import lsq_quantize
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def reference(w, s, low, high, upstream):
    """Equations 1 to 3 of the paper and its gradient scale, element by element."""
    value, dw, ds = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(s)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            v = (w[i, j] / s[i]).item()
            code = round(min(max(v, -low), high))  # Python rounds ties to even
            value[i, j] = s[i] * code
            inside = -low < v < high
            dw[i, j] = upstream[i, j] * inside
            ds[i] += upstream[i, j] * (code - v if inside else code)
    return value, dw, ds / (w.shape[1] * high) ** 0.5


@pytest.mark.parametrize(("recipe", "low", "high"), [(None, 7, 7), ("torchao", 8, 7)])
def test_values_and_gradients_are_the_papers(recipe, low, high):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 40, generator=g, dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.3, 0.1, 0.02], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 40, generator=g, dtype=torch.float64)
    q = lsq_quantize(w, s, Quantizer("int4", recipe=recipe))
    q.backward(upstream)
    value, dw, ds = reference(w.detach(), s.detach(), low, high, upstream)
    torch.testing.assert_close(q, value, rtol=1e-14, atol=0)
    torch.testing.assert_close(w.grad, dw, rtol=1e-14, atol=0)
    torch.testing.assert_close(s.grad, ds, rtol=1e-12, atol=0)
    assert (q / s[:, None]).min() < -6.5  # both ends were met
    assert (q / s[:, None]).max() > 6.5


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(1e-3, 10), st.floats(-20, 20))
def test_one_weight(bits, step, x):
    w = torch.tensor([[x]], dtype=torch.float64)
    q = lsq_quantize(w, torch.tensor([step], dtype=torch.float64), Quantizer(f"int{bits}"))
    high = 2 ** (bits - 1) - 1
    assert q.item() == pytest.approx(step * max(-high, min(high, round(x / step))), rel=1e-12)


@pytest.mark.parametrize(("granularity", "shape"), [("tensor", (1,)), ("channel", (6,))])
def test_initial_steps(granularity, shape):
    model = nn.Conv1d(4, 6, 3)
    attached = attach(model, LSQ(Quantizer("int4", granularity=granularity)))
    (step,) = attached.learned_parameters()
    rows = model.weight.reshape(step.shape[0], -1)
    assert step.shape == shape
    torch.testing.assert_close(step.detach(), 2 * rows.abs().mean(1).detach() / 7**0.5)
    assert dict(model.named_parameters())["weight_step"] is step
    assert model(torch.randn(2, 4, 8)).shape == (2, 6, 6)


def test_casting_twice_changes_nothing_and_the_step_is_trained():
    torch.manual_seed(0)
    model = nn.Linear(32, 8, bias=False)
    attached = attach(model, LSQ("int3"))
    deployed = attached.deployed()["weight"]
    x = torch.randn(64, 32)
    before = model(x)
    before.square().mean().backward()
    assert model.weight_step.grad.abs() > 1e-3
    with torch.no_grad():
        model.weight.copy_(deployed)
    assert torch.equal(model(x), before)


def test_corners():
    zero = nn.Linear(3, 2)
    nn.init.zeros_(zero.weight)
    attach(zero, LSQ(Quantizer("int4", granularity="channel")))
    assert zero.weight_step.tolist() == [1.0, 1.0]
    zero(torch.ones(1, 3)).sum().backward()
    assert bool(zero.weight.grad.isfinite().all())
    assert bool(zero.weight_step.grad.isfinite().all())
    w = torch.tensor([[0.3, -0.1]])
    assert torch.equal(
        lsq_quantize(w, torch.tensor([-0.1]), Quantizer("int4")),
        lsq_quantize(w, torch.tensor([0.1]), Quantizer("int4")),
    )
    half = nn.Linear(3, 2).bfloat16()
    attach(half, LSQ("int8"))
    assert half.weight_step.dtype == torch.float32
    assert half(torch.ones(1, 3).bfloat16()).dtype == torch.bfloat16
    for bad in (Quantizer("int4", granularity=("group", 4)), Quantizer("mxfp4")):
        with pytest.raises(ConfigError, match=r"granularity: got"):
            LSQ(bad)
    with pytest.raises(ConfigError, match=r"quantizer: got 'asymmetric'"):
        LSQ(Quantizer("int4", recipe="asymmetric"))
