"""Sparse encoders: gradients equal those of autograd through the dense form, to 1e-12."""

import pytest
import torch
from effml_eval.sae import native
from effml_eval.sae.sparse_encode import batch_topk_encode, threshold_encode, topk_encode
from effml_eval.sae.sparsifiers import batch_topk_codes, threshold_codes, topk_codes
from effml_shared.errors import ConfigError


@pytest.fixture(params=["native", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    return request.param


def case(leading=(9,), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*leading, 6, generator=g, dtype=torch.float64)
    weight, bias = (
        torch.randn(20, 6, generator=g, dtype=torch.float64),
        torch.randn(20, generator=g, dtype=torch.float64),
    )
    bias[:15] -= 4.0  # so that rows have fewer positive entries than are kept
    return [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]


FORMS = {
    "topk": (lambda *t: topk_encode(*t, 7), lambda p: topk_codes(p, 7)),
    "all": (lambda *t: topk_encode(*t, 20), lambda p: topk_codes(p, 20)),
    "batch_topk": (lambda *t: batch_topk_encode(*t, 2.5), lambda p: batch_topk_codes(p, 2.5)),
    "threshold": (lambda *t: threshold_encode(*t, 0.7), lambda p: threshold_codes(p, 0.7)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leading", [(9,), (2, 3), ()])
def test_values_and_gradients_are_those_of_the_dense_form(path, form, leading):
    sparse, dense = FORMS[form]
    tensors = case(leading)
    upstream = torch.randn(*leading, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, expected = sparse(*tensors).dense(), dense(tensors[0] @ tensors[1].T + tensors[2]).dense()
    if form in ("topk", "all"):
        assert bool((sparse(*tensors).values == 0).any())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(z, tensors, upstream) for z in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_finite_differences(path):
    assert torch.autograd.gradcheck(lambda *t: topk_encode(*t, 7).dense(), case((4,)))


def test_float32_on_the_screened_path():
    for a, b in zip(
        *(
            torch.autograd.grad(topk_encode(*t, 7).values.square().sum(), t)
            for t in (case(), case(dtype=torch.float32))
        ),
        strict=True,
    ):
        torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it goes on after a graph break
def test_works_under_compile():
    tensors = case()
    compiled = torch.compile(lambda *t: topk_encode(*t, 3).values.sum() * 2, backend="eager")
    assert torch.equal(compiled(*tensors), topk_encode(*tensors, 3).values.sum() * 2)


def test_bad_arguments_are_refused():
    x, weight, bias = case()
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ConfigError, match=r"x: got NaN or infinity"):
            topk_encode(torch.full_like(x, bad), weight, bias, 2)
    for k in (0, -1, 21, 1.5):
        with pytest.raises(ConfigError, match=r"k: got"):
            topk_encode(x, weight, bias, k)
    with pytest.raises(ConfigError, match=r"k: got 20.5"):
        batch_topk_encode(x, weight, bias, 20.5)
    with pytest.raises(ConfigError, match=r"expected one dtype"):
        topk_encode(x.float(), weight, bias, 2)
    with pytest.raises(ConfigError, match=r"got shapes"):
        topk_encode(x[:, :5], weight, bias, 2)
