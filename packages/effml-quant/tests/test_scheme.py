import copy
import pickle

import pytest
from effml_quant.formats import Format, find_format, formats
from effml_quant.precision.scheme import ROLES, PrecisionScheme
from effml_quant.quantizer import Quantizer
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

GEMM = ("w_fwd", "a_fwd", "w_bwd", "a_bwd", "g_dw", "g_dx")


def names(scheme):
    found = [scheme.format(role) for role in GEMM]
    return [fmt and fmt.name.removeprefix("mxfp8_").removeprefix("mxfp6_") for fmt in found]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (PrecisionScheme(), ["e4m3"] * 6),
        (PrecisionScheme.mx("fp6_e2m3"), ["e2m3"] * 6),
        (PrecisionScheme.mx_mix(), ["e4m3", "e4m3", "e5m2", "e5m2", "e5m2", "e5m2"]),
        (PrecisionScheme.bf16_act_all("fp8_e4m3"), ["e4m3", "bfloat16", "e4m3", "bfloat16", "bfloat16", "bfloat16"]),
        (PrecisionScheme.bf16_act("fp8_e4m3"), ["e4m3", "bfloat16", "e4m3", "bfloat16", "e4m3", "e4m3"]),
        (PrecisionScheme.forward_only("fp8_e5m2"), ["e5m2"] * 6),
        (PrecisionScheme.recommended(), ["e4m3"] * 6),
        (
            PrecisionScheme(w_fwd=None, a_fwd="bf16", g_dx="mxfp4"),
            [None, "bfloat16", None, "bfloat16", "bfloat16", "mxfp4"],
        ),
    ],
)
def test_formats_of_the_six_operands(scheme, expected):
    assert names(scheme) == expected


def test_blocks_run_along_the_axis_that_is_summed_over():
    scheme = PrecisionScheme(gradient_rounding="stochastic", scale_rule="rceil", block_size=16)
    found = {role: scheme.quantizer(role) for role in GEMM}
    assert {role: q.axis for role, q in found.items()} == dict(zip(GEMM, (-1, -1, -2, -2, -2, -1), strict=True))
    assert {role for role, q in found.items() if q.rounding == "stochastic"} == {"g_dw", "g_dx"}
    assert {(q.block, q.scale_rule) for q in found.values()} == {(16, "rceil")}
    operands = [scheme.replace(attention="mxfp4").quantizer("attention", axis=axis) for axis in (-1, -2)]
    assert [(q.axis, q.format.name, q.rounding) for q in operands] == [(-1, "mxfp4", "rne"), (-2, "mxfp4", "rne")]
    assert scheme.replace(attention="mxfp4").quantizer("attention", gradient=True).rounding == "stochastic"


def test_element_wise_rounding_knows_nearest_only():
    for rounding, expected in (("rne", "rne"), ("away", "away"), ("stochastic", "rne"), ("toward_zero", "rne")):
        scheme = PrecisionScheme(rounding=rounding, a_fwd="bfloat16", block_size=16)
        assert scheme.quantizer("vector") == Quantizer("bfloat16", rounding=expected)
        assert scheme.quantizer("activation") == scheme.quantizer("vector")
        assert scheme.quantizer("a_fwd").rounding == rounding


def test_tiles_are_the_weights_alone():
    scheme = PrecisionScheme.nvfp4_training()
    assert scheme.quantizer("w_fwd").block == scheme.quantizer("w_bwd").block == (16, 16)
    assert scheme.quantizer("a_bwd").block == scheme.quantizer("g_dx").block == 16
    assert (scheme.hadamard, scheme.gradient_rounding, scheme.exempts("model.lm_head")) == (True, "stochastic", True)


def test_names_mean_formats_so_that_equal_schemes_are_equal():
    assert PrecisionScheme.mx("fp8_e4m3") == PrecisionScheme.mx(formats["mxfp8_e4m3"]) == PrecisionScheme()
    assert hash(PrecisionScheme(vector="bf16")) == hash(PrecisionScheme())
    own = Format.floating("e3m4", 3, 4)
    assert PrecisionScheme.mx(own).format("g_dx") is own
    assert PrecisionScheme(exempt=["a", "b.*"]).exempt == ("a", "b.*")


