"""Numbers of packages/effml-arch/README.md."""

from __future__ import annotations

from statistics import median
from typing import Any

from measured import markdown
from measured.markdown import fixed, made, number, paragraph, settings, span, table
from measured.results import cases, claim, run

LAYERS = {
    "tiled": "effml",
    "standard": "standard layer",
    "naive": "autograd through the loop",
    "lucidrains": "lucidrains (another layer)",
}
STANDARD = ("standard", "causal")  # of which the faster one is shown
DECODERS = {
    "recurrent": "Recurrent Transformer",
    "transformer": "Transformer",
    "llama": "the Transformer as a Llama, Hugging Face's `generate`",
}
STATE_MODELS = {"RT-1": "recurrent, 1 layer", "T-1": "standard, 1 layer", "T-2": "standard, 2 layers"}
STATE_TASKS = {"parity": "prefix parity", "recall": "associative recall"}

Cases = dict[str, dict[str, Any]]


def layers() -> str:
    """Return time and memory of one layer, effml's and others', by length."""
    by_length = _layers()
    first = by_length[min(by_length)]["tiled"]
    caption = paragraph(f"""
        Forward and backward of one layer on batches of {first["batch"]}, width {first["d_model"]}, {first["n_heads"]}
        heads, float32, {settings(first, lucidrains="recurrent-transformer-pytorch")}: medians of
        {first["samples"]} passes ({first["naive_samples"]} for autograd's two), and what a pass adds to a process's
        memory. lucidrains is recurrent-transformer-pytorch.
    """)
    rows = [
        (f"{length:,}", *(_time_and_memory(found.get(name)) for name in LAYERS)) for length, found in by_length.items()
    ]
    return f"{caption}\n\n{table(('length', *LAYERS.values()), rows)}"


def layer_limits() -> str:
    """Return how far effml's layer is from the others, and how its time grows."""
    by_length = _layers()
    *_, shorter, longest = by_length
    compared = max(length for length, found in by_length.items() if "naive" in found)
    naive = by_length[compared]["naive"]
    tiled, standard = ([found[name] for found in by_length.values()] for name in ("tiled", "standard"))
    times, sizes = (
        ", ".join(fixed(ours[key] / theirs[key], 2) for ours, theirs in zip(tiled, standard, strict=True))
        for key in ("seconds", "peak_mib")
    )
    return paragraph(f"""
        At a length of {compared:,} it is {number(naive["tiled_is_faster"])} times as fast as autograd through the loop,
        whose {len(naive["seconds_all"])} passes took {span(naive["seconds_all"], 3)} s, in
        1/{fixed(naive["memory_over_tiled"], 0)} of the memory. Row by row, it takes {times} times as long as a standard
        layer, and {sizes} times the memory. From {shorter:,} to {longest:,} positions its time grows by a factor of
        {number(by_length[longest]["tiled"]["growth"], 2)}, and the number of their pairs by
        {number((longest / shorter) ** 2, 2)}. The standard layer's attention is PyTorch's {_attention(standard)}.
    """)


def _attention(standard: list[dict[str, Any]]) -> str:
    """Return whether the standard layers shown have a mask or PyTorch's causal flag."""
    flagged = [f"{layer['length']:,}" for layer in standard if layer["contender"] == "causal"]
    if not cases("bench_recurrent", contender="causal"):
        return (
            "under a boolean mask, which computes all pairs; its causal flag, which skips half of them, was not timed"
        )
    at = "all lengths" if len(flagged) == len(standard) else f"lengths of {', '.join(flagged)}" if flagged else "none"
    return (
        f"under its causal flag, which skips half of the pairs, or under a mask, whichever is faster: the flag at {at}"
    )


def decoding() -> str:
    """Return what a step of decoding costs, and a prompt, with the cache."""
    found = _decoders()
    first = next(iter(found.values()))["recurrent"]
    caption = paragraph(f"""
        Greedy decoding with a cache, {first["layers"]} layers of width {first["width"]},
        {settings(first, transformers="transformers")}, medians of {first["samples"]}: milliseconds per step of the
        whole batch, and to the first token of the prompts.
    """)
    rows = [
        (
            f"{batch}, {context}",
            *(f"{number(of[name]['ms_per_token'])}, first {number(of[name]['prefill_ms'])}" for name in DECODERS),
        )
        for (batch, context), of in found.items()
    ]
    return f"{caption}\n\n{table(('batch, context', *DECODERS.values()), rows)}"


