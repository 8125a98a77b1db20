"""Numbers of packages/effml-optim/README.md."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, median
from typing import Any

from measured import markdown
from measured.markdown import fixed, number, paragraph, plus_minus, settings, span, table
from measured.results import line, lines, run

LISTS = ("small", "gpt2-124m")  # of matrices, in the order of the columns
PEERS = {"heavyball": "HeavyBall", "pytorch_optimizer": "pytorch_optimizer"}
NAMES = {"soap": "`SOAP`", "soap-bf16": "`SOAP(product_dtype=torch.bfloat16)`", **PEERS}
REASONS = {"soap-bf16": "products are rounded", "heavyball": "it adds a ridge to the factors"}
LIMIT = "limit: float32 products"


def setting() -> str:
    """Return what the benchmark ran on, and how often."""
    first = lines("bench_soap", list="small", optimizer="soap")[0]
    head = next(iter(lines("bench_soap", bench="bench_soap")), {**first, "cpu": first.get("machine")})
    small, large = (len(_runs(matrices)) for matrices in LISTS)
    return paragraph(f"""
        {settings(head)}. Runs: {small} of the small list, {large} of GPT-2. The tables show medians over runs,
        sentences the range over them.
    """)


def speed() -> str:
    """Return milliseconds per step where bases are renewed every 10 steps."""
    more = {
        "soap-no-onednn": "`SOAP` without oneDNN",
        "soap-stagger": "`SOAP(stagger=True)`",
        LIMIT: "limit: 6 mn(m + n) FLOPs at the rate of large products, LAPACK's QR at refreshes",
    }
    rows = []
    for optimizer, name in {**NAMES, **more}.items():
        if not lines("bench_soap", optimizer=optimizer):
            continue
        one = _step("small", _runs("small")[0], optimizer)
        version = f" {one['version']}" if optimizer in PEERS else ""
        times = [_median(matrices, optimizer, key) for matrices in LISTS for key in ("mean_ms", "worst_ms")]
        rows.append((name + version, *times, _same_updates(one)))
    for optimizer, name in {"adamw-fused": "AdamW, fused (no products)", "muon": "`Muon`"}.items():
        small, large = (_median(matrices, optimizer, every=None) for matrices in LISTS)
        rows.append((name, small, None, large, None, "–"))
    return table(("f = 10", "small, mean", "worst step", "GPT-2, mean", "worst step", "same updates as `SOAP`"), rows)


def _same_updates(step: dict[str, Any]) -> str:
    if step.get("equal") is None:
        return "–"
    apart = f"{number(100 * step['difference_float32']['median'], 1)}% apart"
    if not step["equal"]:
        return f"no, {REASONS[step['optimizer']]}: {apart}"
    return f"yes: {apart} in float32, {step['difference_float64']['worst']:.0e} in float64"


def periods() -> str:
    """Return milliseconds per step where bases are renewed every f steps."""
    rows = [
        (name, *(_median(matrices, optimizer, every=every) for matrices in LISTS for every in (1, 10, 100)))
        for optimizer, name in NAMES.items()
    ]
    return table(("mean, f =", "small: 1", "10", "100", "GPT-2: 1", "10", "100"), rows)


def lead() -> str:
    """Return times and state beside the peers'."""
    limit = _by_list(lambda *run: _step(*run, "soap")["mean_ms"] / _step(*run, LIMIT)["mean_ms"])
    worst = _by_list(lambda *run: _step(*run, "soap-stagger")["worst_ms"] / _step(*run, "soap-stagger")["median_ms"])
    return paragraph(f"""
        At f = 10 the fastest peer takes {_lead("soap")} times as long as `SOAP` and {_lead("soap-bf16")} times as
        long as `SOAP` with bfloat16 products; `SOAP` takes {limit} times the limit, and with `stagger` its worst step
        is {worst} times the median one. State in MB: {_megabytes("soap")}, with bfloat16 {_megabytes("soap-bf16")};
        HeavyBall {_megabytes("heavyball")}, pytorch_optimizer {_megabytes("pytorch_optimizer")}.
    """)


def bound() -> str:
    """Return what a step of SOAP is spent on."""
    rate, rounded_rate = (
        span((one["gflops"] for one in lines("bench_soap", optimizer=f"limit: {dtype} products")), 3)
        for dtype in ("float32", "bfloat16")
    )
    return paragraph(f"""
        The best rate of products is {rate} GFLOP/s in float32 and {rounded_rate} in bfloat16. At f = 10 refreshes take
        {_refresh_share("soap")} percent of the time, with bfloat16 products {_refresh_share("soap-bf16")}: QR stays in
        float32, which bounds what bfloat16 can gain. {_onednn()}
    """)


def _onednn() -> str:
    """Return what oneDNN brings, if that was measured."""
    if not lines("bench_soap", optimizer="soap-no-onednn"):
        return ""
    times = _by_list(lambda *run: _step(*run, "soap-no-onednn")["mean_ms"] / _step(*run, "soap")["mean_ms"])
    return f"Without oneDNN (`torch.backends.mkldnn.enabled = False`), `SOAP` takes {times} times as long."