def test_a_scheme_survives_copies():
    scheme = PrecisionScheme.nvfp4_training(residual="bfloat16")
    for other in (copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme)), scheme.replace()):
        assert other == scheme
        assert other.quantizer("g_dw") == scheme.quantizer("g_dw")


some_format = st.sampled_from([None, "bfloat16", "mxfp4", "mxfp6_e3m2", "mxfp8_e5m2", "mxint8"])
schemes = st.builds(
    PrecisionScheme,
    **{role: some_format for role in ROLES if role != "vector"},
    vector=st.sampled_from([None, "bfloat16"]),
    quantize_backward=st.booleans(),
    scale_rule=st.sampled_from(["floor", "rceil", "even"]),
    rounding=st.sampled_from(["rne", "away"]),
    gradient_rounding=st.sampled_from([None, "stochastic"]),
    block_size=st.sampled_from([None, 16]),
    weight_tile=st.sampled_from([None, 32]),
    exempt=st.lists(st.sampled_from(["head", "layers.0.*"])),
)


@settings(max_examples=30, deadline=None)
@given(schemes)
def test_plain_values_round_trip(scheme):
    from omegaconf import OmegaConf

    config = OmegaConf.create({"scheme": scheme.to_dict()})
    assert PrecisionScheme.from_dict(OmegaConf.create(OmegaConf.to_yaml(config)).scheme) == scheme
    for role in ROLES:
        assert (scheme.quantizer(role) is None) == (getattr(scheme, role) is None)


def test_exempt_globs_match_whole_names():
    scheme = PrecisionScheme(exempt=("lm_head", "*.layers.0.*"))
    found = {
        name: scheme.exempts(name) for name in ("lm_head", "model.lm_head", "model.layers.0.mlp", "model.layers.10.mlp")
    }
    assert list(found.values()) == [True, False, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"w_fwd": "mxfp5"}, r"w_fwd: got 'mxfp5', did you mean 'mxfp4'\?"),
        ({"a_fwd": 8}, r"a_fwd: got 8"),
        ({"w_fwd": "same"}, r"w_fwd: got 'same'"),
        ({"vector": "mxfp4"}, r"vector: got mxfp4, expected a format without blocks"),
        ({"rounding": "nearest"}, r"rounding: got 'nearest', expected one of 'rne', 'away'"),
        ({"gradient_rounding": "up"}, r"gradient_rounding: got 'up'"),
        ({"scale_rule": "round"}, r"scale_rule: got 'round'"),
        ({"dw_axis": "batch"}, r"dw_axis: got 'batch', expected one of 'tokens', 'sequence'"),
        ({"block_size": 0}, r"block_size: got 0, expected an integer of at least 1"),
        ({"weight_tile": 2.5}, r"weight_tile: got 2.5"),
        ({"quantize_backward": "no"}, r"quantize_backward: got 'no'"),
        ({"exempt": "lm_head"}, r"exempt: got 'lm_head', expected a list of globs"),
        ({"w_fwd": "nvfp4", "block_size": 32}, r"w_fwd: block_size: got 32, expected 16"),
        ({"recipe": "nvidia"}, r"recipe: got 'nvidia'"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        PrecisionScheme(**fields)
    with pytest.raises(ConfigError, match=message):
        PrecisionScheme.from_dict(fields)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"unknown field 'w_fw', did you mean 'w_fwd'\?"):
        PrecisionScheme().replace(w_fw="mxfp4")
    with pytest.raises(ConfigError, match=r"unknown field 'activatio'"):
        PrecisionScheme.from_dict({"activatio": None})
    with pytest.raises(ConfigError, match=r"role: got 'weights'"):
        PrecisionScheme().quantizer("weights")
    with pytest.raises(ConfigError, match=r"role: got 'weights'"):
        PrecisionScheme().format("weights")
    with pytest.raises(ConfigError, match=r"got axis=-1, gradient=None for g_dw"):
        PrecisionScheme().quantizer("g_dw", axis=-1)
    with pytest.raises(ConfigError, match=r"w_fwd: got e3m4, expected a format that has a name"):
        PrecisionScheme(w_fwd=Format.floating("e3m4", 3, 4)).to_dict()
    assert find_format("mxfp4") is PrecisionScheme.mx("mxfp4").format("w_bwd")
