"""Number formats: what an element can hold, what its block's scale can hold, and how they are named.

An element is a small float (sign, exponent field E, mantissa field M) or a signed integer; its block shares a scale:

    float    E = 0: M / 2^m 2^(1 - bias);  else (1 + M / 2^m) 2^(E - bias)       integer    code x step

For rounding both are one thing: in the binade of |z| = 2^e .. 2^(e+1) values are 2^(max(e, emin) - m) apart, and an
integer of b bits with step 1 is the float with m = b - 2 whose only binade is emin = emax = b - 2.

Sources: OCP Microscaling Formats v1.0 (2023); arXiv 2310.10537; NVFP4: arXiv 2509.25149; E4M3, E5M2: arXiv 2209.05433.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from effml_shared.errors import ConfigError

__all__ = ["Format", "find_format", "formats"]


@dataclass(frozen=True)
class Format:
    """One element format and the scale that goes with it.

    Make new ones with `Format.floating` and `Format.integer`; those of the standards are in `formats`.

    Attributes:
        name: as in `formats`.
        elem_bits, exp_bits, man_bits: bits of a code; of its exponent (0: an integer); of its mantissa.
        bias: of the exponent field.
        emin, emax: exponents of the smallest and largest normal value.
        max: largest value that is quantised to.
        lowest: most negative one.
        has_inf, has_nan: whether codes for these exist. Quantising never makes them of finite numbers.
        scale: of a block: `"e8m0"` (a power of two), `"e4m3"` (with one float32 per tensor), `"float32"` (the block's
            largest magnitude over `max`) or `"none"`.
        block: elements that share a scale by default; None: the whole tensor.
    """

    name: str
    elem_bits: int
    exp_bits: int
    man_bits: int
    bias: int
    emin: int
    emax: int
    max: float
    lowest: float
    has_inf: bool
    has_nan: bool
    scale: str
    block: int | None

    def __post_init__(self) -> None:
        if self.scale not in ("e8m0", "e4m3", "float32", "none"):
            raise ConfigError(f"scale: got {self.scale!r}, expected 'e8m0', 'e4m3', 'float32' or 'none'")
        if not 2 <= self.elem_bits <= 16:
            raise ConfigError(f"elem_bits: got {self.elem_bits}, expected 2 to 16")
        if not 0 < self.max < math.inf or not -2 * self.max < self.lowest < 0:
            raise ConfigError(f"max, lowest: got {self.max}, {self.lowest}, expected finite values of about equal size")
        if self.emin < -126 or self.emax > 127:
            raise ConfigError(f"{self.name}: got exponents {self.emin} to {self.emax}, expected float32's, -126 to 127")
        if self.scale == "e4m3" and (self.exp_bits, self.man_bits, self.max) != (2, 1, 6.0):
            raise ConfigError(f"scale: got 'e4m3' for {self.name}, expected elements of nvfp4 (E2M1)")

    @classmethod
    def floating(
        cls,
        name: str,
        exp_bits: int,
        man_bits: int,
        *,
        specials: str = "none",
        bias: int | None = None,
        scale: str = "e8m0",
        block: int | None = 32,
    ) -> Format:
        """Make a float format of 1 + exp_bits + man_bits bits.

        Args:
            specials: `"none"`: every code is a number; `"nan"`: all ones is NaN, as in E4M3; `"ieee"`: the last
                exponent holds infinities and NaN, as in E5M2.
            bias: None: 2^(exp_bits - 1) - 1.
        """
        if not 1 <= exp_bits <= 8 or not 0 <= man_bits <= 10:
            raise ConfigError(f"{name}: got {exp_bits} exponent and {man_bits} mantissa bits, expected 1-8 and 0-10")
        if specials not in ("none", "nan", "ieee"):
            raise ConfigError(f"specials: got {specials!r}, expected 'none', 'nan' or 'ieee'")
        bias = 2 ** (exp_bits - 1) - 1 if bias is None else bias
        top = 2**man_bits - 1 - (specials == "nan")  # the largest mantissa field of the last binade
        emax = 2**exp_bits - 1 - bias - (specials == "ieee" or top < 0)
        largest = 2.0**emax * (2 - 2.0**-man_bits if specials == "ieee" or top < 0 else 1 + top / 2**man_bits)
        return cls(
            name=name,
            elem_bits=1 + exp_bits + man_bits,
            exp_bits=exp_bits,
            man_bits=man_bits,
            bias=bias,
            emin=1 - bias,
            emax=emax,
            max=largest,
            lowest=-largest,
            has_inf=specials == "ieee",
            has_nan=specials != "none",
            scale=scale,
            block=block,
        )

    @classmethod
    def integer(
        cls, name: str, bits: int, *, step: float = 1.0, scale: str = "float32", block: int | None = None
    ) -> Format:
        """Make a signed integer format whose codes -(2^(bits-1) - 1) .. 2^(bits-1) - 1 mean multiples of `step`.

        `step` is a power of two. The most negative code exists and is not used: the range is symmetric.
        """
        if not 2 <= bits <= 8:
            raise ConfigError(f"{name}: got {bits} bits, expected 2 to 8")
        if math.frexp(step)[0] != 0.5:
            raise ConfigError(f"{name}: got step {step}, expected a power of two")
        top = bits - 2 + int(math.log2(step))
        largest = (2 ** (bits - 1) - 1) * step
        return cls(name, bits, 0, bits - 2, 0, top, top, largest, -largest, False, False, scale, block)

    @property
    def is_integer(self) -> bool:
        return self.exp_bits == 0

    @property
    def spacing(self) -> float:
        """Distance of the values next to zero: the smallest subnormal, or the integer's step."""
        return 2.0 ** (self.emin - self.man_bits)

    @property
    def min_normal(self) -> float:
        """Smallest value with full precision."""
        return self.spacing if self.is_integer else 2.0**self.emin

    @property
    def min_sub(self) -> float:
        """Smallest value above zero."""
        return self.spacing

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of unpacked codes: float8 where torch has the format, int8 for integers, else uint8."""
        layout = (self.exp_bits, self.man_bits, self.bias, self.has_inf, self.has_nan)
        if layout == (4, 3, 7, False, True):
            return torch.float8_e4m3fn
        if layout == (5, 2, 15, True, True):
            return torch.float8_e5m2
        return torch.int8 if self.is_integer else torch.uint8

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """All finite values >= 0, in order; the index of a float format's value is its code."""
        if self.is_integer:
            return tuple(i * self.spacing for i in range(round(self.max / self.spacing) + 1))
        ones, found = 2**self.man_bits, []
        for code in range(2 ** (self.elem_bits - 1)):
            exponent, mantissa = divmod(code, ones)
            value = mantissa / ones * 2.0**self.emin
            if exponent:
                value = (1 + mantissa / ones) * 2.0 ** (exponent - self.bias)
            if value <= self.max:
                found.append(value)
        return tuple(found)

    def values(self) -> torch.Tensor:
        """Return the float32 value of every code 0 .. 2^elem_bits - 1, NaN and infinity included, (codes,).

        >>> formats["mxfp4"].values()[:8].tolist()
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        """
        half = 2 ** (self.elem_bits - 1)
        if self.is_integer:
            codes = torch.arange(2 * half)
            return torch.where(codes < half, codes, codes - 2 * half) * self.spacing
        above = [math.nan] * (half - len(self.grid))
        if self.has_inf:
            above[0] = math.inf
        positive = torch.tensor([*self.grid, *above], dtype=torch.float32)
        return torch.cat([positive, -positive])


