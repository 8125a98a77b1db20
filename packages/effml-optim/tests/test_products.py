import pytest
import torch
from effml_optim.matrix import products
from effml_optim.matrix.products import average_gram_, matmul


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def layouts(matrix):
    """The same matrix in rows, in columns, and as a slice with gaps between its rows."""
    gappy = matrix.new_zeros(matrix.shape[0], matrix.shape[1] + 3)
    gappy[:, 3:] = matrix
    return matrix.contiguous(), matrix.mT.contiguous().mT, gappy[:, 3:]


@pytest.mark.parametrize("shape", [(200, 190, 180), (700, 40, 300), (40, 700, 300), (300, 700, 40), (1, 3000, 2000)])
def test_large_float32_products_are_as_exact_as_the_blas(shape):
    m, k, n = shape
    a, b = normal(m, k, dtype=torch.float32), normal(k, n, dtype=torch.float32)
    exact = a.double() @ b.double()
    blas_error = (torch.mm(a, b).double() - exact).abs().max()
    for left in layouts(a):
        for right in layouts(b):
            result = matmul(left[None], right[None])[0]
            assert result.shape == (m, n)
            assert result.dtype == torch.float32
            assert (result.double() - exact).abs().max() < 4 * blas_error


def test_the_fast_path_is_taken_where_this_machine_has_it_and_can_be_switched_off(monkeypatch):
    calls = []
    real = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda a, b: calls.append(a.shape) or real(a, b))
    a, b = normal(1, 300, 300, dtype=torch.float32), normal(1, 300, 200, dtype=torch.float32)
    fast = matmul(a, b)
    assert len(calls) == products._onednn_is_faster("cpu")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.testing.assert_close(matmul(a, b), fast, rtol=0, atol=1e-6 * float(fast.abs().max()))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    matmul(a.double(), b.double())
    matmul(a.bfloat16(), b.bfloat16())
    matmul(a[:, :2], b)
    matmul(a.expand(2, -1, -1), b.expand(2, -1, -1))
    assert len(calls) <= 1


@pytest.mark.parametrize("n", [1, 5, 511, 512, 1025])
@pytest.mark.parametrize("bucket", [1, 3])
def test_averaged_grams_equal_the_formula_and_stay_symmetric(n, bucket):
    x, start = normal(bucket, n, 7), normal(bucket, n, 4)
    average = start @ start.mT
    expected = 0.9 * average + 0.1 * x @ x.mT
    for rows in (x, x.mT.contiguous().mT):
        result = average_gram_(average.clone(), rows, 0.9, 0.1)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12 * n)
        assert (result - result.mT).abs().max() < 1e-13 * n


def test_grams_of_bfloat16_gradients_are_summed_in_float32():
    x = normal(1, 600, 300, dtype=torch.bfloat16)
    average = average_gram_(torch.zeros(1, 600, 600), x, 0.0, 1.0)
    exact = x.double() @ x.double().mT
    assert average.dtype == torch.float32
    assert ((average.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-3 * 300**0.5).all()
