from __future__ import annotations

import pytest
import torch
from effml_quant.packing import pack_fp4, pack_fp6, pack_int4, packed_length, unpack_fp4, unpack_fp6, unpack_int4
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

E2M1 = [0x7, 0xF, 0x7, 0x6, 0xC, 0x2, 0x0, 0x0]
E3M2 = [0x1F, 0x3F, 0x1F, 0x1D, 0x39, 0x12, 0x05, 0x01]
E2M3 = [0x1F, 0x3E, 0x1E, 0x1A, 0x32, 0x06, 0x01, 0x00]
KINDS = {
    "fp4": (pack_fp4, unpack_fp4, torch.uint8, 0, 15, 4),
    "fp6": (pack_fp6, unpack_fp6, torch.uint8, 0, 63, 6),
    "int4": (pack_int4, unpack_int4, torch.int8, -8, 7, 4),
}


def codes(values: list[int]) -> torch.Tensor:
    return torch.tensor(values + [0] * (32 - len(values)), dtype=torch.uint8)


def naive(values: list[int], bits: int) -> list[int]:
    """Write the codes as one long number, least significant first, and cut it into bytes."""
    number = sum((value & ((1 << bits) - 1)) << (bits * i) for i, value in enumerate(values))
    return list(number.to_bytes(packed_length(len(values), bits), "little"))


def test_worked_bytes():
    assert bytes(pack_fp4(codes(E2M1)).tolist()).hex(" ").startswith("f7 67 2c 00")
    assert bytes(pack_fp6(codes(E3M2)).tolist()).hex(" ").startswith("df ff 75 b9 54 04")
    assert bytes(pack_fp6(codes(E2M3)).tolist()).hex(" ").startswith("9f ef 69 b2 11 00")
    assert len(pack_fp4(codes(E2M1))) == 16
    assert len(pack_fp6(codes(E3M2))) == 24
    assert pack_int4(torch.tensor([7, -7, -8, -1], dtype=torch.int8)).tolist() == [0x97, 0xF8]


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_any_codes_survive_along_any_axis(kind, data):
    pack, unpack, dtype, low, high, bits = KINDS[kind]
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    packed = pack(x, axis)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape[axis] == packed_length(shape[axis], bits)
    back = unpack(packed, shape[axis], axis)
    assert back.dtype == dtype
    assert torch.equal(back, x)
    for line, row in zip(
        packed.movedim(axis, -1).reshape(-1, packed.shape[axis]).tolist() if packed.numel() else [],
        x.movedim(axis, -1).reshape(-1, shape[axis]).tolist() if packed.numel() else [],
        strict=True,
    ):
        assert line == naive(row, bits)


def test_every_pair_of_nibbles():
    packed = torch.arange(256).to(torch.uint8)
    assert torch.equal(pack_fp4(unpack_fp4(packed)), packed)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_torchs_own_packed_type_holds_the_same_bytes():
    packed = pack_fp4(codes(E2M1)).view(torch.float4_e2m1fn_x2)
    assert packed.view(torch.uint8)[:4].tolist() == [0xF7, 0x67, 0x2C, 0x00]


def test_odd_lengths_are_filled_with_zero_and_trimmed():
    five = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    assert pack_fp4(five).tolist() == [0x21, 0x43, 0x05]
    assert unpack_fp4(pack_fp4(five)).tolist() == [1, 2, 3, 4, 5, 0]
    assert unpack_fp4(pack_fp4(five), 5).tolist() == [1, 2, 3, 4, 5]
    assert unpack_fp6(pack_fp6(five)).tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert unpack_fp6(pack_fp6(five), 5).tolist() == [1, 2, 3, 4, 5]


BYTES = torch.zeros(6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_fp4(BYTES + 16), r"codes: got 16 to 16, expected 0 to 15"),
        (lambda: pack_fp6(BYTES + 64), r"codes: got 64 to 64, expected 0 to 63"),
        (lambda: pack_int4(torch.tensor([-9, 8], dtype=torch.int8)), r"codes: got -9 to 8, expected -8 to 7"),
        (lambda: pack_fp4(BYTES.to(torch.int8)), r"codes: got torch.int8, expected torch.uint8"),
        (lambda: pack_int4(BYTES), r"codes: got torch.uint8, expected torch.int8"),
        (lambda: pack_fp4([1, 2]), r"codes: got list, expected torch.uint8"),
        (lambda: pack_fp4(BYTES, 1), r"axis: got 1, expected one of a tensor of shape \(6,\)"),
        (lambda: pack_fp4(BYTES[0]), r"axis: got -1, expected one of a tensor of shape \(\)"),
        (lambda: unpack_fp4(BYTES.float()), r"packed: got torch.float32, expected torch.uint8"),
        (lambda: unpack_fp4(BYTES, 13), r"length: got 13, expected 11 to 12 codes in 6 bytes"),
        (lambda: unpack_fp4(BYTES, 10), r"length: got 10, expected 11 to 12 codes in 6 bytes"),
        (lambda: unpack_fp4(BYTES, 11.0), r"length: got 11.0, expected 11 to 12"),
        (lambda: unpack_fp4(BYTES[:0], -1), r"length: got -1, expected 0 to 0 codes in 0 bytes"),
        (lambda: unpack_fp6(BYTES[:5]), r"packed: got 5 bytes along axis -1, expected a multiple of 3"),
        (lambda: unpack_fp6(BYTES, 4), r"length: got 4, expected 5 to 8 codes in 6 bytes"),
        (lambda: unpack_int4(BYTES, 9), r"length: got 9, expected 11 to 12 codes in 6 bytes"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
