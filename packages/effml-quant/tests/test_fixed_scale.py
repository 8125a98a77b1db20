import pytest
import torch
from effml_quant import Quantizer, fake_quantize
from effml_quant.qat.fixed_scale import block_maxima, cast_rows, check_fixable
from effml_quant.scales import tensor_scale
from effml_shared.errors import ConfigError

QUANTIZERS = [
    Quantizer("int4", granularity="channel"),
    Quantizer("int4", granularity="tensor"),
    Quantizer("int3", granularity=("group", 5), recipe="torchao"),
    Quantizer("fp4", granularity="channel"),
    Quantizer("mxfp4"),
    Quantizer("mxfp4", scale_rule="rceil", axis=0),
    Quantizer("nvfp4"),
    Quantizer("nvfp4", block_size=(16, 16)),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_column_cast_alone_is_the_cast_of_the_whole(quantizer, dtype):
    w = torch.randn(20, 37, dtype=dtype, generator=torch.Generator().manual_seed(0))
    amax = block_maxima(w, quantizer)
    total = tensor_scale(w.abs().max(), quantizer) if quantizer.format.name == "nvfp4" else None
    columns = [cast_rows(w[:, [j]], amax[:, [j]], quantizer, total) for j in range(37)]
    assert torch.equal(torch.cat(columns, 1), fake_quantize(w, quantizer))


def test_what_lies_beyond_saturates_and_zero_blocks_stay_zero():
    x = torch.tensor([[5.0, -5.0, 0.31], [0.0, 0.0, 0.0]])
    cast = cast_rows(x, torch.tensor([[0.7], [0.0]]), Quantizer("int4"))
    torch.testing.assert_close(cast, torch.tensor([[0.7, -0.7, 0.3], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("quantizer", [Quantizer("int4", recipe="asymmetric"), Quantizer("bfloat16")], ids=str)
def test_scales_that_need_more_than_the_largest_magnitude_are_refused(quantizer):
    with pytest.raises(ConfigError, match=r"quantizer: got '(asymmetric|bfloat16)'"):
        check_fixable(quantizer)
