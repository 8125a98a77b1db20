"""The revival loss against its dense definition, and where its gradient goes."""

import pytest
import torch
import torch.nn.functional as F
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.revival import revival_loss

DIM, CONCEPTS = 6, 20


def case(rows=12):
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, DIM, generator=g, dtype=torch.float64) for _ in range(2))
    weight, dictionary = (torch.randn(CONCEPTS, DIM, generator=g, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(CONCEPTS, generator=g, dtype=torch.float64)
    return x, residual, weight.requires_grad_(), bias.requires_grad_(), dictionary.requires_grad_()


def naive(x, residual, weight, bias, dictionary, dead):
    p = (x @ weight.T + bias).masked_fill(~dead, -torch.inf)
    count = min(DIM // 2, int(dead.sum()))
    values, indices = p.topk(count, dim=1)
    z = torch.zeros_like(p).scatter(1, indices, values.relu())
    missed = (residual - z @ dictionary).square().sum() / (residual - residual.mean(0)).square().sum()
    return min(1.0, int(dead.sum()) / (DIM // 2)) * missed


@pytest.mark.parametrize("n_dead", [1, 2, 3, 8, CONCEPTS])
def test_equals_the_dense_definition(n_dead):
    tensors = case()
    dead = torch.arange(CONCEPTS) % CONCEPTS < n_dead
    got, expected = revival_loss(*tensors, dead), naive(*tensors, dead)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, tensors[2:]) for loss in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert bool((a[~dead] == 0).all())
    assert float(gradients[0][0][dead].abs().sum()) > 0


def test_nothing_to_do():
    x, residual, *model = case()
    assert float(revival_loss(x, residual, *model, torch.zeros(CONCEPTS, dtype=torch.bool))) == 0
    everyone = torch.ones(CONCEPTS, dtype=torch.bool)
    assert float(revival_loss(x, torch.ones_like(residual), *model, everyone)) == 0
    assert float(revival_loss(x[:0], residual[:0], *model, everyone)) == 0


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_in_the_model_the_pre_bias_is_neither_decoded_nor_trained(offset):
    """Dead concepts that reproduce the residual make the loss 0, whatever the pre-bias is."""
    config = SAEConfig(d_in=4, n_concepts=8, kind="topk", k=1, pre_bias=True, aux_alpha=1.0, dead_after=1)
    sae = SparseAutoencoder(config).double()
    with torch.no_grad():  # concept 0 lives and gives nothing; 1 .. 4 are dead, and e_hat = relu(x - b) = e
        sae.pre_bias.fill_(offset)
        sae.atoms.copy_(torch.cat([torch.eye(4), torch.eye(4)]))
        sae.encoder_weight.copy_(sae.atoms)
        sae.encoder_bias.copy_(torch.tensor([9.0] + [0.0] * 7))
        sae.samples_since_fired.copy_(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    g = torch.Generator().manual_seed(1)
    x = torch.zeros(10, 4, dtype=torch.float64)
    x[torch.arange(10), torch.randint(4, (10,), generator=g)] = 1 + torch.rand(10, generator=g, dtype=torch.float64)
    x += offset
    residual = x - sae.pre_bias.detach()
    arguments = (sae.encoder_weight, sae.encoder_bias, sae.atoms, sae.dead)
    assert float(revival_loss(residual, residual, *arguments).detach()) < 1e-30
    output = sae(x)
    revival = output.loss - output.losses["reconstruction"]
    alone = SparseAutoencoder(config).double()
    alone.load_state_dict(sae.state_dict())
    alone.samples_since_fired.zero_()
    output.loss.backward()
    alone(x).loss.backward()
    assert float(output.losses["revival"]) == pytest.approx(float(revival.detach()))
    assert torch.equal(sae.pre_bias.grad, alone.pre_bias.grad)  # nothing of the revival reaches it
    live = ~sae.dead
    assert torch.equal(sae.encoder_weight.grad[live], alone.encoder_weight.grad[live])
    assert float((sae.encoder_weight.grad - alone.encoder_weight.grad)[~live].abs().sum()) > 0


def test_reads_the_encoder_input_after_the_pre_bias():
    config = SAEConfig(d_in=4, n_concepts=8, kind="topk", k=1, pre_bias=True, dead_after=1)
    sae = SparseAutoencoder(config).double()
    with torch.no_grad():
        sae.pre_bias.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    sae.samples_since_fired[3:] = 5
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output = sae(x)
    shifted = x - sae.pre_bias.detach()
    expected = revival_loss(shifted, x - output.x_hat, sae.encoder_weight, sae.encoder_bias, sae.atoms, sae.dead)
    torch.testing.assert_close(output.losses["revival"], expected.detach())
    assert F.mse_loss(x, output.x_hat, reduction="sum").item() / 7 == pytest.approx(
        float(output.losses["reconstruction"])
    )
