"""One frozen description of a quantiser, which formats, precision schemes, LOTION and every baseline share."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

from effml_shared.errors import ConfigError

from effml_quant.blocks import Block
from effml_quant.formats import Format, find_format
from effml_quant.rounding import ROUNDINGS

__all__ = ["SCALE_RULES", "Quantizer"]

SCALE_RULES = ("floor", "rceil", "ceil", "even", "bump")
_FORMAT = tuple(field.name for field in dataclasses.fields(Format))
_RECIPES = {"e4m3": ("te", "torchao"), "float32": ("symmetric", "torchao", "asymmetric")}


@dataclass(frozen=True)
class Quantizer:
    """How a tensor is quantised. Hashable; `replace(...)` makes a variant; calling nothing, it is only data.

    Args:
        format: a name of `formats`, or a `Format`.
        axis: along which blocks run. Unused by tiles, `"channel"` and `"tensor"`.
        block_size: elements per block, or (rows, columns) of a tile over the last two axes. None: the format's own.
        granularity: in place of `block_size`: `"tensor"`, `"channel"` (one scale per index of the first axis) or
            `("group", g)`, the same as `block_size=g`.
        scale_rule: exponent of a power-of-two scale, from the block's largest magnitude a, fl(a) = floor(log2 a):
            `"floor"`: fl(a) - emax (the standard's; what lies above the largest value saturates); `"rceil"`: the least
            that lets nothing saturate; `"ceil"`: ceil(log2 a) - emax; `"even"`: floor of a rounded to the element's
            mantissa; `"bump"`: another name of `"rceil"`.
        scale: `"format"`, or `"continuous"`: a real-valued scale a / max in its place, as LOTION needs in training.
        rounding: see `effml_quant.rounding.round_magnitude`. `"stochastic"` is unbiased only if nothing saturates.
        nonfinite: what a NaN or infinity does: `"nan_block"` makes its whole block NaN, `"raise"` is an error.
        recipe: NVFP4: `"te"` (TransformerEngine) or `"torchao"`; integers and other real-valued scales: `"symmetric"`
            (a / max), and for integers `"torchao"` (2a over all codes, the most negative included) or `"asymmetric"`
            (zero point). None: the first.

    Attributes:
        scale_kind: `"e8m0"`, `"e4m3"`, `"float32"` or `"none"`: what scales this quantiser really makes.
        block: what `Blocks.cut` takes.
        spec: the quantiser as a literal of plain tuples, which `from_spec` reads: what a compiled graph can hold.

    Raises:
        ConfigError: a value is unknown, or two contradict each other.
    """

    format: Format
    axis: int = -1
    block_size: int | tuple[int, int] | None = None
    granularity: str | tuple[str, int] | None = None
    scale_rule: str = "floor"
    scale: str = "format"
    rounding: str = "rne"
    nonfinite: str = "nan_block"
    recipe: str | None = None
    scale_kind: ClassVar[str]
    block: ClassVar[Block]
    spec: ClassVar[str]

    def __init__(self, format: str | Format, *args: Any, **fields: Any) -> None:
        """Coerce names and lists to what the fields hold."""
        names = ("axis", "block_size", "granularity", "scale_rule", "scale", "rounding", "nonfinite", "recipe")
        given = dict(zip(names, args, strict=False)) | fields
        if unknown := set(given) - set(names):
            raise ConfigError(f"quantizer: got an unknown field {min(unknown)!r}, expected {', '.join(names)}")
        if len(args) > len(names):
            raise ConfigError(f"quantizer: got {len(args) + 1} values, expected at most {len(names) + 1}")
        object.__setattr__(self, "format", find_format(format))
        for name in names:
            value = given.get(name, getattr(type(self), name))
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        # Derived here once: a training step asks for them at every cast.
        real = self.scale == "continuous" and self.format.scale != "none"
        object.__setattr__(self, "scale_kind", "float32" if real else self.format.scale)
        object.__setattr__(self, "block", self._block())
        of_format = tuple(getattr(self.format, name) for name in _FORMAT)
        object.__setattr__(self, "spec", repr((of_format, *(getattr(self, name) for name in names))))
        self._check()

    def _check(self) -> None:
        fmt = self.format
        choices: list[tuple[str, Any, Sequence[Any]]] = [
            ("scale_rule", self.scale_rule, SCALE_RULES),
            ("scale", self.scale, ("format", "continuous")),
            ("rounding", self.rounding, ROUNDINGS),
            ("nonfinite", self.nonfinite, ("nan_block", "raise")),
        ]
        kind = self.scale_kind
        if self.recipe is not None:
            recipes = _RECIPES.get(kind, ())[: None if fmt.is_integer or kind == "e4m3" else 1]
            choices.append(("recipe", self.recipe, recipes))
        for name, value, allowed in choices:
            if value not in allowed:
                what = ", ".join(map(repr, allowed)) or f"None for {fmt.name}"
                raise ConfigError(f"{name}: got {value!r}, expected {what}")
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            raise ConfigError(f"axis: got {self.axis!r}, expected an integer")
        if self.block_size is not None and self.granularity is not None:
            raise ConfigError(f"block_size, granularity: got {self.block_size}, {self.granularity}, expected one")
        block = self.block
        sizes = block if isinstance(block, tuple) else (block,)
        if self.granularity is not None and self.granularity not in ("tensor", "channel", ("group", block)):
            raise ConfigError(f"granularity: got {self.granularity!r}, expected 'tensor', 'channel' or ('group', size)")
        if isinstance(block, str):
            if self.block_size is not None:
                raise ConfigError(f"block_size: got {block!r}, expected an integer >= 1 or a tile of two")
        elif (isinstance(block, tuple) and len(block) != 2) or any(type(n) is not int or n < 1 for n in sizes):
            raise ConfigError(f"block_size: got {block!r}, expected an integer >= 1 or a tile of two")
        if kind == "e4m3" and block not in (16, (16, 16)):
            raise ConfigError(f"block_size: got {block!r}, expected 16 or (16, 16) for {fmt.name}")

    def _block(self) -> Block:
        if isinstance(self.granularity, tuple):
            if len(self.granularity) != 2 or self.granularity[0] != "group":
                raise ConfigError(f"granularity: got {self.granularity!r}, expected ('group', size)")
            return self.granularity[1]
        given = (self.granularity, self.block_size, self.format.block, "tensor")
        return next(block for block in given if block is not None)

    @staticmethod
    @cache
    def from_spec(spec: str) -> Quantizer:
        """Return the quantiser of a `spec`."""
        fmt, *fields = ast.literal_eval(spec)
        return Quantizer(Format(*fmt), *fields)

    def replace(self, **fields: Any) -> Quantizer:
        """Return a variant."""
        return replace(self, **fields)

    @classmethod
    def make(cls, spec: str | Format | Quantizer, **fields: Any) -> Quantizer:
        """Return the quantiser of a name, a format or another quantiser, with fields set."""
        if isinstance(spec, Quantizer):
            return spec.replace(**fields) if fields else spec
        return cls(spec, **fields)
