"""Numbers of packages/effml-eval/README.md."""

from __future__ import annotations

import statistics
from typing import Any

from measured import markdown
from measured.markdown import fixed, number, settings
from measured.results import cases, run

PEERS = {"dictionary_learning": "dictionary_learning", "sae_lens": "SAELens", "overcomplete": "overcomplete"}
DISTRIBUTIONS = {"dictionary_learning": "dictionary-learning", "sae_lens": "sae-lens", "overcomplete": "overcomplete"}
KINDS = {"topk": "TopK", "batch_topk": "BatchTopK"}
WORLDS = {"eval.sae": "synthetic", "eval.digits": "digits"}


def setting() -> str:
    """Return what a step was measured with."""
    found = _steps()
    one, measured = found["topk", "effml"], {name for _, name in found}
    peers = {label: DISTRIBUTIONS[name] for name, label in PEERS.items() if name in measured}
    return markdown.paragraph(f"""
        One training step of a sparse autoencoder, {one["dim"]} dimensions, {one["concepts"]:,} concepts, k {one["k"]},
        {one["batch"]:,} rows, float32: medians of {len(one["seconds_all"])}, contenders in turn; the factors are
        medians of ratios within a turn. {settings(one, **peers)}
        ([raw](../../docs/results/bench_sae.cpu.jsonl), `nox -s bench -- eval` repeats it). Memory is what a model, its
        optimizer and two steps add to a process:
    """)


def speed() -> str:
    """Return rows per second and memory of a training step, beside the peers."""
    found = _steps()
    names = [name for name in ("effml", *PEERS) if ("topk", name) in found]
    rows = []
    for kind, label in KINDS.items():
        of = [found[kind, name] for name in names]
        rows.append((f"{label}, rows per second", number(of[0]["tokens_per_s"]), *map(_slower, of[1:])))
    for kind, label in KINDS.items():
        sizes = [found[kind, name].get("peak_mib") for name in names]
        rows.append((f"{label}, memory added", *("–" if mib is None else f"{fixed(mib, 0)} MiB" for mib in sizes)))
    return markdown.table(("", *({"effml": "effml", **PEERS}[name] for name in names)), rows)


def bounds() -> str:
    """Return what the encoder's product alone would cost, and the step with dense codes."""
    found = _steps()
    topk, batch = (fixed(found[kind, "effml"]["encoder_share"], 1) for kind in KINDS)
    dense = found["topk", "effml_dense"]
    return markdown.paragraph(f"""
        The encoder's float32 product alone, which a plain step makes first, takes {topk} times as long as the whole
        TopK step here, and {batch} times as long as the BatchTopK step. The TopK step with dense codes takes
        {number(dense["times_faster"])} times as long and {fixed(dense["peak_mib"], 0)} MiB.
    """)


def quality() -> str:
    """Return what equal steps have learnt, here and with the peers."""
    found = _steps()
    said = []
    for kind, label in KINDS.items():
        of = {name: found[kind, name] for name in ("effml", *PEERS) if "r2_all" in found.get((kind, name), {})}
        each = [f"{PEERS.get(name, name)} {_spread(one['r2_all'])}" for name, one in of.items()]
        said += [f"{label}: {', '.join(each)}."] if each else []
    seeds = len(found["topk", "effml"]["r2_all"])
    return markdown.paragraph(f"Held-out R², means and ranges of {seeds} seeds. {' '.join(said)}")


def claims() -> str:
    """Return the claims as judged in both worlds: mean, 95% interval, verdict."""
    judged = {name: {one["claim"]["effect"]: one for one in run(name)["claims"]} for name in WORLDS}
    every = {effect: one["claim"] for of in judged.values() for effect, one in of.items()}
    rows = [
        (
            claim["text"],
            f"at least {claim['at_least']:g}{claim['unit']}",
            *(_cell(of.get(effect)) for of in judged.values()),
        )
        for effect, claim in every.items()
    ]
    seeds = (run(name)["claims"][0]["seeds"] for name in WORLDS)
    worlds = (f"{world}, {count} seeds" for world, count in zip(WORLDS.values(), seeds, strict=True))
    return markdown.table(("claim", "what counts as holding", *worlds), rows)


def limits() -> str:
    """Return what the space of digits is like, where a linear method comes near, and what made the runs."""
    found = run("eval.digits")
    mean = {row["what"]: row["mean"] for row in found["table"]}
    named, gap = mean["images whose digit is named right"], mean["gap between the modalities"]
    (kmeans,) = found["front"]["k-means"]
    sparsest = min(found["front"]["BatchTopK"], key=lambda point: point["l0"])
    return markdown.paragraph(f"""
        The space of digits is small and well aligned: {fixed(100 * named, 0)}% of the images are named right, and the
        means of images and of captions lie {fixed(gap, 2)} apart. So concepts serve both modalities, and what the paper
        reports of large models, where the two lie wide apart, is not to be had from it. The front is judged at the
        sparsity of the autoencoders. At the sparse end, with the first seed, k-means with one code has an R² of
        {fixed(kmeans["r2"], 3)}, BatchTopK with {fixed(sparsest["l0"], 1)} codes one of {fixed(sparsest["r2"], 3)}.
        {markdown.made("eval.sae")} {markdown.made("eval.digits")}
    """)


def _steps() -> dict[tuple[str, str], dict[str, Any]]:
    """Return by kind and contender what was measured of a step, in one run or in runs for memory and quality."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases("bench_sae"):
        for one in (case, case.get("memory_run"), case.get("quality_run")):
            if one and "kind" in one:
                known = {key: value for key, value in one.items() if value is not None}
                key = (one["kind"], one["contender"])
                found[key] = known | found.get(key, {})
    return found


def _slower(one: dict[str, Any]) -> str:
    return f"{number(one['tokens_per_s'])} ({fixed(one['times_faster'], 1)}x slower)"


def _spread(values: list[float]) -> str:
    return f"{fixed(statistics.fmean(values), 3)} ({fixed(min(values), 3)} to {fixed(max(values), 3)})"


def _cell(verdict: dict[str, Any] | None) -> str:
    """Return mean, interval and verdict, the mean without its unit."""
    if verdict is None:
        return ""
    measured, low_high = markdown.measurement(verdict)
    return f"{measured.removesuffix(verdict['claim']['unit'])} {low_high}, {verdict['verdict']}"
