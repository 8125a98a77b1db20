"""The law `quantize(x).dequantize() == fake_quantize(x)` for everything a user can ask for, and use in products."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from effml_quant import Format, Quantizer, fake_quantize, formats
from effml_quant.casting import draw_seed, plain_cast
from effml_quant.qtensor import QTensor, packed_shape, quantize, stored_bytes
from effml_shared.errors import ConfigError, NonFiniteError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

CODED = [name for name in formats if name != "bfloat16"]
MINE = Format.floating("e3m4", 3, 4, specials="nan")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def quantizers(draw):
    fmt = draw(st.sampled_from([*CODED, MINE]))
    fields = {
        "axis": draw(st.integers(-3, 2)),
        "scale_rule": draw(st.sampled_from(["floor", "rceil", "ceil", "even"])),
        "rounding": draw(st.sampled_from(["rne", "away", "toward_zero", "stochastic"])),
    }
    if fmt == "nvfp4":
        fields |= {
            "block_size": draw(st.sampled_from([16, (16, 16)])),
            "recipe": draw(st.sampled_from([None, "torchao"])),
        }
    else:
        cut = {"block_size": draw(st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 20), st.integers(1, 20))))}
        whole = {"granularity": draw(st.sampled_from(["tensor", "channel"]))}
        fields |= draw(st.sampled_from([cut, whole]))
        if isinstance(fmt, str) and fmt.startswith("int"):
            fields["recipe"] = draw(st.sampled_from(["symmetric", "torchao", "asymmetric"]))
        elif fmt != "nvfp4":
            fields["scale"] = draw(st.sampled_from(["format", "continuous"]))
    return Quantizer(fmt, **fields)


@st.composite
def arrays(draw):
    """Tensors of three axes with numbers of all sizes, some of them extreme, not always contiguous."""
    shape = tuple(draw(st.lists(st.integers(0, 37), min_size=3, max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(
        torch.randint(-3, 4, shape, generator=generator).double() + draw(st.sampled_from([0, -150, 120]))
    )
    info = torch.finfo(dtype)
    x = x.clamp(-info.max, info.max).to(dtype)
    extremes = [0.0, -0.0, info.max, -info.max, info.tiny, info.tiny * info.eps, math.nan, math.inf]
    for value in draw(st.lists(st.sampled_from(extremes), max_size=3)) if x.numel() else []:
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = value
    order = draw(st.permutations(range(3)))
    return x.permute(order)


@settings(max_examples=150, deadline=None)
@given(arrays(), quantizers(), st.integers(0, 2**32))
def test_the_law(x, q, seed):
    packed = quantize(x, q, generator=torch.Generator().manual_seed(seed))
    wanted = fake_quantize(x, q, generator=torch.Generator().manual_seed(seed))
    seed = draw_seed(q, torch.Generator().manual_seed(seed), x.device)
    assert torch.equal(plain_cast(x, q, seed).nan_to_num(0), wanted.nan_to_num(0))
    got = packed.dequantize()
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(0), wanted.nan_to_num(0))
    if not q.format.is_integer:
        kept = ~got.isnan()
        assert torch.equal(got.signbit()[kept], wanted.signbit()[kept])
    assert packed.unpack().shape == x.shape
    assert packed.codes.shape == packed_shape(tuple(x.shape), q)
    assert packed.nbytes <= stored_bytes(tuple(x.shape), q, x.dtype)
    if x.numel():
        assert packed.nbytes == stored_bytes(tuple(x.shape), q, x.dtype)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("shape", [(), (1,), (33,), (4, 96), (2, 3, 5, 64)])
def test_the_law_for_usual_tensors(name, shape):
    fields = {} if shape else {"granularity": "tensor"}
    if name == "nvfp4" and not shape:
        with pytest.raises(ConfigError, match=r"axis: got a tensor of shape \(\)"):
            quantize(torch.tensor(1.0), name)
        return
    for dtype in DTYPES:
        x = normal(*shape, dtype=dtype)
        assert torch.equal(quantize(x, name, **fields).dequantize(), fake_quantize(x, name, **fields))


@pytest.mark.parametrize(
    ("name", "fields", "bits"),
    [
        ("mxfp8_e4m3", {}, 8.25),
        ("mxint8", {}, 8.25),
        ("mxfp6_e3m2", {}, 6.25),
        ("mxfp4", {}, 4.25),
        ("nvfp4", {}, 4.5 + 32 / 2**16),
        ("int4", {"block_size": 128}, 4.25),
        ("int8", {"granularity": "channel"}, 8.125),
    ],
)
def test_bits_per_element(name, fields, bits):
    assert quantize(normal(256, 256), name, **fields).nbytes * 8 / 2**16 == bits


def test_codes_are_what_a_file_would_hold():
    x = torch.tensor([0.95, -0.9, 0.88, 0.6, -0.3, 0.1, 0.01, 0.001] + [0.0] * 24)
    assert quantize(x, "mxfp4").codes[:4].tolist() == [0xF7, 0x67, 0x2C, 0x00]
    assert quantize(x, "mxfp6_e3m2").codes[:6].tolist() == [0xDF, 0xFF, 0x75, 0xB9, 0x54, 0x04]
    assert quantize(x, "mxfp6_e2m3").codes[:6].tolist() == [0x9F, 0xEF, 0x69, 0xB2, 0x11, 0x00]
    assert quantize(x, "mxfp8_e4m3").codes.dtype == torch.float8_e4m3fn
    assert quantize(x, "mxint8").codes[:8].tolist() == [122, -115, 113, 77, -38, 13, 1, 0]
    assert quantize(x, "int4").unpack()[:8].tolist() == [7, -7, 6, 4, -2, 1, 0, 0]
    assert quantize(x, "mxfp4").unpack()[:8].tolist() == [0x7, 0xF, 0x7, 0x6, 0xC, 0x2, 0x0, 0x0]


def test_packing_follows_the_blocks():
    x = normal(6, 10)
    assert quantize(x, "mxfp4", axis=0).codes.shape == (3, 10)
    assert quantize(x, "mxfp4").codes.shape == (6, 5)
    assert quantize(x, "nvfp4", block_size=(16, 16)).codes.shape == (6, 5)
    assert quantize(x, "int4", granularity="channel").codes.shape == (6, 5)
    assert quantize(x, "int6").codes.shape == (6, 10)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "nvfp4", "int4"])
def test_products_compute_with_its_values(name):
    w, x = normal(8, 40, seed=1), normal(5, 40, seed=2).requires_grad_()
    q = quantize(w, name)
    out = F.linear(x, q)
    wanted = F.linear(x, fake_quantize(w, name))
    assert torch.equal(out, wanted)
    columns = quantize(w.T, name, axis=0)
    assert torch.equal(x @ columns, x @ columns.dequantize())
    assert torch.equal(q @ x.T, fake_quantize(w, name) @ x.T)
    assert torch.equal(torch.matmul(q, x.T), q @ x.T)
    assert torch.equal(torch.einsum("bk,nk->bn", x, q), torch.einsum("bk,nk->bn", x, q.dequantize()))
    assert torch.equal(F.linear(input=x, weight=q), wanted)
    assert torch.equal(F.embedding(torch.tensor([3, 1]), q), q.dequantize()[[3, 1]])
    out.sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(5, 40))


def test_what_is_no_product_needs_a_tensor():
    q = quantize(normal(32, 32), "mxfp4")
    for call in (lambda: torch.add(q, 1), lambda: torch.ones(32, 32).copy_(q), lambda: torch.matmul(q, q, out=q)):
        with pytest.raises(TypeError):
            call()


def test_plain_tensors_go_through_a_state_dict():
    class Layer(nn.Module):
        def __init__(self, q: QTensor) -> None:
            super().__init__()
            self.kind = q
            for name, tensor in q.tensors().items():
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.kind.replace_tensors(dict(self.named_buffers())))

    a, b = (Layer(quantize(normal(4, 32, seed=seed), "nvfp4")) for seed in (1, 2))
    x = normal(3, 32)
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))


def test_moving_copying_and_showing():
    q = quantize(normal(4, 33), "nvfp4", axis=0)
    moved = q.to("cpu")
    assert torch.equal(moved.dequantize(), q.dequantize())
    assert torch.equal(copy.deepcopy(q).dequantize(), q.dequantize())
    assert q.to("meta").codes.device.type == "meta"
    assert (q.fmt.name, q.axis, q.ndim, q.numel(), q.device.type) == ("nvfp4", 0, 2, 132, "cpu")
    assert repr(q) == "QTensor(nvfp4, shape=(4, 33), dtype=torch.float32, nbytes=103)"


def test_dequantising_to_another_dtype_saturates_there():
    q = quantize(torch.tensor([1e6, -1e6, 3.0]), "mxfp8_e4m3")
    assert q.dequantize(torch.float16).tolist()[:2] == [65504, -65504]
    assert q.dequantize(torch.float64).dtype == torch.float64
    top = quantize(torch.tensor([3.4e38]), "mxfp8_e4m3", scale_rule="rceil")
    assert top.dequantize(torch.float64).tolist() == [2.0**128]
    assert top.dequantize().tolist() == [torch.finfo(torch.float32).max]


def test_a_scale_of_the_tensor_and_a_generator():
    x = normal(4, 32)
    q = quantize(x, "nvfp4", global_scale=100.0)
    assert float(q.global_scale) == 100
    assert torch.equal(q.dequantize(), fake_quantize(x, "nvfp4", global_scale=100.0))
    assert quantize(x, "nvfp4", recipe="torchao").global_scale is None
    fields = {"rounding": "stochastic", "scale_rule": "rceil"}
    a, b = (quantize(x, "mxfp4", generator=torch.Generator().manual_seed(3), **fields) for _ in range(2))
    assert torch.equal(a.codes, b.codes)


def test_quantising_takes_no_part_in_autograd():
    q = quantize(normal(4, 32).requires_grad_(), "int8")
    assert not q.scales.requires_grad
    assert not q.dequantize().requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(4), "bfloat16"), r"format: got bfloat16, expected one with a scale"),
        (lambda: quantize(torch.ones(4), Format.floating("e4m7", 4, 7)), r"format: got e4m7"),
        (lambda: quantize(torch.arange(4), "mxfp4"), r"x: got torch.int64"),
        (lambda: quantize(torch.ones(4), "mxfp4", axis=1), r"axis: got a tensor of shape \(4,\)"),
        (lambda: quantize(torch.ones(4), "mxfp4", block=3), r"quantizer: got an unknown field 'block'"),
        (lambda: quantize(torch.ones(4), "nvfp4", global_scale=-1.0), r"global_scale: got -1.0"),
        (lambda: quantize(torch.ones(4), "mxfp4").dequantize(torch.int8), r"dtype: got torch.int8, expected float16"),
        (lambda: quantize(torch.ones(4), "mxfp4").to(torch.float16), r"device: got torch.float16, expected a device"),
        (
            lambda: quantize(torch.ones(4), "mxfp4").replace_tensors({}),
            r"tensors: got \[\], expected \['codes', 'scales'\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"codes": torch.zeros(4, 17, dtype=torch.uint8)},
            r"codes: got torch.uint8 \(4, 17\), expected torch.uint8 \(4, 16\)",
        ),
        ({"codes": torch.zeros(4, 16)}, r"codes: got torch.float32 \(4, 16\)"),
        ({"codes": None}, r"codes: got NoneType, expected"),
        ({"scales": torch.ones(4, 1)}, r"scales: got torch.float32 \(4, 1\), expected torch.float8_e8m0fnu \(4, 1\)"),
        ({"shape": (4, 64)}, r"codes: got torch.uint8 \(4, 16\), expected torch.uint8 \(4, 32\) for mxfp4 \(4, 64\)"),
        ({"dtype": torch.int32}, r"dtype: got torch.int32, expected float16"),
        ({"global_scale": torch.tensor(1.0)}, r"global_scale: got one for mxfp4, expected None"),
        ({"zero_points": torch.zeros(4, 1)}, r"zero_points: got some for recipe None, expected None"),
        ({"quantizer": Quantizer("bfloat16")}, r"format: got bfloat16"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    q = quantize(normal(4, 32), "mxfp4")
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(q, **change)


def test_nonfinite_values_can_be_an_error():
    with pytest.raises(NonFiniteError, match=r"x: got 1 of 4"):
        quantize(torch.tensor([1, 2, math.nan, 3]), "mxfp4", nonfinite="raise")