def losing() -> str:
    """Return where SOAP is slower, or hardly faster."""
    adamw = _by_list(lambda *run: _step(*run, "soap")["mean_ms"] / _step(*run, "adamw-fused", None)["mean_ms"])
    return paragraph(f"""
        Losing cases: `SOAP` at f = 10 takes {adamw} times as long as AdamW, which large batches hide and small ones
        do not; at f = 1 the fastest peer takes only {_lead("soap", 1)} times as long as `SOAP`.
    """)


def product_dtype() -> str:
    """Return what products in bfloat16 do to the loss."""
    trials = run("soap_product_dtype")["trials"]
    said = []
    for every in (10, 40):
        exact, rounded = (
            [trial["loss"] for name, trial in trials.items() if name.startswith(f"{dtype}/f={every}/")]
            for dtype in ("float32", "bfloat16")
        )
        gaps = [after - before for before, after in zip(exact, rounded, strict=True)]
        said.append(f"{fixed(fmean(gaps), 3)} nats at f = {every} ({fixed(min(gaps), 3)} to {fixed(max(gaps), 3)})")
    return paragraph(f"""
        What bfloat16 products add to the held-out loss of `optim.soap`'s model: {" and ".join(said)}, mean and range
        over {len(gaps)} seeds ([raw](../../docs/results/soap_product_dtype.cpu.json)).
    """)


def claims() -> str:
    """Return what both experiments judged."""
    return markdown.claims("optim.soap", "optim.seesaw")


def made() -> str:
    """Return when, on what and for how long both experiments ran."""
    return paragraph(f"{markdown.made('optim.soap')} {markdown.made('optim.seesaw')}")


def methods() -> str:
    """Return what `optim.soap` measured of each method."""
    summary = run("optim.soap")
    fresh, stale = summary["frequencies"]
    rows = [
        (
            row["method"],
            row["learning rate"],
            plus_minus(row["held-out loss (nats)"], row["± 95%"], 3),
            fixed(row[f"loss at f={stale}"], 3),
            row["ms per step"],
        )
        for row in summary["table"]
    ]
    grid = ", ".join(f"{lr:g}" for lr, _ in summary["tuning"]["SOAP"])
    head = ("method", f"learning rate (best of {grid})", f"held-out loss, nats per byte, f = {fresh}", f"f = {stale}")
    return table((*head, "ms per step"), rows)


def schedules() -> str:
    """Return what `optim.seesaw` measured of each schedule."""
    rows = [
        (
            row["schedule"].replace("p=", "ramp with p = "),
            str(row["start batch"]),
            plus_minus(row["held-out loss (nats)"], row["± 95%"], 3),
            plus_minus(row["above cosine"], row["± 95% paired"], 3),
            str(row["steps"]),
            number(row["critical batch"], 2),
        )
        for row in run("optim.seesaw")["table"]
    ]
    head = ("schedule", "start batch", "held-out loss, nats per byte", "above the cosine, paired", "serial steps")
    return table((*head, "critical batch at the end, measured"), rows)


def _runs(matrices: str) -> list[Any]:
    """Return the recorded runs of a list of matrices."""
    return [one["run"] for one in lines("bench_soap", list=matrices, optimizer="soap", frequency=10)]


def _step(matrices: str, run: Any, optimizer: str, every: int | None = 10) -> dict[str, Any]:
    return line("bench_soap", list=matrices, run=run, optimizer=optimizer, frequency=every)


def _median(matrices: str, optimizer: str, key: str = "mean_ms", every: int | None = 10) -> float:
    """Return the median over runs."""
    return median(_step(matrices, run, optimizer, every)[key] for run in _runs(matrices))


def _by_list(of_run: Callable[[str, Any], float]) -> str:
    """Return the range of a number over all recorded runs, of either list."""
    small, large = (span(of_run(matrices, run) for run in _runs(matrices)) for matrices in LISTS)
    return f"{small} (GPT-2: {large})"


def _lead(optimizer: str, every: int = 10) -> str:
    """Return how many times as long the fastest peer's steps take."""

    def of_run(*run: Any) -> float:
        return min(_step(*run, peer, every)["mean_ms"] for peer in PEERS) / _step(*run, optimizer, every)["mean_ms"]

    return _by_list(of_run)


def _refresh_share(optimizer: str) -> str:
    """Return the percentage of a period that refreshes take beyond plain steps."""

    def of_run(*run: Any) -> float:
        step = _step(*run, optimizer)
        return 100 * (step["worst_ms"] - step["median_ms"]) / step["frequency"] / step["mean_ms"]

    return _by_list(of_run)


def _megabytes(optimizer: str) -> str:
    small, large = (number(_median(matrices, optimizer, "state_bytes") / 1e6) for matrices in LISTS)
    return f"{small} (GPT-2: {large})"
