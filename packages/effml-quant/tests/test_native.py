"""The C kernels equal the plain version bit by bit, whatever the tensor, and step aside where they cannot."""

import os

import hypothesis.strategies as st
import pytest
import torch
from effml_quant import Quantizer, fake_quantize, formats
from effml_quant.casting import plain_cast, quantize_blocks
from effml_quant.kernels import native
from effml_shared.errors import ConfigError
from hypothesis import given, settings

SEED = torch.tensor(123_456_789_012_345)
NAMES = [name for name in formats if name not in ("int3", "int5", "int6", "int7")]
pytestmark = pytest.mark.skipif(not native.is_available(), reason="needs a C compiler: none of cc, gcc, clang found")


def assert_same(got, expected):
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit() & ~got.isnan(), expected.signbit() & ~expected.isnan())


def samples(dtype):
    stream = torch.Generator().manual_seed(0)
    wide = torch.randn(67, 100, generator=stream) * torch.randint(-150, 128, (67, 1), generator=stream).float().exp2()
    holes = torch.randn(3, 33, 65, generator=stream)
    holes[0, 3, 4], holes[1, 5], holes[2], holes[0, 9, 9] = torch.nan, torch.inf, 0.0, -torch.inf
    return [x.to(dtype) for x in (wide, holes, torch.randn(7, generator=stream), wide[:64, :64].t())]


def variants(name):
    if formats[name].scale == "e8m0":
        ruled = [{"scale_rule": rule, "axis": axis} for rule in ("floor", "rceil", "ceil", "even") for axis in (0, -1)]
        return [*ruled, {"granularity": "tensor"}, {"scale": "continuous", "axis": 0}, {"granularity": "channel"}]
    if formats[name].scale == "float32":
        return [{}, {"granularity": "channel"}, {"granularity": ("group", 32)}, {"block_size": 13, "axis": 0}]
    return [{}, {"axis": 0}, {"recipe": "torchao"}] if name == "nvfp4" else [{}]


def quantizers(name, dtype):
    """Every variant rounded to nearest; the other modes, each a build of its own, where scales differ in kind."""
    yield from (Quantizer(name, **fields) for fields in variants(name))
    if dtype == torch.float32 and name in ("mxfp8_e4m3", "mxint8", "nvfp4", "int4", "bfloat16"):
        modes = ("away", "toward_zero", "stochastic")
        yield from (Quantizer(name, rounding=mode, **fields) for mode in modes for fields in variants(name)[-2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_casts_and_codes_equal_the_plain_version(name, dtype):
    for x in samples(dtype):
        for q in quantizers(name, dtype):
            assert_same(native.cast(x, q, SEED), plain_cast(x, q, SEED))
            if q.scale_kind == "none":
                continue
            codes, scales, total = native.codes_of(x, q, SEED)
            expected = quantize_blocks(x, q, SEED)
            assert torch.equal(codes.view(torch.uint8), expected.codes.view(torch.uint8))
            assert scales.dtype == expected.scales.dtype
            assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8)) or scales.isnan().any()
            assert total is expected.global_scale or torch.equal(total, expected.global_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 160), (70, 33), (1, 5), (5, 1)])
def test_a_matrix_is_cast_along_both_axes(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for one, other in (("mxfp8_e4m3", "mxfp4"), ("mxint8", "mxfp8_e5m2")):
        rows, columns = Quantizer(one), Quantizer(other, axis=0)
        along, across = native.cast_both(x, rows, columns)
        assert_same(along, plain_cast(x, rows))
        assert_same(across, plain_cast(x, columns))
    assert native.cast_both(x, Quantizer("int4", block_size=16), Quantizer("mxfp4", axis=0)) is None
    assert native.cast_both(x, Quantizer("mxfp4", rounding="stochastic"), Quantizer("mxfp4", axis=0)) is None


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    block=st.integers(1, 40),
    axis=st.integers(-1, 3),
    exponent=st.integers(-140, 120),
    seed=st.integers(0, 99),
)
def test_any_shape_block_and_axis(shape, block, axis, exponent, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q = Quantizer("mxfp6_e3m2", axis=axis % len(shape), block_size=block)
    assert_same(native.cast(x, q), plain_cast(x, q))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp6_e3m2", "int4", "fp4"])
def test_packed_codes_are_the_codes(name):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    q = Quantizer(name)
    codes, scales, _ = native.codes_of(x, q, packed=True)
    plain, bits = quantize_blocks(x, q), formats[name].elem_bits
    wide = plain.codes.view(torch.uint8).flatten().long() & (2**bits - 1)
    stream = sum(((wide >> i) & 1).reshape(-1, 1) << i for i in range(bits))  # the codes, as numbers again
    flat = torch.stack([(stream[:, 0] >> i) & 1 for i in range(bits)], 1).flatten().reshape(-1, 8)
    assert torch.equal(codes.long(), (flat << torch.arange(8)).sum(1))
    factor = scales.float() if plain.global_scale is None else scales.float() / plain.global_scale
    for dtype in (torch.float32, torch.bfloat16):
        values = native.values_of(codes, factor.flatten(), q, (6, 64), dtype)
        torch.testing.assert_close(values, plain_cast(x, q).to(dtype), rtol=0, atol=0)  # an integer has no -0


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "int8"])
def test_codes_that_are_no_numbers_decode_as_such(name):
    fmt = formats[name]
    codes = torch.arange(256, dtype=torch.uint8)
    values = native.values_of(codes, torch.ones(8), Quantizer(name, block_size=32), (256,), torch.float32)
    expected = fmt.values().clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_steps_aside_for_what_it_does_not_know():
    x = torch.randn(32, 32)
    for refused, fields in (
        (x.double(), {}),
        (x.half(), {}),
        (x[:0], {}),
        (x.to("meta"), {}),
        (x, {"fmt": "int4", "recipe": "asymmetric"}),
        (x, {"fmt": "int4", "recipe": "torchao"}),
        (x, {"block_size": (16, 16)}),
    ):
        q = Quantizer(fields.pop("fmt", "mxfp4"), **fields)
        assert native.cast(refused, q) is None
        assert native.codes_of(refused, q) is None


def test_without_a_compiler_the_plain_version_serves(monkeypatch):
    monkeypatch.setattr(native, "library", lambda *_: None)
    x = torch.randn(8, 32)
    assert native.cast(x, Quantizer("mxfp4")) is None
    assert torch.equal(fake_quantize(x, "mxfp4"), plain_cast(x, Quantizer("mxfp4")))


def test_threads_share_a_tensor():
    x = torch.randn(2048, 512)
    expected = plain_cast(x, q := Quantizer("mxfp8_e4m3"))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(native.cast(x, q), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_forked_child_has_threads_of_its_own():
    x = torch.randn(1024, 512)
    expected = fake_quantize(x, "mxfp4")
    if (child := os.fork()) == 0:
        os._exit(0 if torch.equal(fake_quantize(x, "mxfp4"), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_out_takes_the_result_even_in_place(dtype):
    x = torch.randn(33, 40, dtype=dtype)
    expected = fake_quantize(x, "mxfp4", axis=0)
    out = torch.empty_like(x)
    assert fake_quantize(x, "mxfp4", axis=0, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(fake_quantize(x, "mxfp4", axis=0, out=x), expected)
    with pytest.raises(ConfigError, match=r"out: got \(33, 40\) torch.float16, expected a contiguous"):
        fake_quantize(x, "mxfp4", out=out.half())
    with pytest.raises(ConfigError, match=r"out: got tensors that require gradients"):
        fake_quantize(x.requires_grad_(), "mxfp4", out=out)
