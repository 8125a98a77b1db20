"""Read the specification of microsoft/microxcaling: the fields of a `PrecisionScheme` from its keys and conventions.

Its values keep their meaning there: what is not given is off, `round="nearest"` sends ties away from zero, `bfloat=16`
rounds every vector operation, norms included, and blocks of the weight's gradient run along each sample's sequence.
Fused attention is not touched there, and so not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError

__all__ = ["is_microxcaling", "translate"]

_FORMATS = {
    "w_elem_format": "w_fwd",
    "a_elem_format": "a_fwd",
    "w_elem_format_bp": "w_bwd",
    "a_elem_format_bp": "a_bwd",
    "a_elem_format_bp_ex": "g_dw",
    "a_elem_format_bp_os": "g_dx",
}
_ROUNDINGS = {"nearest": "away", "even": "rne", "floor": "toward_zero"}
_INERT = ("custom_cuda", "bfloat_subnorms", "softmax_exp2", "vec_use_exp2", "vec_use_recip")  # how, not what
_VALUES: dict[str, tuple[Any, ...]] = {  # what is there, of what could be asked for
    "scale_bits": (8, 0),
    "fp": (0,),
    "bfloat": (16, 0, 32),
    "shared_exp_method": ("max",),
    "mx_flush_fp32_subnorms": (False,),
    "quantize_backprop": (True, False),
}
_KEYS = (*_FORMATS, *_VALUES, *_INERT, "block_size", "round")
_OURS = ("block_size",)


def is_microxcaling(values: Mapping[str, Any]) -> bool:
    """Say whether a mapping has a key that is microxcaling's alone."""
    return any((key in _KEYS or key.startswith("round_")) and key not in _OURS for key in values)


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a microxcaling specification means.

    Raises:
        ConfigError: a key is unknown, or its value is nothing that is emulated here.

    >>> found = translate({"w_elem_format": "fp6_e3m2", "bfloat": 16, "block_size": 32})
    >>> found["w_fwd"], found["a_fwd"], found["vector"], found["rounding"]
    ('fp6_e3m2', None, 'bfloat16', 'away')
    """
    for key, value in values.items():
        if key in _VALUES:
            check_choice(key, value, _VALUES[key])
        elif key.startswith("round_"):
            check_choice(key, value, (None, values.get("round", "nearest")))
        elif key not in _KEYS:
            raise ConfigError(f"scheme: got {key!r} among microxcaling's keys, expected these only: {', '.join(_KEYS)}")
    rounding = values.get("round", "nearest")
    check_choice("round", rounding, _ROUNDINGS)
    vector = "bfloat16" if values.get("bfloat", 0) == 16 else None
    fields = {field: _format(key, values[key]) for key, field in _FORMATS.items() if values.get(key) is not None}
    return {
        "w_fwd": None,
        "a_fwd": None,
        **fields,
        "vector": vector,
        "norm_affine": vector,
        "quantize_backward": bool(values.get("quantize_backprop", True)),
        "rounding": _ROUNDINGS[rounding],
        "block_size": values.get("block_size") or None,
        "dw_axis": "sequence",
    }


def _format(key: str, name: Any) -> Any:
    """Return the name here of a format there, where integers share a power-of-two scale; other names are the same."""
    if str(name).startswith("int"):
        check_choice(key, name, ("int8",))
        return "mxint8"
    return name