def _standard() -> Mapping[str, Format]:
    e2m1, bfloat16 = (2, 1), (8, 7)
    integers = [Format.integer(f"int{bits}", bits) for bits in range(2, 9)]
    found = [
        Format.floating("mxfp8_e4m3", 4, 3, specials="nan"),
        Format.floating("mxfp8_e5m2", 5, 2, specials="ieee"),
        Format.floating("mxfp6_e3m2", 3, 2),
        Format.floating("mxfp6_e2m3", 2, 3),
        Format.floating("mxfp4", *e2m1),
        Format.integer("mxint8", 8, step=2.0**-6, scale="e8m0", block=32),
        Format.floating("nvfp4", *e2m1, scale="e4m3", block=16),
        Format.floating("fp4", *e2m1, scale="float32", block=None),
        Format.floating("bfloat16", *bfloat16, specials="ieee", scale="none", block=None),
        *integers,
    ]
    return MappingProxyType({fmt.name: fmt for fmt in found})


formats: Mapping[str, Format] = _standard()
"""The standards by name. `fp4` is E2M1 under a real-valued scale, by default of the whole tensor."""

_ALIASES = {
    "bf16": "bfloat16",
    "mxfp4_e2m1": "mxfp4",
    # microxcaling's names
    "fp8_e4m3": "mxfp8_e4m3",
    "fp8_e5m2": "mxfp8_e5m2",
    "fp6_e3m2": "mxfp6_e3m2",
    "fp6_e2m3": "mxfp6_e2m3",
    "fp4_e2m1": "mxfp4",
}


def find_format(name: str | Format) -> Format:
    """Return a format by name or alias.

    Raises:
        ConfigError: there is no such format; names the nearest.
    """
    if isinstance(name, Format):
        return name
    found = formats.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        near = difflib.get_close_matches(str(name), [*formats, *_ALIASES], n=1, cutoff=0.0)
        raise ConfigError(f"format: got {name!r}, did you mean {near[0]!r}? (all: {', '.join(formats)})")
    return found