def decoding_limits() -> str:
    """Return how decoding compares with the Transformer's, that one's with Hugging Face's, and with the bandwidth."""
    found = list(_decoders().values())
    steps = _ratios(found, "ms_per_token", "recurrent", "transformer")
    prompts = _ratios(found, "prefill_ms", "recurrent", "transformer")
    llama = _ratios(found, "ms_per_token", "transformer", "llama")
    bound = [of["recurrent"]["ms_per_token"] / of["recurrent"]["bound_ms"] for of in found]
    return paragraph(f"""
        A step of the Recurrent Transformer takes {span(steps)} times as long as the Transformer's, its prompts, whose
        positions follow one another in every layer, {span(prompts)} times; a step of the Transformer {span(llama)}
        times as long as the same model's in Hugging Face's loop. A recurrent step takes {span(bound)} times as long as
        reading the weights and the cache once: at this size it is not memory that bounds it.
    """)


def claims() -> str:
    return markdown.claims("arch.rt_state", "arch.rt_lm")


def states() -> str:
    """Return the right answers of one recurrent layer and of one and two standard ones."""
    found = {(row["task"], row["model"]): row for row in run("arch.rt_state")["table"]}
    rows = []
    for task, name in STATE_TASKS.items():
        of = [found[task, model] for model in STATE_MODELS]
        rows.append((name, *(f"{fixed(row['right answers (%)'], 1)} ± {fixed(row['± 95%'], 1)}" for row in of)))
        rows.append((f"{name}, at twice the length", *(fixed(row["at twice the length (%)"], 1) for row in of)))
    return table(("right answers, %", *STATE_MODELS.values()), rows)


def texts() -> str:
    """Return the language models, what they cost, and their losses."""
    head = ("model", "layers x width", "cache, bytes per token", "training FLOPs", "held-out loss, nats per byte")
    rows = [
        (
            row["model"],
            row["layers x width"],
            f"{row['KV bytes per token']}",
            fixed(row["training FLOPs, T deep = 1"], 2),
            f"{fixed(row['held-out loss (nats)'], 3)} ± {fixed(row['± 95%'], 3)}",
        )
        for row in run("arch.rt_lm")["table"]
    ]
    return table(head, rows)


def text_limits() -> str:
    """Return how finely the first claim is known, and what a recurrent step costs."""
    first = claim("arch.rt_lm", "parameters")
    deep, shallow = (_median_step(f"RT {shape}") / _median_step(f"T {shape}") for shape in ("deep", "shallow"))
    return paragraph(f"""
        With {first["seeds"]} seeds the difference of the first claim on text is known to within
        {number((first["high"] - first["low"]) / 2, 2)} nats. A training step of the deep recurrent model took
        {number(deep, 2)} times as long as the standard one's, of the shallow one {number(shallow, 2)} times (medians
        over trainings). {made("arch.rt_state")} {made("arch.rt_lm")}
    """)


def _layers() -> dict[int, Cases]:
    found: dict[int, Cases] = {}
    for case in cases("bench_recurrent"):
        found.setdefault(case["length"], {})[case["contender"]] = case
    for of in found.values():
        of["standard"] = min((of[name] for name in STANDARD if name in of), key=lambda case: case["seconds"])
    return found


def _decoders() -> dict[tuple[int, int], Cases]:
    found: dict[tuple[int, int], Cases] = {}
    for case in cases("bench_decode"):
        found.setdefault((case["batch"], case["context"]), {})[case["contender"]] = case
    return found


def _ratios(found: list[Cases], key: str, ours: str, theirs: str) -> list[float]:
    return [of[ours][key] / of[theirs][key] for of in found]


def _median_step(model: str) -> float:
    trainings = [trial for trial in run("arch.rt_lm")["trials"].values() if trial["method"] == model]
    return median(trial["seconds"] / trial["steps"] for trial in trainings)


def _time_and_memory(case: dict[str, Any] | None) -> str:
    return "" if case is None else f"{number(case['seconds'])} s, {fixed(case['peak_mib'], 0)} MiB"
