"""Casts against a plain copy, torchao and an emulation in many passes: same tensors, same process, same threads.

    python packages/effml-quant/benchmarks/bench_cast.py --table
    python packages/effml-quant/benchmarks/bench_cast.py --millions 64 --dtypes bfloat16 --table

One JSON line per case on stdout. Before anything is timed, every contender's result is checked against ours: torchao's
and the emulation's must be equal bit by bit. Contenders take turns, a garbage collection before each; medians.

Two baselines, because fresh memory costs more than the work on it: `copy` writes into memory that is there, `clone`
into memory fresh from the system. A contender is compared with the one that allocates as it does: `in place` with copy,
what returns a new tensor with clone. glibc's allocator keeps some of the memory that is freed, and who gets it is luck;
here it is told to keep none, so that what a contender allocates is fresh in every case (`fresh`; elsewhere it is not
known). `gb_s` counts the bytes that must move: once in, once out.

- ours: `fake_quantize(x, ...)`, and `in place`: `fake_quantize(x, ..., out=there)`.
- torchao (if installed: `uv pip install torchao`): `MXTensor.to_mx(x, ...)` and back by `.dequantize(...)`, its only
  way to the same values on a CPU, uncompiled; `torchao-compiled` is both under `torch.compile`.
- emulation: whole-tensor float32 passes in the manner of microxcaling (largest magnitude, floor(log2), scale, shared
  exponent per element, round, clamp, scale back), written here.
- plain: our own version without the kernel, which is what serves where there is no compiler.

pack is to four- and eight-bit codes with scales, unpack the way back, dual the cast along both axes of a matrix.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from effml_quant import Quantizer, fake_quantize
from effml_quant.casting import plain_cast
from effml_quant.kernels import cast_both, codes_of, values_of
from effml_shared.benchmarks import in_turn, publish, say, settings
from torch import Tensor

Contenders = dict[str, Callable[[], Any]]
FORMATS = {"mxfp8_e4m3": "E4M3", "mxfp8_e5m2": "E5M2", "mxfp6_e2m3": "E2M3", "mxfp4": "E2M1"}
MORE = {"nvfp4": {}, "mxint8": {}, "int4": {"granularity": ("group", 32)}, "int8": {"granularity": "channel"}}
SHOWN = ["mxfp8_e4m3", "mxfp4", "nvfp4"]
M_MMAP_THRESHOLD = -3  # of mallopt(3)
KEYS = ("case", "format", "millions", "dtype", "contender", "ms", "gb_s", "copies", "ours_is_faster", "equal")


def emulated(x: Tensor, q: Quantizer) -> Tensor:
    """Cast as an emulation does that makes one float32 pass over memory per operation."""
    fmt = q.format
    a = x.float().reshape(-1, 32)
    shared = torch.floor(torch.log2(a.abs().amax(1, keepdim=True) + (a.abs().amax(1, keepdim=True) == 0)))
    shared = shared - fmt.emax
    a = a / 2.0**shared
    private = torch.floor(torch.log2(a.abs() + (a == 0))).clamp(min=fmt.emin)
    a = a / 2.0**private * 2.0**fmt.man_bits
    a = torch.round(a)
    a = a / 2.0**fmt.man_bits * 2.0**private
    a = a.clamp(-fmt.max, fmt.max)
    return (a * 2.0**shared).reshape(x.shape).to(x.dtype)


def torchao_cast(fmt: str) -> Callable[[Tensor], Tensor] | None:
    """Return torchao's way to the values of a format."""
    if not importlib.util.find_spec("torchao"):
        return None
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    dtypes: dict[str, Any] = {
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp4": torch.float4_e2m1fn_x2,
    }
    return lambda x: MXTensor.to_mx(x, dtypes[fmt], 32).dequantize(x.dtype)


