"""The Triton kernels equal the plain version: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from effml_quant import Quantizer, fake_quantize, formats
from effml_quant.casting import plain_cast, quantize_blocks

pytest.importorskip("triton", reason="triton comes with torch's CUDA wheels and is not installed")
SEED = torch.tensor(123_456_789_012_345)


def samples(dtype):
    stream = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 70, generator=stream) * torch.randint(-90, 128, (5, 1), generator=stream).float().exp2()
    holes = torch.randn(3, 33, 10, generator=stream)
    holes[0, 3, 4], holes[1, 5], holes[2] = torch.nan, torch.inf, 0.0
    return [x.to(dtype) for x in (wide, holes, torch.randn(7, generator=stream))]


def cases():
    for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxint8", "nvfp4", "int4"):
        kind = formats[name].scale
        fields = {
            "e8m0": [{"axis": 0}, {"scale_rule": "rceil"}, {"scale_rule": "even"}, {"granularity": "tensor"}],
            "float32": [{}, {"granularity": "channel"}, {"block_size": 13, "axis": 0}],
            "e4m3": [{}, {"axis": 0}, {"recipe": "torchao"}],
        }[kind]
        yield from (Quantizer(name, **some) for some in fields)
    yield from (Quantizer("mxfp6_e3m2", rounding=mode) for mode in ("away", "toward_zero", "stochastic"))


def check(kernels, x, q):
    value = kernels.cast(x, q, SEED)
    torch.testing.assert_close(value.cpu(), plain_cast(x.cpu(), q, SEED), rtol=0, atol=0, equal_nan=True)
    codes, scales, _ = kernels.codes_of(x, q, SEED)
    expected = quantize_blocks(x.cpu(), q, SEED)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.codes.view(torch.uint8))
    same = torch.equal(scales.cpu().view(torch.uint8), expected.scales.view(torch.uint8))
    assert same or scales.float().isnan().any()


def interpret():
    """Check the kernels as Triton's interpreter runs them, on CPU tensors: a process of its own decides that."""
    from effml_quant.kernels import gpu

    np.seterr(invalid="ignore", over="ignore")
    for q in cases():
        for x in samples(torch.float32):
            check(gpu, x, q)
        if q.scale_kind == "e8m0":  # the interpreter does not round what it stores as bfloat16; these need not be
            for x in samples(torch.bfloat16):
                check(gpu, x, q)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    for name in ("mxfp4", "nvfp4", "int4"):
        packed = gpu.codes_of(x, q := Quantizer(name), packed=True)[0]
        expected = quantize_blocks(x, q).codes.view(torch.uint8).flatten() & 15
        assert torch.equal(packed, expected[::2] | (expected[1::2] << 4))


def test_interpreted_kernels_equal_the_plain_version():
    code = f"import runpy; runpy.run_path({__file__!r})['interpret']()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_on_the_device_equal_the_plain_version(dtype):
    from effml_quant.kernels import gpu

    for q in cases():
        for x in samples(dtype):
            check(gpu, x.cuda(), q)
    x = torch.randn(1 << 20, device="cuda", dtype=dtype)
    for q in cases():
        assert torch.equal(fake_quantize(x, q.replace(axis=0)).cpu(), fake_quantize(x.cpu(), q.replace(axis=0)))
