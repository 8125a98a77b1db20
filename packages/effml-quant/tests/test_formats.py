"""Formats against the standards' tables, and every code against torch's and ml_dtypes' own types."""

from __future__ import annotations

import math

import pytest
import torch
from effml_quant import Format, formats
from effml_quant.formats import find_format
from effml_quant.rounding import decode, encode
from effml_shared.errors import ConfigError

MX = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8")
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
# fmt: off
E2M3 = [0, .125, .25, .375, .5, .625, .75, .875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
        2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5]
E3M2 = [0, .0625, .125, .1875, .25, .3125, .375, .4375, .5, .625, .75, .875, 1, 1.25, 1.5, 1.75,
        2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
TABLE = {  # bits, exponent bits, mantissa bits, bias, emax, max, least normal, least above zero, inf, nan, grid size
    "mxfp8_e5m2": (8, 5, 2, 15, 15, 57344.0, 2**-14, 2**-16, True, True, 124),
    "mxfp8_e4m3": (8, 4, 3, 7, 8, 448.0, 2**-6, 2**-9, False, True, 127),
    "mxfp6_e3m2": (6, 3, 2, 3, 4, 28.0, 0.25, 0.0625, False, False, 32),
    "mxfp6_e2m3": (6, 2, 3, 1, 2, 7.5, 1.0, 0.125, False, False, 32),
    "mxfp4": (4, 2, 1, 1, 2, 6.0, 1.0, 0.5, False, False, 8),
    "mxint8": (8, 0, 6, 0, 0, 127 / 64, 1 / 64, 1 / 64, False, False, 128),
    "nvfp4": (4, 2, 1, 1, 2, 6.0, 1.0, 0.5, False, False, 8),
}
# fmt: on
PEERS = {  # name in ml_dtypes -> our format
    "float8_e4m3fn": formats["mxfp8_e4m3"],
    "float8_e5m2": formats["mxfp8_e5m2"],
    "float6_e3m2fn": formats["mxfp6_e3m2"],
    "float6_e2m3fn": formats["mxfp6_e2m3"],
    "float4_e2m1fn": formats["mxfp4"],
    "float8_e3m4": Format.floating("e3m4", 3, 4, specials="ieee"),
    "float8_e4m3": Format.floating("e4m3", 4, 3, specials="ieee"),
    "bfloat16": formats["bfloat16"],
}


def finite_codes(fmt: Format) -> torch.Tensor:
    values = fmt.values()
    keep = values.isfinite() & (values >= fmt.lowest)  # an integer's most negative code is not used
    return torch.arange(len(values))[keep]


@pytest.mark.parametrize("name", TABLE)
def test_the_standards_table(name):
    fmt = formats[name]
    got = (fmt.elem_bits, fmt.exp_bits, fmt.man_bits, fmt.bias, fmt.emax, fmt.max, fmt.min_normal, fmt.min_sub)
    assert (*got, fmt.has_inf, fmt.has_nan, len(fmt.grid)) == TABLE[name]
    assert fmt.emin == (0 if fmt.is_integer else 1 - fmt.bias)
    assert (fmt.scale, fmt.block) == (("e4m3", 16) if name == "nvfp4" else ("e8m0", 32))


def test_the_code_tables():
    assert list(formats["mxfp4"].grid) == E2M1
    assert list(formats["mxfp6_e2m3"].grid) == E2M3
    assert list(formats["mxfp6_e3m2"].grid) == E3M2
    assert formats["mxint8"].values()[[1, 127, 128, 129, 255]].tolist() == [1 / 64, 127 / 64, -2, -127 / 64, -1 / 64]


def test_spot_codes():
    e4m3, e5m2 = formats["mxfp8_e4m3"].values(), formats["mxfp8_e5m2"].values()
    codes = [0x01, 0x07, 0x08, 0x38, 0x77, 0x78, 0x7E]
    assert e4m3[codes].tolist() == [2**-9, 0.875 * 2**-6, 2**-6, 1, 240, 256, 448]
    assert e4m3[0x7F].isnan()
    assert e5m2[[0x3C, 0x7B, 0x7C, 0xFC]].tolist() == [1, 57344, math.inf, -math.inf]


@pytest.mark.parametrize(("name", "dtype"), [("mxfp8_e4m3", torch.float8_e4m3fn), ("mxfp8_e5m2", torch.float8_e5m2)])
def test_every_code_is_torchs(name, dtype):
    theirs = torch.arange(256).to(torch.uint8).view(dtype).float()
    torch.testing.assert_close(formats[name].values(), theirs, rtol=0, atol=0, equal_nan=True)
    assert formats[name].code_dtype == dtype


@pytest.mark.parametrize("name", PEERS)
def test_every_code_is_ml_dtypes(name):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="compares every code with a second implementation of the types")
    numpy = pytest.importorskip("numpy")
    fmt = PEERS[name]
    if fmt.elem_bits > 8:
        theirs = numpy.arange(2**16, dtype=numpy.uint16).view(ml_dtypes.bfloat16)
    else:
        theirs = numpy.arange(2**fmt.elem_bits, dtype=numpy.uint8).view(getattr(ml_dtypes, name))
    theirs = torch.from_numpy(theirs.astype(numpy.float32))
    torch.testing.assert_close(fmt.values(), theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(fmt.values().signbit()[theirs == 0], theirs.signbit()[theirs == 0])
    if fmt.elem_bits <= 8:
        codes = torch.arange(2**fmt.elem_bits).to(torch.uint8)
        torch.testing.assert_close(decode(codes, fmt), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [n for n in formats if n != "bfloat16"])
def test_every_finite_code_survives_decoding_and_encoding(name):
    fmt = formats[name]
    codes = finite_codes(fmt).to(torch.uint8)
    raw = codes.view(torch.int8) if fmt.is_integer and fmt.elem_bits == 8 else codes
    if fmt.is_integer:
        raw = torch.arange(-int(fmt.max / fmt.spacing), int(fmt.max / fmt.spacing) + 1).to(torch.int8)
    values = decode(raw, fmt)
    assert torch.equal(encode(values.abs(), values.signbit(), fmt), raw)
    assert torch.equal(encode(values.double().abs(), values.signbit(), fmt), raw)
    assert values.abs().max() == fmt.max
    assert set(values.abs().tolist()) == set(fmt.grid)


LAYOUTS = [(2, 0), (2, 1), (3, 4), (4, 3), (5, 0), (5, 2), (6, 1)]


@pytest.mark.parametrize(
    ("exp_bits", "man_bits", "specials"),
    [(1, 2, "none"), (1, 2, "nan"), *((e, m, s) for e, m in LAYOUTS for s in ("none", "nan", "ieee"))],
)
def test_custom_formats_agree_with_their_own_grid(exp_bits, man_bits, specials):
    fmt = Format.floating("mine", exp_bits, man_bits, specials=specials)
    values = fmt.values()
    assert len(values) == 2**fmt.elem_bits
    assert values[len(fmt.grid) - 1] == fmt.max == fmt.grid[-1]
    assert sorted(fmt.grid) == list(fmt.grid)
    torch.testing.assert_close(
        decode(torch.arange(len(values)).to(torch.uint8), fmt), values, rtol=0, atol=0, equal_nan=True
    )


def test_names_and_aliases():
    assert find_format("fp8_e4m3") is find_format("mxfp8_e4m3") is formats["mxfp8_e4m3"]
    assert find_format("bf16") is formats["bfloat16"]
    assert find_format("mxfp4_e2m1") is find_format("fp4_e2m1") is formats["mxfp4"]
    assert find_format(formats["int4"]) is formats["int4"]
    with pytest.raises(TypeError):
        formats["mine"] = formats["int4"]


@pytest.mark.parametrize("wrong", ["mxfp5", "", "E4M3", 3, None, torch.float8_e4m3fn])
def test_unknown_formats_name_the_nearest(wrong):
    with pytest.raises(ConfigError, match=r"^format: got .*, did you mean '\w+'\? \(all: mxfp8_e4m3, "):
        find_format(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Format.floating("f", 0, 3), r"f: got 0 exponent and 3 mantissa bits, expected 1-8 and 0-10"),
        (lambda: Format.floating("f", 9, 3), r"expected 1-8 and 0-10"),
        (lambda: Format.floating("f", 8, 10), r"elem_bits: got 19, expected 2 to 16"),
        (lambda: Format.floating("f", 4, 3, specials="inf"), r"specials: got 'inf'"),
        (lambda: Format.floating("f", 4, 3, scale="fp16"), r"scale: got 'fp16'"),
        (lambda: Format.floating("f", 4, 3, bias=200), r"f: got exponents -199 to -185, expected float32's"),
        (lambda: Format.floating("f", 8, 3), r"f: got exponents -126 to 128, expected float32's"),
        (lambda: Format.floating("f", 4, 3, scale="e4m3"), r"scale: got 'e4m3' for f, expected elements of nvfp4"),
        (lambda: Format.integer("i", 1), r"i: got 1 bits, expected 2 to 8"),
        (lambda: Format.integer("i", 9), r"i: got 9 bits, expected 2 to 8"),
        (lambda: Format.integer("i", 8, step=0.3), r"i: got step 0.3, expected a power of two"),
    ],
)
def test_impossible_formats_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
