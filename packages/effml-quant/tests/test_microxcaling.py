import pytest
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared.errors import ConfigError

OFFICIAL = {
    "scale_bits": 8,
    "w_elem_format": "fp8_e4m3",
    "a_elem_format": "fp8_e4m3",
    "w_elem_format_bp": "fp8_e5m2",
    "a_elem_format_bp": "fp6_e3m2",
    "a_elem_format_bp_ex": "fp6_e2m3",
    "a_elem_format_bp_os": "fp4_e2m1",
    "block_size": 32,
    "bfloat": 16,
    "round": "nearest",
    "round_weight": None,
    "custom_cuda": True,
    "quantize_backprop": True,
}


def test_a_full_specification_is_read():
    scheme = PrecisionScheme.from_dict(OFFICIAL)
    roles = ("w_fwd", "a_fwd", "w_bwd", "a_bwd", "g_dw", "g_dx")
    expected = ("mxfp8_e4m3", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4")
    assert tuple(scheme.format(role).name for role in roles) == expected
    assert (scheme.vector, scheme.norm_affine, scheme.rounding) == ("bfloat16", "bfloat16", "away")
    assert (scheme.block_size, scheme.dw_axis, scheme.quantize_backward) == (32, "sequence", True)


def test_what_is_not_said_is_off():
    scheme = PrecisionScheme.from_dict({"w_elem_format": "int8", "round": "even", "quantize_backprop": False})
    assert (scheme.format("w_bwd").name, scheme.a_fwd, scheme.vector, scheme.norm_affine) == (
        "mxint8",
        None,
        None,
        None,
    )
    assert (scheme.rounding, scheme.quantize_backward) == ("rne", False)
    assert scheme.format("g_dw") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bfloat": 12}, r"bfloat: got 12, expected one of 16, 0, 32"),
        ({"scale_bits": 4}, r"scale_bits: got 4"),
        ({"shared_exp_method": "none"}, r"shared_exp_method: got 'none'"),
        ({"round": "dither"}, r"round: got 'dither', expected one of 'nearest', 'even', 'floor'"),
        ({"round": "even", "round_output": "nearest"}, r"round_output: got 'nearest', expected one of None, 'even'"),
        ({"w_elem_format": "fp5"}, r"w_fwd: got 'fp5'"),
        ({"w_elem_format": None, "scale_rule": "rceil"}, r"got 'scale_rule' among microxcaling's keys"),
    ],
)
def test_what_is_not_emulated_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PrecisionScheme.from_dict(fields)
