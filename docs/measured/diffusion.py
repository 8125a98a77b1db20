"""Numbers of packages/effml-diffusion/README.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from measured import markdown
from measured.markdown import fixed, made, number, paragraph, settings, span, table
from measured.results import cases, run

PEERS = {"mdlm": "as in MDLM", "llada": "as in LLaDA"}
ORDERS = {
    "random": "random, drawn",
    "random, greedy": "random, greedy",
    "random, 4 at once": "random, drawn, four at once",
    "margin": "margin",
    "margin, drawn": "margin, drawn",
    "margin, 4 at once": "margin, four at once",
    "top_prob": "largest probability",
    "neg_entropy": "least entropy",
}
PLANS, LINES = "plans: ", "lines: "  # how the table of diffusion.flex names its methods

Case = dict[str, Any]


def training() -> str:
    """Return tokens per second and memory of a training step, effml's and the public codes'."""
    found = _trainings()
    first = found[0]["effml"]
    caption = paragraph(f"""
        A training step, {first["layers"]} layers of width {first["width"]}, float32, {settings(first)}, medians of
        {first["samples"]} with contenders in turn; MiB are what a step adds to a process's memory:
    """)
    rows = []
    for of in found:
        ours = of["effml"]
        size = f"vocabulary {ours['vocab']:,}, {ours['batch']} x {ours['length']:,} tokens"
        theirs = (f"{_rate(of[peer])}, {fixed(of[peer]['times_faster'], 2)} times as long" for peer in PEERS)
        rows.append((size, _rate(ours), *theirs))
    return f"{caption}\n\n{table(('step on', 'effml', *PEERS.values()), rows)}"


def training_limits() -> str:
    """Return what part of a step the output head is, and what is saved of it."""
    large, small = _trainings()
    ours, theirs = large["effml"], large["mdlm"]
    return paragraph(f"""
        What is saved is the head where nothing is masked. With a vocabulary of {ours["vocab"]:,} the head is
        {_percent(theirs["head_share"])} of the products of a step that computes all logits; here
        {_percent(ours["masked_share"])} of the tokens are masked, and effml's step has
        1/{number(theirs["flop_ratio"])} of the products. What the times show beyond that is passes over logits. With a
        vocabulary of {small["effml"]["vocab"]:,} the head is {_percent(small["mdlm"]["head_share"], 1)} of the
        products, and there is nothing to gain: the other steps take {_each(small, "times_faster")} times as long, in
        {_each(small, "peak_mib", small["effml"]["peak_mib"])} times the memory.
    """)


def sampling() -> str:
    """Return the time of a generation by the sampler and by a loop over rows."""
    found = list(_samplings())
    first = found[0]["effml"]
    caption = paragraph(f"""
        Generating in {first["steps"]} steps, the likeliest masks first, against a loop over rows as in LLaDA;
        {settings(first)}, medians of {first["samples"]}:
    """)
    rows = []
    for of in found:
        ours, loop = of["effml"], of["loop"]
        network = "none" if ours["model"] == "stub" else f"{ours['layers']} layers of width {ours['width']}"
        size = f"{ours['batch']} x {ours['length']}"
        times = (ours["seconds"], loop["seconds"], fixed(ours["times_faster"], 2))
        rows.append((network, f"{ours['vocab']:,}", size, f"{ours['temperature']:g}", *times))
    head = ("network", "vocabulary", "tokens", "temperature", "effml, s", "loop, s", "loop / effml")
    return f"{caption}\n\n{table(head, rows)}"


def sampling_limits() -> str:
    """Return what bounds a sampler: the network beside it, and by itself the logits."""
    found = list(_samplings())
    network = next(of for of in found if of["effml"]["model"] == "transformer")
    alone = [of for of in found if of["effml"]["model"] == "stub"]
    drawn = span(of["effml"]["times_faster"] for of in alone if of["loop"]["temperature"] > 0)
    ours, loop = (span(of[name]["over_limit"] for of in alone) for name in ("effml", "loop"))
    return paragraph(f"""
        With a network, at temperature 0, the sampler takes {_beyond(network["effml"])} time than as many plain forward
        passes (the loop {_beyond(network["loop"])}), since it computes no logits where nothing is masked: the network
        bounds it. Without one it takes {ours} times as long as a sum over the logits that compete (the loop {loop}).
        At a temperature the loop draws noise in float64 for every logit, effml one number per position; there the loop
        takes {drawn} times as long.
    """)


def claims() -> str:
    return markdown.claims("diffusion.order", "diffusion.flex")


def orders() -> str:
    """Return the share of Sudokus that one network solves in each order."""
    summary = run("diffusion.order")
    found = {(row["grid"], row["order"]): row for row in summary["table"]}
    grids = [size["label"] for size in summary["sizes"].values()]
    rows = [(name, *(_solved(found[grid, order]) for grid in grids)) for order, name in ORDERS.items()]
    return table(("solved, %", *grids), rows)


def plans() -> str:
    """Return the share of right plans by method, in the adaptive order, with few steps and with many."""
    rates: dict[str, dict[str, str]] = {}
    for row in run("diffusion.flex")["table"]:
        order, _, steps = row["sampler"].partition(", ")
        if row["method"].startswith(PLANS) and order == "adaptive":
            rate = f"{fixed(row['right plans (%)'], 0)}" + (f" ± {fixed(row['± 95%'], 0)}" if row["seeds"] > 1 else "")
            rates.setdefault(row["method"].removeprefix(PLANS), {})[steps] = rate
    columns = next(iter(rates.values()))
    rows = [(method, *of.values()) for method, of in rates.items()]
    return table(("right plans, %", *columns), rows)


def flex_limits() -> str:
    """Return what equal spacing has room for by itself, and what lines cost in nats."""
    rows = run("diffusion.flex")["table"]
    room = [row for row in rows if row["sampler"].endswith("waypoints, no training")]
    _, maze, canvas = room[0]["method"].split(", ")
    shares = ", ".join(f"{fixed(row['right plans (%)'], 0)}%" for row in room)
    waypoints = ", ".join(row["sampler"].split()[0] for row in room)
    nats = {row["method"]: row["nats per byte"] for row in rows if row["method"].startswith(LINES)}
    flex, masked = (nats[f"{LINES}{name}"] for name in ("FlexMDM", "MDM, padded canvas"))
    return paragraph(f"""
        In a {maze} with a {canvas}, {shares} of the tasks with {waypoints} waypoints have room for their legs when
        waypoints are spaced equally, whatever is trained. On lines, after equal steps, FlexMDM's bound
        is {fixed(flex, 2)} nats per byte, and masked diffusion's {fixed(masked, 2)}. {made("diffusion.order")}
        {made("diffusion.flex")}
    """)


def _trainings() -> list[dict[str, Case]]:
    """Return the contenders of every vocabulary, the largest first."""
    found: dict[int, dict[str, Case]] = {}
    for case in cases("bench_training"):
        found.setdefault(case["vocab"], {})[case["contender"]] = case
    return [found[vocab] for vocab in sorted(found, reverse=True)]


def _samplings() -> Iterator[dict[str, Case]]:
    """Yield both contenders of every setting, in the order in which they were measured."""
    for ours in cases("bench_samplers", contender="effml"):
        same = {key: ours[key] for key in ("model", "temperature", "batch", "length", "vocab", "steps")}
        (loop,) = cases("bench_samplers", contender="loop", **same)
        yield {"effml": ours, "loop": loop}


def _rate(case: Case) -> str:
    return f"{fixed(case['tokens_per_s'], 0)} tokens/s, {fixed(case['peak_mib'], 0)} MiB"


def _each(of: dict[str, Case], key: str, unit: float = 1.0) -> str:
    return " and ".join(fixed(of[peer][key] / unit, 2) for peer in PEERS)


def _beyond(case: Case) -> str:
    return f"{_percent(abs(case['over_forward']), 1)} {'less' if case['over_forward'] < 0 else 'more'}"


def _solved(row: dict[str, Any]) -> str:
    return f"{fixed(row['solved (%)'], 1)} ± {fixed(row['± 95%'], 1)}"


def _percent(share: float, decimals: int = 0) -> str:
    return f"{fixed(100 * share, decimals)}%"
