"""Which tensor of a training step has which format: one frozen description, read by every module that quantises.

A linear layer Y = X W^T with gradient G = dL/dY computes three products, and blocks always run along the axis that a
product sums over, so that X, W and G are each quantised twice, from the high-precision tensor:

    Y  = q(X; a_fwd, K) q(W; w_fwd, K)^T        X (M, K), W (N, K), G (M, N); M: tokens
    dX = q(G; g_dx, N)  q(W; w_bwd, N)
    dW = q(G; g_dw, M)^T q(X; a_bwd, M)         the bias's gradient, sum of G over M, is never blocked

What is no product (linear outputs, biases, norms, activations) is rounded element by element to `vector`. Master
weights, optimizer states and updates stay as they are. Sources: arXiv 2506.20752 and its code; microxcaling; NVFP4's
recipe: arXiv 2509.25149; `rceil`: arXiv 2506.08027.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError

from effml_quant.formats import Format, find_format, formats
from effml_quant.precision.microxcaling import is_microxcaling, translate
from effml_quant.quantizer import SCALE_RULES, Quantizer
from effml_quant.rounding import ROUNDINGS

__all__ = ["ROLES", "SAME", "FormatName", "PrecisionScheme"]

FormatName = str | Format | None
"""A name or alias in `formats`, a `Format`, None (not quantised) or, where a field allows it, `"same"`."""

SAME = "same"
_FOLLOWS = {"w_bwd": "w_fwd", "a_bwd": "a_fwd", "g_dw": "a_fwd", "g_dx": "a_fwd", "activation": "vector"}
_AXES = {"w_bwd": -2, "a_bwd": -2, "g_dw": -2}  # the others: -1
_GRADIENTS = ("g_dw", "g_dx")
_PRODUCTS = ("w_fwd", "a_fwd", "w_bwd", "a_bwd", *_GRADIENTS, "attention")  # the others are element-wise

ROLES = (
    *("w_fwd", "a_fwd", "w_bwd", "a_bwd", "g_dw", "g_dx"),
    *("vector", "norm_affine", "activation", "softmax", "residual", "attention"),
)
"""The fields of a scheme that hold formats."""


@dataclass(frozen=True)
class PrecisionScheme:
    """Formats of a model's tensors, and how they are quantised. Hashable data; `replace(...)` makes a variant.

    Attributes:
        w_fwd, a_fwd: weight and input in the forward product.
        w_bwd, a_bwd: the same two in the backward products. `"same"`: as `w_fwd`, as `a_fwd`.
        g_dw, g_dx: gradient of the output in the product for the weight and for the input. `"same"`: as `a_fwd`.
        vector: an element-wise format for a linear layer's input, weight and bias before, its output and gradients
            after the product. None: no such rounding.
        norm_affine: gains and biases of norms, blocks along the features; the norm's input and output are then rounded
            to `vector`. Their gradients pass straight through. None: norms stay as they are.
        activation: outputs of activation functions. `"same"`: as `vector`.
        softmax: attention probabilities. residual: sums on the residual stream.
        attention: operands of the products Q K^T and P V.
        quantize_backward: False: every backward product takes the original tensors and nothing in it is rounded.
        scale_rule, rounding: of `Quantizer`. `vector` knows nearest only: ties as in `rounding`, else to even.
        gradient_rounding: of G. None: as `rounding`.
        block_size: elements per block. None: the format's own.
        dw_axis: where the blocks of the product for the weight run: `"tokens"`, all leading axes flattened, or
            `"sequence"`, axis -2 of each sample by itself, as in microxcaling.
        weight_tile: side of square blocks of the weight, so that W and W^T are quantised alike. None: no tiles.
        hadamard: rotate both operands of the product for the weight by a randomised Hadamard matrix of 16 tokens.
        recipe: of NVFP4: `"te"` or `"torchao"`.
        exempt: globs on the names of linear layers and norms; these keep their precision, whatever the rest says.

    Raises:
        ConfigError: a field is unknown, or two contradict each other.

    >>> PrecisionScheme(w_fwd="fp8_e4m3", a_fwd="bf16").format("g_dw").name
    'bfloat16'
    """

    w_fwd: FormatName = "mxfp8_e4m3"
    a_fwd: FormatName = "mxfp8_e4m3"
    w_bwd: FormatName = SAME
    a_bwd: FormatName = SAME
    g_dw: FormatName = SAME
    g_dx: FormatName = SAME
    vector: FormatName = "bfloat16"
    norm_affine: FormatName = None
    activation: FormatName = SAME
    softmax: FormatName = None
    residual: FormatName = None
    attention: FormatName = None
    quantize_backward: bool = True
    scale_rule: str = "floor"
    rounding: str = "rne"
    gradient_rounding: str | None = None
    block_size: int | None = None
    dw_axis: str = "tokens"
    weight_tile: int | None = None
    hadamard: bool = False
    recipe: str | None = None
    exempt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for role in ROLES:
            object.__setattr__(self, role, _canonical(role, getattr(self, role)))
        if not _is_list_of_names(self.exempt):
            raise ConfigError(f"exempt: got {self.exempt!r}, expected a list of globs such as ['lm_head']")
        object.__setattr__(self, "exempt", tuple(self.exempt))
        check_choice("scale_rule", self.scale_rule, SCALE_RULES)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("gradient_rounding", self.gradient_rounding, (None, *ROUNDINGS))
        check_choice("dw_axis", self.dw_axis, ("tokens", "sequence"))
        check_choice("recipe", self.recipe, (None, "te", "torchao"))
        for name in ("quantize_backward", "hadamard"):
            check_choice(name, getattr(self, name), (True, False))
        for name in ("block_size", "weight_tile"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        vector = self.format("vector")
        if vector is not None and vector.scale != "none":
            raise ConfigError(f"vector: got {vector.name}, expected a format without blocks such as 'bfloat16' or None")
        object.__setattr__(self, "_quantizers", self._make_quantizers())

    def _make_quantizers(self) -> dict[tuple[str, int, bool], Quantizer | None]:
        """Make every quantiser once: combinations are checked here, and a training step only looks them up."""
        keys = [(role, _AXES.get(role, -1), role in _GRADIENTS) for role in ROLES]
        keys += [("attention", axis, gradient) for axis in (-1, -2) for gradient in (False, True)]
        return {key: self._make_quantizer(*key) for key in keys}

    def _make_quantizer(self, role: str, axis: int, gradient: bool) -> Quantizer | None:
        fmt = self.format(role)
        if fmt is None:
            return None
        rounding = self.gradient_rounding or self.rounding if gradient else self.rounding
        if role not in _PRODUCTS and fmt.scale == "none":
            rounding = "away" if self.rounding == "away" else "rne"
        tile = self.weight_tile if role in ("w_fwd", "w_bwd") else None
        block: int | tuple[int, int] | None = self.block_size if tile is None else (tile, tile)
        fields: dict[str, Any] = {} if fmt.scale == "none" else {"block_size": block, "scale_rule": self.scale_rule}
        if fmt.scale == "e4m3":
            fields["recipe"] = self.recipe
        try:
            return Quantizer(fmt, axis=axis, rounding=rounding, **fields)
        except ConfigError as error:
            raise ConfigError(f"{role}: {error}") from None

    def format(self, role: str) -> Format | None:
        """Return the format of a role, `"same"` resolved; None: not quantised.

        Raises:
            ConfigError: there is no such role.
        """
        check_choice("role", role, ROLES)
        name = getattr(self, role)
        if name == SAME:
            return self.format(_FOLLOWS[role])
        return None if name is None else find_format(name)

    def quantizer(self, role: str, *, axis: int | None = None, gradient: bool | None = None) -> Quantizer | None:
        """Return the quantiser of a role with its axis, or None: not quantised.

        Args:
            role: one of `ROLES`.
            axis, gradient: of an operand of `attention`, by default -1 and no gradient; the other roles imply theirs:
                -1 or, for `w_bwd`, `a_bwd` and `g_dw`, -2.
        """
        axis = _AXES.get(role, -1) if axis is None else axis
        key = (role, axis, role in _GRADIENTS if gradient is None else gradient)
        made: dict[tuple[str, int, bool], Quantizer | None] = self._quantizers  # type: ignore[attr-defined]
        if key not in made:
            check_choice("role", role, ROLES)
            raise ConfigError(f"quantizer: got axis={axis}, gradient={gradient} for {role}, expected its own")
        return made[key]

    def exempts(self, name: str) -> bool:
        """Say whether a module of this dotted name keeps its precision."""
        return any(fnmatchcase(name, glob) for glob in self.exempt)

    def replace(self, **fields: Any) -> PrecisionScheme:
        """Return a variant.

        Raises:
            ConfigError: a field is unknown or its value is refused.
        """
        _check_names(fields)
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that YAML, JSON and OmegaConf hold; `from_dict` reads them.

        Raises:
            ConfigError: a format is not one of `formats`, so that its name would not find it.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for role in ROLES:
            if isinstance(values[role], Format):
                raise ConfigError(f"{role}: got {values[role].name}, expected a format that has a name in `formats`")
        return {**values, "exempt": list(self.exempt)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrecisionScheme:
        """Make a scheme from fields, or from the keys of microxcaling (`w_elem_format`, `bfloat`, `round`, ...).

        With microxcaling's keys its defaults hold: no format means none, ties go away from zero, norms are rounded
        with `vector`, blocks for the weight's gradient run along each sequence.

        Raises:
            ConfigError: a key is unknown, or asks for what is not there.
        """
        plain = {str(key): value for key, value in values.items()}
        if is_microxcaling(plain):
            plain = translate(plain)
        _check_names(plain)
        return cls(**plain)

    @classmethod
    def mx(cls, fmt: FormatName = "mxfp8_e4m3", **fields: Any) -> PrecisionScheme:
        """Return: weights, activations and gradients in one format."""
        return cls(w_fwd=fmt, a_fwd=fmt).replace(**fields)

    @classmethod
    def mx_mix(cls, **fields: Any) -> PrecisionScheme:
        """Return: E4M3 in the forward product, E5M2 in the backward ones."""
        e5m2 = "mxfp8_e5m2"
        return cls(w_bwd=e5m2, a_bwd=e5m2, g_dw=e5m2, g_dx=e5m2).replace(**fields)

    @classmethod
    def bf16_act_all(cls, weight: FormatName = "mxfp8_e4m3", **fields: Any) -> PrecisionScheme:
        """Return: weights in a format, activations and gradients in bfloat16, which arXiv 2506.20752 finds stable."""
        return cls(w_fwd=weight, a_fwd="bfloat16").replace(**fields)

    @classmethod
    def bf16_act(cls, weight: FormatName = "mxfp8_e4m3", **fields: Any) -> PrecisionScheme:
        """Return: activations in bfloat16, weights and gradients in a format."""
        return cls(w_fwd=weight, a_fwd="bfloat16", g_dw=weight, g_dx=weight).replace(**fields)

    @classmethod
    def forward_only(cls, fmt: FormatName = "mxfp8_e4m3", **fields: Any) -> PrecisionScheme:
        """Return: one format in the forward product, nothing quantised in the backward ones."""
        return cls(w_fwd=fmt, a_fwd=fmt, quantize_backward=False).replace(**fields)

    @classmethod
    def nvfp4_training(cls, **fields: Any) -> PrecisionScheme:
        """Return the recipe of arXiv 2509.25149: 2-D weight blocks, rotated and stochastically rounded gradients.

        The recipe also keeps some of the last layers in bfloat16: name them in `exempt`, which holds the head only.
        """
        recipe = cls(
            w_fwd="nvfp4",
            a_fwd="nvfp4",
            gradient_rounding="stochastic",
            weight_tile=16,
            hadamard=True,
            recipe="te",
            exempt=("*lm_head",),
        )
        return recipe.replace(**fields)

    @classmethod
    def recommended(cls, **fields: Any) -> PrecisionScheme:
        """Return: E4M3 everywhere under scales that saturate nothing, norms untouched (arXiv 2506.08027)."""
        return cls(scale_rule="rceil").replace(**fields)


def _canonical(role: str, name: Any) -> FormatName:
    """Return a standard format's own name, so that schemes that mean the same are equal."""
    if name is None or (name == SAME and role in _FOLLOWS):
        return cast(FormatName, name)
    try:
        fmt = find_format(name)
    except ConfigError as error:
        raise ConfigError(f"{role}: {str(error).removeprefix('format: ')}") from None
    return fmt.name if formats.get(fmt.name) == fmt else fmt


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(glob, str) for glob in value)


def _check_names(fields: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(PrecisionScheme)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(f"scheme: got an unknown field {name!r}, did you mean {near[0]!r}?")
