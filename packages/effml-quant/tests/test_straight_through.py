import copy

import pytest
import torch
from effml_quant import Quantizer, fake_quantize
from effml_quant.qat import PTQ, RAT, STE, attach
from torch import nn


def layer():
    model = nn.Linear(5, 1, bias=False).double()
    model.weight.data = torch.tensor([[0.70, -0.33, 0.05, -0.21, 0.44]], dtype=torch.float64)
    return model


def test_gradients_of_a_quadratic_are_taken_at_what_the_forward_pass_saw():
    h, target = torch.arange(1.0, 6.0).double(), torch.tensor([0.5, -0.3, 0.1, -0.2, 0.4], dtype=torch.float64)

    def gradient(method):
        model = layer()
        attach(model, method)
        w = model(torch.eye(5).double())[:, 0]
        (0.5 * (h * (w - target) ** 2).sum()).backward()
        return w.detach(), model.weight.grad[0]

    for method in (PTQ("int4"), STE("int4")):
        w, g = gradient(method)
        torch.testing.assert_close(g, h * (w - target))
    assert w.tolist() == pytest.approx([0.7, -0.3, 0.1, -0.2, 0.4])
    draws = torch.stack([gradient(RAT("int4"))[1] for _ in range(1000)])
    expected = torch.tensor([0.20, -0.06, -0.15, -0.04, 0.20], dtype=torch.float64)  # h (w - w*): nothing of a penalty
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 4 * error + 1e-12).all()


def test_a_draw_is_the_same_in_forward_and_backward_and_fresh_at_the_next_call():
    model = layer()
    attach(model, RAT("int4"))
    x = torch.eye(5).double()
    first = model(x)[:, 0]
    first.square().sum().backward()
    torch.testing.assert_close(model.weight.grad[0], 2 * first.detach())
    assert any(not torch.equal(model(x)[:, 0], first) for _ in range(10))


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global generator"])
def test_draws_are_seeded_and_resumable(own):
    model = nn.Linear(64, 64, bias=False)
    generator = torch.Generator() if own else torch.default_generator
    generator.manual_seed(5)
    attach(model, RAT("int4", generator if own else None))
    x = torch.eye(64)
    one = model(x)
    state = generator.get_state()
    two = model(x)
    generator.set_state(state)
    assert torch.equal(model(x), two)
    generator.manual_seed(5)
    assert torch.equal(model(x), one)
    assert not torch.equal(one, two)
    copy.deepcopy(model)(x)


def test_randomised_rounding_is_for_training_only():
    model = layer()
    attach(model, RAT("int4")).modules[""].eval()
    q = fake_quantize(model.weight, "int4")
    assert all(torch.equal(model(torch.eye(5).double())[:, 0], q[0]) for _ in range(5))


def test_activation_checkpointing_replays_the_draw():
    from torch.utils.checkpoint import checkpoint

    model = nn.Linear(64, 8, bias=False)
    attach(model, RAT("int4"))
    x = torch.randn(4, 64)
    torch.manual_seed(0)
    model(x).square().sum().backward()
    expected = model.weight.grad
    model.weight.grad = None
    torch.manual_seed(0)
    x.requires_grad_()
    checkpoint(lambda x: model(x).square().sum(), x, use_reentrant=False).backward()
    assert torch.equal(model.weight.grad, expected)


def test_methods_are_values():
    assert STE("int4") == STE(Quantizer("int4")) != STE("int3")
    assert RAT("int4") != RAT("int4", torch.Generator())
