import pytest
import torch
from effml_quant.qat import PACT
from effml_shared.errors import ConfigError


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_and_gradients_are_the_papers(bits):
    g = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(200, generator=g, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(200, generator=g, dtype=torch.float64)
    module = PACT(bits, alpha=2.5).double()
    y = module(x)
    y.backward(upstream)
    levels = 2**bits - 1
    expected = (x.detach().clamp(0, 2.5) * levels / 2.5).round() * 2.5 / levels
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(x.grad, upstream * ((x >= 0) & (x < 2.5)))
    torch.testing.assert_close(module.alpha.grad, upstream[x >= 2.5].sum())
    assert len(y.unique()) <= levels + 1


def test_the_grid_does_not_depend_on_whether_the_bound_is_reached():
    module = PACT(2, alpha=3.0)
    assert module(torch.tensor([0.6])).tolist() == [1.0]
    assert module(torch.tensor(1.4)).item() == 1.0
    assert module(torch.zeros(2, 0)).shape == (2, 0)


def test_the_penalty_shrinks_the_bound():
    module = PACT(4, alpha=5.0, decay=0.1)
    module.penalty().backward()
    assert module.penalty().item() == pytest.approx(2.5)
    assert module.alpha.grad.item() == pytest.approx(1.0)


def test_corners():
    module = PACT(4, alpha=3.0)
    assert bool(module(torch.tensor([float("nan"), 1.0])).isnan().any())
    x = torch.tensor([0.0, 3.0], requires_grad=True)
    module(x).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]
    assert module(torch.randn(2, 3).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(module(torch.randn(4, 6).T[::2]), module(torch.zeros(3, 4))) is False
    for bad, field in (
        ({"bits": 1}, "bits"),
        ({"bits": 2.5}, "bits"),
        ({"alpha": 0.0}, "alpha"),
        ({"decay": -1.0}, "decay"),
    ):
        with pytest.raises(ConfigError, match=f"^{field}: got"):
            PACT(**bad)
