import copy
import itertools

import pytest
import torch
from effml_quant import Quantizer, fake_quantize
from effml_quant.qat import gptq
from effml_quant.qat.gptq import gptq_layer
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.transformer import Transformer, TransformerConfig
from torch import nn

CHANNEL = Quantizer("int4", granularity="channel")


def problem(out=6, features=10, rows=40, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=g, dtype=dtype)
    x = torch.randn(rows, features, generator=g, dtype=dtype) @ mix
    return torch.randn(out, features, generator=g, dtype=dtype), x


def error(w, q, x):
    return ((w - q) @ x.T).square().sum(1)


def sequential(w, hessian, step, top, damping=0.01):
    """Optimal brain quantisation in the order of columns, each inverse taken afresh: eliminate column after column."""
    w, n = w.clone(), w.shape[1]
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(n, dtype=w.dtype)
    q = torch.zeros_like(w)
    for j in range(n):
        inverse = torch.linalg.inv(h[j:, j:])
        q[:, j] = step * (w[:, j] / step).clamp(-top, top).round()
        w[:, j:] -= torch.outer((w[:, j] - q[:, j]) / inverse[0, 0], inverse[0])
    return q


@pytest.mark.parametrize("columns", [1, 3, 128])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_is_the_sequential_elimination(columns, granularity):
    w, x = problem()
    step = (w.abs().amax(1) if granularity == "channel" else w.abs().max().expand(6)) / 7
    ours = gptq_layer(w, 2 * x.T @ x, Quantizer("int4", granularity=granularity), columns=columns)
    torch.testing.assert_close(ours, sequential(w, 2 * x.T @ x, step, 7))


def test_two_columns_are_solved_exactly():
    """The second column may choose the best code given the first: brute force over it finds nothing better."""
    for seed in range(20):
        w, x = problem(out=4, features=2, rows=8, seed=seed)
        q = gptq_layer(w, x.T @ x, CHANNEL, damping=0.0)
        step = w.abs().amax(1) / 7
        torch.testing.assert_close(q[:, 0], fake_quantize(w, CHANNEL)[:, 0])
        best = torch.stack([error(w, torch.stack([q[:, 0], step * c], 1), x) for c in range(-7, 8)]).amin(0)
        torch.testing.assert_close(error(w, q, x), best)


def test_lies_between_rounding_and_brute_force():
    grid = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=4)), dtype=torch.float64)
    ternary = Quantizer("int2", granularity="channel")
    gained = 0.0
    for seed in range(20):
        w, x = problem(out=1, features=4, rows=12, seed=seed)
        ours, plain = (error(w, q, x) for q in (gptq_layer(w, x.T @ x, ternary), fake_quantize(w, ternary)))
        least = error(w, grid * w.abs().max(), x).min()
        assert least <= ours + 1e-12
        gained += (plain.log() - ours.log()).item()
    assert gained > 0


@pytest.mark.parametrize(
    "quantizer",
    [CHANNEL, Quantizer("int3", granularity=("group", 16)), Quantizer("mxfp4"), Quantizer("nvfp4"), Quantizer("fp4")],
    ids=str,
)
def test_with_uncorrelated_inputs_it_is_plain_rounding(quantizer):
    w, _ = problem(out=5, features=48, dtype=torch.float32)
    assert torch.equal(gptq_layer(w, torch.eye(48), quantizer), fake_quantize(w, quantizer))
    assert torch.equal(gptq_layer(w, torch.zeros(48, 48), quantizer), fake_quantize(w, quantizer))


def test_loses_less_than_rounding_on_correlated_inputs():
    w, x = problem(out=32, features=64, rows=256, dtype=torch.float32)
    for quantizer in (CHANNEL, Quantizer("int4"), Quantizer("mxfp4"), Quantizer("nvfp4")):
        ours, plain = (error(w, q, x).sum() for q in (gptq_layer(w, x.T @ x, quantizer), fake_quantize(w, quantizer)))
        assert ours < 0.7 * plain


def test_every_layer_is_calibrated_behind_the_cast_of_the_earlier_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).double().train()
    batches = [torch.randn(10, 6).double(), torch.randn(3, 6).double()]
    state = copy.deepcopy(model.state_dict())
    weights = gptq(model, CHANNEL, iter(batches))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    x = torch.cat(batches)
    first = gptq_layer(model[0].weight, x.T @ x, CHANNEL)
    hidden = nn.functional.gelu(x @ first.T + model[0].bias)
    second = gptq_layer(model[2].weight, hidden.T @ hidden, CHANNEL)
    torch.testing.assert_close(weights, {"0.weight": first, "2.weight": second})


def test_a_transformer_in_the_order_of_its_layers():
    model = Transformer(TransformerConfig(n_layers=2, d_model=16, n_heads=2, d_ff=24))
    ids = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    weights = gptq(model, CHANNEL, [ids[:2], {"input_ids": ids[2:]}, [ids[:1]]])
    assert len(weights) == 2 * 7
    assert torch.equal(model(ids).logits, before)
    for name, weight in weights.items():
        original = model.get_parameter(name)
        codes = weight / (original.abs().amax(1, keepdim=True) / 7)
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert not torch.equal(weight, fake_quantize(original, CHANNEL))


class Odd(nn.Module):
    """A layer that runs twice, one that runs on some batches only, one that never runs."""

    def __init__(self):
        super().__init__()
        self.twice, self.rare, self.idle = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.twice(input=self.twice(x))
        return self.rare(x) if len(x) > 2 else x


def test_layers_that_run_twice_or_seldom():
    torch.manual_seed(0)
    model, batches = Odd(), [torch.randn(2, 4), torch.randn(5, 4)]
    weights = gptq(model, CHANNEL, batches, filter=lambda name, m: name in ("twice", "rare"))
    seen = [y for x in batches for y in (x, model.twice(x))]
    x = torch.cat(seen).detach()
    torch.testing.assert_close(weights["twice.weight"], gptq_layer(model.twice.weight, x.T @ x, CHANNEL))
    with pytest.raises(ConfigError, match=r"idle: got a layer that no calibration batch reaches"):
        gptq(model, CHANNEL, batches)


def test_errors_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=r"hessian: got NaN"):
        gptq(model, CHANNEL, [torch.full((2, 4), float("nan"))])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_pre_hooks
    with pytest.raises(ConfigError, match=r"0: got Conv1d, expected nn.Linear"):
        gptq(nn.Sequential(nn.Conv1d(1, 1, 1)), CHANNEL, [])
    with pytest.raises(ConfigError, match=r"damping: got 0.0, expected more"):
        gptq_layer(torch.randn(2, 3), torch.ones(3, 3), CHANNEL, damping=0.0)
    with pytest.raises(ConfigError, match=r"weight, hessian: got \(2, 3\) and \(2, 2\)"):
        gptq_layer(torch.randn(2, 3), torch.eye(2), CHANNEL)
    assert gptq_layer(torch.empty(0, 3), torch.eye(3), CHANNEL).shape == (0, 3)
