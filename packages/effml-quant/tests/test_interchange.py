"""MXFP4 checkpoints of others, against decoders written as their own tools do it."""

from __future__ import annotations

import pytest
import torch
from effml_quant import Format, fake_quantize
from effml_quant.interchange import (
    from_deepseek,
    from_gpt_oss,
    read_gpt_oss,
    to_deepseek,
    to_gpt_oss,
    write_gpt_oss,
)
from effml_quant.qtensor import quantize
from effml_shared.errors import ConfigError

E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode_gpt_oss(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Look up both nibbles, the low one first, and shift exponents by the scale's byte less 127."""
    exponent = scales.int() - 127
    out = torch.empty(*blocks.shape[:-1], 32)
    out[..., 0::2] = torch.ldexp(E2M1[(blocks & 15).long()], exponent[..., None])
    out[..., 1::2] = torch.ldexp(E2M1[(blocks >> 4).long()], exponent[..., None])
    return out.flatten(-2)


@pytest.mark.parametrize("shape", [(64,), (3, 96), (2, 5, 64)])
def test_what_is_written_is_read_as_gpt_oss_reads_it(shape):
    w = normal(*shape)
    blocks, scales = to_gpt_oss(quantize(w, "mxfp4"))
    assert blocks.shape == (*shape[:-1], shape[-1] // 32, 16)
    assert blocks.dtype == scales.dtype == torch.uint8
    assert torch.equal(decode_gpt_oss(blocks, scales), fake_quantize(w, "mxfp4"))


def test_any_bytes_of_gpt_oss_come_through_unchanged():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (4, 6, 2, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(90, 160, (4, 6, 2), generator=generator).to(torch.uint8)
    weight = from_gpt_oss(blocks, scales, torch.float32)
    assert weight.shape == (4, 6, 64)
    assert torch.equal(weight.dequantize(), decode_gpt_oss(blocks, scales))
    again = to_gpt_oss(weight)
    assert torch.equal(again[0], blocks)
    assert torch.equal(again[1], scales)
    assert torch.equal(from_gpt_oss(blocks, scales).dequantize().float(), weight.dequantize())


def test_the_largest_exponent_is_not_counted_twice():
    """A published exporter subtracted the element's emax = 2 once more, and weights came out four times too small."""
    blocks = torch.full((1, 16), 0x27, dtype=torch.uint8)
    weight = from_gpt_oss(blocks, torch.tensor([127], dtype=torch.uint8), torch.float32)
    assert weight.dequantize()[:2].tolist() == [6.0, 1.0]
    exact = 2.0 * E2M1[torch.arange(32) % 16]
    blocks, scales = to_gpt_oss(quantize(exact, "mxfp4"))
    assert scales.tolist() == [128]
    assert torch.equal(decode_gpt_oss(blocks, scales), exact)


def test_the_deepseek_layout():
    w = normal(6, 96)
    weight = quantize(w, "mxfp4")
    codes, scales = to_deepseek(weight)
    assert (codes.dtype, tuple(codes.shape)) == (torch.int8, (6, 48))
    assert (scales.dtype, tuple(scales.shape)) == (torch.float8_e8m0fnu, (6, 3))
    low, high = codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4
    values = torch.stack([E2M1[low.long()], E2M1[high.long()]], -1).flatten(-2)
    assert torch.equal(values * scales.float().repeat_interleave(32, -1), fake_quantize(w, "mxfp4"))
    back = from_deepseek(codes, scales, torch.float32)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert torch.equal(to_gpt_oss(back)[0], to_gpt_oss(weight)[0])


def test_a_whole_checkpoint():
    blocks, scales = to_gpt_oss(quantize(normal(2, 8, 64), "mxfp4"))
    checkpoint = {
        "layers.0.experts.down_proj_blocks": blocks,
        "layers.0.experts.down_proj_scales": scales,
        "block.0.mlp.mlp1_weight.blocks": blocks,
        "block.0.mlp.mlp1_weight.scales": scales,
        "layers.0.experts.down_proj_bias": normal(8),
    }
    read = read_gpt_oss(checkpoint)
    assert set(read) == {
        "layers.0.experts.down_proj",
        "block.0.mlp.mlp1_weight",
        "layers.0.experts.down_proj_bias",
    }
    assert read["layers.0.experts.down_proj"].dtype == torch.bfloat16
    written = write_gpt_oss(read)
    assert torch.equal(written["block.0.mlp.mlp1_weight_blocks"], blocks)
    assert torch.equal(written["layers.0.experts.down_proj_scales"], scales)
    assert written["layers.0.experts.down_proj_bias"] is checkpoint["layers.0.experts.down_proj_bias"]


BLOCKS, SCALES = torch.zeros(4, 2, 16, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)
E8M0 = SCALES.view(torch.float8_e8m0fnu)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: from_gpt_oss(BLOCKS, SCALES[:, :1]),
            r"blocks: got torch.uint8 \(4, 2, 16\), expected torch.uint8 \(4, 1, 16\)",
        ),
        (lambda: from_gpt_oss(BLOCKS[..., :8], SCALES), r"blocks: got torch.uint8 \(4, 2, 8\)"),
        (lambda: from_gpt_oss(BLOCKS.int(), SCALES), r"blocks: got torch.int32"),
        (
            lambda: from_gpt_oss(BLOCKS, E8M0),
            r"scales: got torch.float8_e8m0fnu \(4, 2\), expected torch.uint8 \(4, 2\)",
        ),
        (
            lambda: from_gpt_oss(BLOCKS[0, 0], SCALES[0, 0]),
            r"scales: got torch.uint8 \(\), expected .* \(..., groups\)",
        ),
        (lambda: from_gpt_oss(BLOCKS, SCALES, torch.int8), r"dtype: got torch.int8"),
        (
            lambda: from_deepseek(BLOCKS[..., 0], E8M0),
            r"codes: got torch.uint8 \(4, 2\), expected torch.int8 \(4, 32\)",
        ),
        (lambda: from_deepseek(torch.zeros(4, 32, dtype=torch.int8), SCALES), r"scales: got torch.uint8 \(4, 2\)"),
        (lambda: from_deepseek(torch.zeros(16, dtype=torch.int8), E8M0[0, 0]), r"scales: got .* \(\), expected"),
        (lambda: read_gpt_oss({"a_blocks": BLOCKS}), r"a_blocks: got it alone, expected a_scales beside it"),
        (lambda: read_gpt_oss({"a.scales": BLOCKS}), r"a.scales: got it alone, expected a.blocks beside it"),
        (lambda: read_gpt_oss({"a_blocks": BLOCKS, "a_scales": E8M0}), r"a: scales: got torch.float8_e8m0fnu"),
    ],
)
def test_tensors_that_are_not_such_weights(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ((4, 33), {}),
        ((4, 64), {"axis": 0}),
        ((4, 64), {"block_size": 16}),
        ((4, 64), {"granularity": "tensor"}),
        ((4, 64), {"scale": "continuous"}),
        ((4, 64), {"fmt": "nvfp4"}),
        ((4, 64), {"fmt": "int4", "block_size": 32}),
        ((4, 64), {"fmt": "mxfp8_e4m3"}),
        ((4, 64), {"fmt": Format.floating("other", 2, 1, bias=2)}),
    ],
)
def test_weights_that_these_layouts_do_not_hold(shape, fields):
    weight = quantize(normal(*shape), **({"fmt": "mxfp4"} | fields))
    for export in (to_gpt_oss, to_deepseek):
        with pytest.raises(
            ConfigError, match=r"weight: got .*, expected mxfp4 in whole blocks of 32 along the last axis"
        ):
            export(weight)


def test_the_last_axis_by_its_number():
    w = normal(4, 64)
    assert torch.equal(to_gpt_oss(quantize(w, "mxfp4", axis=1))[0], to_gpt_oss(quantize(w, "mxfp4"))[0])
