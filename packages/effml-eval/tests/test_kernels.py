"""The Triton products equal the plain ones: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from effml_eval.sae import kernels, native
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.sparse_products import concept_sums, pair_dots, weighted_sums

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton comes with torch's CUDA wheels")

SIZES = [(5, 3, 7, 4), (1, 1, 1, 1), (9, 19, 4, 67), (3, 9, 50, 300), (0, 3, 4, 5), (4, 0, 3, 5), (2, 3, 40, 0)]


def case(rows, k, concepts, dim, device, dtype):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(rows, k, generator=g) * (torch.rand(rows, k, generator=g) < 0.8)
    indices = torch.randint(concepts, (rows, k), generator=g)
    table, left = torch.randn(dim, concepts, generator=g).T, torch.randn(rows, dim, generator=g)
    return *(tensor.to(device, dtype) for tensor in (values, table, left)), indices.to(device)


def check(size, device, dtype, tolerance):
    """Compare all three products, and the dots without those of value 0, with dense ones in float64."""
    values, table, left, indices = case(*size, device, dtype)
    dense = SparseCodes(values.double(), indices, len(table)).dense()
    dots = (left.double() @ table.double().T).gather(1, indices)

    def products():
        sums = weighted_sums(values, indices, table), concept_sums(values, indices, left, len(table))
        return *sums, pair_dots(left, table, indices), pair_dots(left, table, indices, values)

    expected = dense @ table.double(), dense.T @ left.double(), dots, dots * (values != 0)
    for got, again, wanted in zip(products(), products(), expected, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, again)
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * scale)


def check_training(device):
    """A step of an autoencoder comes to the same gradients with the kernels and without them."""
    gradients = []
    for serves in (kernels.serves, lambda *tensors: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "serves", serves)
            sae = SparseAutoencoder(SAEConfig(d_in=20, n_concepts=60, kind="topk", k=4, dead_after=1)).to(device)
            sae.samples_since_fired += torch.arange(60, device=device) % 2  # so that revival takes part
            x = torch.randn(16, 20, generator=torch.Generator().manual_seed(3)).to(device)
            sae(x).loss.backward()
            gradients.append([p.grad for p in sae.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def interpret():
    """Check the kernels as Triton's interpreter runs them, on CPU tensors: a process of its own decides that."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "serves", lambda *tensors: calls.append(1) or True)
        patch.setattr(native, "serves", lambda *tensors: False)
        for size in SIZES:
            check(size, "cpu", torch.float32, 1e-5)
        check(SIZES[2], "cpu", torch.float16, 2e-3)
        check_training("cpu")
    assert calls


@needs_triton
def test_interpreted_kernels_equal_the_plain_version():
    code = f"import runpy; runpy.run_path({__file__!r})['interpret']()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tensors_of_a_cpu_are_left_to_the_others():
    assert not kernels.serves(torch.zeros(1, 8))
    assert not kernels.serves(torch.zeros(1, 8, dtype=torch.float64))


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_kernels_on_the_device_equal_the_plain_version(dtype, tolerance):
    for size in [*SIZES, (300, 32, 5000, 768)]:
        check(size, "cuda", dtype, tolerance)
    assert not kernels.serves(torch.zeros(1, 8, dtype=torch.float64, device="cuda"))
    check_training("cuda")