def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def always_fresh() -> bool:
    """Have glibc give back whatever is freed, and take all larger memory from the system; say whether it will."""
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20))  # fixed: by itself it would rise to 32 MiB
    except (OSError, AttributeError, TypeError):
        return False


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per contender and case."""
    for millions in options.millions:
        for dtype in (getattr(torch, name) for name in options.dtypes):
            x = torch.randn(millions * 2**20 // 4096, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
            there = torch.empty_like(x)
            where = {"millions": millions, "dtype": str(dtype)[6:]}
            yield from fakes(x, there, where, options)
            yield from others(x, there, where, options)


def fakes(x: Tensor, there: Tensor, where: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for fmt, fields in {**{name: {} for name in FORMATS}, **MORE}.items():
        if fmt not in options.formats:
            continue
        q = Quantizer(fmt, **fields)
        expected = fake_quantize(x, q)
        contenders: Contenders = {
            "copy": lambda: there.copy_(x),
            "clone": lambda: x.clone(),
            "ours in place": lambda q=q: fake_quantize(x, q, out=there),
            "ours": lambda q=q: fake_quantize(x, q),
        }
        equal = {"ours in place": torch.equal(fake_quantize(x, q, out=there), expected)}
        slow: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda x, q=q: plain_cast(x, q)}
        if fmt in FORMATS:
            slow["emulation"] = lambda x, q=q: emulated(x, q)
            if (ao := torchao_cast(fmt)) is not None:
                slow["torchao"] = ao
                if options.compile:
                    slow["torchao-compiled"] = compiled(ao)
        for name, function in slow.items():
            equal[name] = torch.equal(function(x), expected)
            contenders[name] = lambda function=function: function(x)
        del expected
        rows = in_turn(contenders, options.samples)
        yield from described("fake", fmt, rows, 2 * x.nbytes, x.numel(), equal, where)


def others(x: Tensor, there: Tensor, where: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Pack, unpack, and both axes at once."""
    for fmt in ("mxfp8_e4m3", "mxfp4", "mxfp6_e2m3"):
        if fmt not in options.formats:
            continue
        q = Quantizer(fmt)
        packed = fmt != "mxfp8_e4m3"
        made = codes_of(x, q, packed=packed)
        if made is None:
            say(f"{fmt}: no kernel on this machine, pack and unpack left out")
            continue
        codes, scales, _ = made
        factor = scales.float().flatten()
        small = codes.nbytes + scales.nbytes
        values = values_of(codes.flatten(), factor, q, tuple(x.shape), x.dtype)
        equal = {"ours": values is not None and torch.equal(values, fake_quantize(x, q))}
        base: Contenders = {"copy": lambda: there.copy_(x), "clone": lambda: x.clone()}
        pack: Contenders = {**base, "ours": lambda q=q, packed=packed: codes_of(x, q, packed=packed)}
        unpack: Contenders = {
            **base,
            "ours": lambda q=q, c=codes, f=factor: values_of(c.flatten(), f, q, tuple(x.shape), x.dtype),
        }
        if importlib.util.find_spec("torchao") and fmt != "mxfp6_e2m3":
            from torchao.prototype.mx_formats.mx_tensor import MXTensor

            kind: Any = torch.float8_e4m3fn if fmt == "mxfp8_e4m3" else torch.float4_e2m1fn_x2
            theirs = MXTensor.to_mx(x, kind, 32)
            pack["torchao"] = lambda kind=kind: MXTensor.to_mx(x, kind, 32)
            unpack["torchao"] = lambda theirs=theirs: theirs.dequantize(x.dtype)
            equal["torchao"] = torch.equal(theirs.dequantize(x.dtype), values)
        yield from described("pack", fmt, in_turn(pack, options.samples), x.nbytes + small, x.numel(), equal, where)
        yield from described("unpack", fmt, in_turn(unpack, options.samples), x.nbytes + small, x.numel(), equal, where)
    if "mxfp8_e4m3" in options.formats:
        rows, columns = Quantizer("mxfp8_e4m3"), Quantizer("mxfp8_e4m3", axis=0)
        both = cast_both(x, rows, columns)
        equal = {"ours": both is not None and torch.equal(both[1], plain_cast(x, columns))}
        dual: Contenders = {
            "clone": lambda: x.clone(),
            "ours": lambda: cast_both(x, rows, columns),
            "one after the other": lambda: (fake_quantize(x, rows), fake_quantize(x, columns)),
        }
        yield from described(
            "dual", "mxfp8_e4m3", in_turn(dual, options.samples), 3 * x.nbytes, x.numel(), equal, where
        )


def described(
    case: str,
    fmt: str,
    samples: dict[str, list[float]],
    moved: int,
    elements: int,
    equal: dict[str, bool],
    where: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    samples = {name: [1e3 * value for value in values] for name, values in samples.items()}
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, values in samples.items():
        base = "copy" if name in ("copy", "ours in place") else "clone"
        yield {
            "case": case,
            "format": fmt,
            **where,
            "contender": name,
            "ms": round(medians[name], 3),
            "ms_all": [round(value, 3) for value in values],
            "gb_s": round(moved / medians[name] / 1e6, 2),
            "copies": round(medians[name] / medians[base], 2) if base in medians else None,
            "ours_is_faster": round(medians[name] / medians["ours"], 2),
            "equal": equal.get(name, True),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[16, 64], help="elements, in units of 2^20")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--formats", nargs="+", default=SHOWN, choices=[*FORMATS, *MORE])
    parser.add_argument("--samples", type=int, default=5, help="timed turns of every contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torchao under torch.compile too")
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not importlib.util.find_spec("torchao"):
        say("torchao is not installed and left out: uv pip install torchao")
    head = {**settings(options, "torchao"), "fresh": always_fresh()}
    for row in publish(head, cases(options), KEYS, table=options.table):
        if not row["equal"]:
            say(f"{row['contender']} differs from ours: {row}")


if __name__ == "__main__":
    main()
