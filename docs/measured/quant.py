"""Numbers of packages/effml-quant/README.md."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from measured import markdown
from measured.markdown import fixed, number, paragraph, plus_minus, settings, span, table
from measured.results import cases, line, lines, run

FORMATS = {"mxfp8_e4m3": "E4M3", "mxfp4": "E2M1"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
COLUMNS: list[dict[str, Any]] = [
    {"format": fmt, "dtype": dtype, "millions": millions}
    for dtype in DTYPES
    for fmt in FORMATS
    for millions in (16, 64)
]
SCHEMES = {
    "all E4M3": "E4M3 everywhere, `floor`",
    "norms exempt": "the same, norms exempt",
    "rceil": "the same, `rceil`",
    "forward only": "E4M3 forward only",
    "bf16 inputs and gradients": "E4M3 weights, bf16 inputs and gradients",
    "all E2M3": "E2M3 everywhere",
    "all E3M2": "E3M2 everywhere",
    "all E2M1": "E2M1 everywhere",
}
FACTOR = "0.97"  # of gains, the sharpest


def setting() -> str:
    """Return what the casts were measured with, and whether their results are equal."""
    first = lines("bench_cast", case=None)[0]
    shown = [one for column in COLUMNS for one in lines("bench_cast", case="fake", **column)]
    turns = sorted({len(one["ms_all"]) for one in shown})
    others = [one for one in lines("bench_cast") if one.get("contender") in ("torchao", "emulation", "plain")]
    kept = """
        Where a fresh copy costs no more than the other, the allocator happened to have the memory; there the factors
        against others come out larger."""
    return paragraph(f"""
        {settings({**first, "torch": first["versions"]["torch"]}, torchao="torchao")}; medians of
        {" or ".join(map(str, turns))} turns. {sum(one["equal"] for one in others)} of the {len(others)} results of
        others are equal to ours bit by bit. {"" if first.get("fresh") else kept}
    """)


def casts() -> str:
    """Return milliseconds of fake quantisation, and how many times slower others are."""
    rows = {
        "copy into memory that is there, ms": ("copy", "ms"),
        "`fake_quantize(x, ..., out=there)`, ms": ("ours in place", "ms"),
        "over that copy": ("ours in place", "copies"),
        "fresh copy, `x.clone()`, ms": ("clone", "ms"),
        "`fake_quantize(x, ...)`, ms": ("ours", "ms"),
        "over that fresh copy": ("ours", "copies"),
        "torchao (`to_mx`, `dequantize`), times slower": ("torchao", "ours_is_faster"),
        "emulation in float32 passes (as microxcaling's), times slower": ("emulation", "ours_is_faster"),
        "our plain version, without the kernel, times slower": ("plain", "ours_is_faster"),
    }
    head = [f"{FORMATS[c['format']]}, {DTYPES[c['dtype']]}, {c['millions']}M" for c in COLUMNS]
    found = [
        (name, *(number(line("bench_cast", case="fake", contender=contender, **column)[key], 2) for column in COLUMNS))
        for name, (contender, key) in rows.items()
    ]
    return table(("", *head), found)


def bound() -> str:
    """Return what bounds casts, formats with a scale of the whole tensor and casts along both axes."""
    place = {dtype: _in_place(tuple(FORMATS), dtype) for dtype in DTYPES}
    nvfp4 = {dtype: _in_place(("nvfp4",), dtype)[1] for dtype in DTYPES}
    twice = lines("bench_cast", case="dual", contender="one after the other")
    saved = span(100 * (1 - 1 / one["ours_is_faster"]) for one in twice)
    return paragraph(f"""
        In place, float32 moves {place["float32"][0]} GB/s in {place["float32"][1]} times the time of a copy: memory
        bounds it. bfloat16, with twice the elements per byte, moves {place["bfloat16"][0]} GB/s in
        {place["bfloat16"][1]} times the time of a copy: arithmetic does. NVFP4 takes {nvfp4["float32"]} times a copy
        in float32 and {nvfp4["bfloat16"]} in bfloat16, as its scale needs all of the tensor first. Packing is
        {_torchao("pack")} times as fast as torchao's, unpacking {_torchao("unpack")} times. A cast along both axes in
        one pass saves {saved}% of two casts, no more.
    """)


def _in_place(formats: tuple[str, ...], dtype: str) -> tuple[str, str]:
    """Return GB/s, and the time over that of a copy."""
    placed = lines("bench_cast", case="fake", contender="ours in place", dtype=dtype)
    found = [one for one in placed if one["format"] in formats]
    return span(one["gb_s"] for one in found), span(one["copies"] for one in found)


def _torchao(case: str) -> str:
    """Return how many times as long torchao takes to pack or unpack, by format."""
    found = {
        name: span(one["ours_is_faster"] for one in lines("bench_cast", case=case, contender="torchao", format=fmt))
        for fmt, name in FORMATS.items()
    }
    return ", ".join(f"{times} ({name})" for name, times in found.items())


def layers() -> str:
    """Return milliseconds of a linear layer, forward and backward."""
    rows = []
    for ours in cases("bench_linear", contender="ours"):
        case = {key: ours[key] for key in ("format", "tokens", "width")}
        plain, narrow, emulation = (
            line("bench_linear", contender=contender, **case)
            for contender in ("nn.Linear", "nn.Linear bfloat16", "emulation")
        )
        times = (plain["ms"], ours["ms"], emulation["ms"], narrow["ms"])
        shape = (FORMATS[ours["format"]], f"{ours['tokens']} x {ours['width']}")
        rows.append((*shape, *times, number(ours["over_linear"], 2), number(emulation["ours_is_faster"], 2)))
    head = ("format", "tokens x width", "`nn.Linear`, float32", "ours", "emulation", "`nn.Linear`, bfloat16")
    return table((*head, "over `nn.Linear`", "emulation, times slower"), rows)


def lotion() -> str:
    """Return what LOTION adds to a training step."""
    found = cases("bench_lotion")
    said = []
    for weights in sorted({one["weights"] for one in found}):
        share = span(one["share_percent"] for one in found if one["weights"] == weights)
        said.append(f"{share}% at {number(weights / 1e6, 2)} million")
    return paragraph(f"""
        LOTION adds to the step of a language model, by the number of its quantised weights: {", ".join(said)}
        ({settings(found[0])}, [raw](../../docs/results/bench_lotion.cpu.jsonl)).
    """)


def claims() -> str:
    """Return what both experiments judged."""
    return markdown.claims("quant.mx", "quant.lotion")


def made() -> str:
    """Return when, on what and for how long both experiments ran."""
    return paragraph(f"{markdown.made('quant.mx')} {markdown.made('quant.lotion')}")


def bias() -> str:
    """Return the bias of the gradient by scheme and time: median and range over seeds."""
    seeds = run("quant.mx")["rho"]
    rows = []
    for scheme, name in SCHEMES.items():
        found = [[rho[step][scheme] for rho in seeds] for step in seeds[0]]
        rows.append((name, *(f"{number(median(rhos))} ({span(rhos, 3)})" for rhos in found)))
    head = [f"after {step} float32 steps" if int(step) else "untrained" for step in seeds[0]]
    return table((f"scheme, {len(seeds)} seeds", *head), rows)


def rescaled() -> str:
    """Return what gains that share a code do to gradient and loss."""
    summary = run("quant.mx")
    clamped = fmean(found[FACTOR]["clamped"] for found in summary["rescaled"])
    moved = [row for row in summary["table"] if row["part"] == f"gains x {FACTOR}"]
    said = [
        f"{SCHEMES[row['setting']]}: rho {number(row['rho trained'], 2)}, loss {number(row['% above float32'], 2)}% up"
        for row in moved
    ]
    return paragraph(f"""
        Gains multiplied by {FACTOR} along their exact symmetry, which in E4M3 clamps {number(100 * clamped, 2)}% of
        them: {"; ".join(said)}. Rho is the median over seeds, the loss their mean above float32's.
    """)


def divergence() -> str:
    """Return how many trainings spiked or diverged."""
    summary = run("quant.mx")
    ends = [trial["loss"] for trial in summary["trials"].values() if "loss" in trial]
    spikes = [sum(found[name] for found in summary["spikes"]) for name in summary["spikes"][0]]
    counts = ", ".join(f"{count} in {name}" for name, count in zip(summary["spikes"][0], spikes, strict=True))
    return paragraph(f"""
        Spikes of the training loss of the student-teacher network over {len(summary["spikes"])} seeds: {counts}. Of
        all {len(ends)} trainings of `quant.mx`, {ends.count(None)} ended without a finite loss.
    """)


def text() -> str:
    """Return held-out losses of language models with INT4 weights."""
    names = {"PTQ": "PTQ: cast at the end", "QAT": "straight-through QAT", "LSQ": "LSQ, learned scale"}
    scales = {"text, int4 per tensor": "matrix", "text, int4 per channel": "channel"}
    rows = [
        (
            scales[row["problem"]],
            names.get(row["method"], row["method"]),
            plus_minus(row["loss, cast"], row["± 95%"], 3),
            fixed(row["loss, full precision"], 3),
            fixed(row["loss, GPTQ"], 3),
        )
        for row in run("quant.lotion")["table"]
        if row["problem"] in scales
    ]
    return table(("one scale per", "method", "cast to nearest", "not cast", "GPTQ instead of nearest"), rows)
