"""Numbers of README.md: the first claim of every experiment, and the time beside what people use today."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from measured.markdown import fixed, measurement, number, paragraph, settings, table
from measured.results import RESULTS, cases, line, lines, run

BENCHES = {  # one of each package, in the order of the page
    "optim": "bench_soap",
    "quant": "bench_linear",
    "arch": "bench_recurrent",
    "diffusion": "bench_training",
    "rl": "bench_grpo",
    "eval": "bench_sae",
}
PACKAGES = tuple(BENCHES)


def _experiments() -> Iterator[str]:
    for package in PACKAGES:
        yield from sorted(path.name.removesuffix(".cpu.json") for path in RESULTS.glob(f"{package}.*.cpu.json"))


def verdicts() -> str:
    """Return how many claims were judged, and how."""
    found = [verdict["verdict"] for name in _experiments() for verdict in run(name)["claims"]]
    held, failed, open_ = (found.count(verdict) for verdict in ("holds", "does not hold", "inconclusive"))
    return paragraph(f"""
        Of {len(found)} claims in {len(list(_experiments()))} experiments, {held} hold on a CPU, {failed} do not, and
        {open_} are inconclusive: a few seeds of a small model do not tell. The table has the claim that each experiment
        names first, whatever came of it; the packages' pages have them all, what limits them, and what a test at the
        paper's size would need.
    """)


def claims() -> str:
    """Return the first claim of each experiment, and the count of all of them."""
    rows = []
    for name in _experiments():
        judged = run(name)["claims"]
        claim = judged[0]["claim"]
        held = sum(verdict["verdict"] == "holds" for verdict in judged)
        package = name.partition(".")[0]
        rows.append(
            (
                f"[`{name}`](packages/effml-{package}/README.md#the-claims-re-tested)",
                claim["text"],
                claim["paper"],
                " ".join(measurement(judged[0])),
                judged[0]["verdict"],
                f"{held} of {len(judged)}",
            )
        )
    return table(
        ("experiment", "its first claim", "in the paper", "here, 95% interval", "verdict", "claims that hold"), rows
    )


def setting() -> str:
    """Return what the rows of `speed` were measured with."""
    threads: dict[int, list[str]] = {}
    known: dict[str, Any] = {}
    for package, bench in BENCHES.items():
        for case in cases(bench)[:1]:
            known |= {key: case[key] for key in ("cpu", "cpu_model", "torch") if key in case}
            threads.setdefault(case["threads"], []).append(package)
    usual = max(threads, key=lambda count: len(threads[count]))
    others = [f"{', '.join(of)}: {count}" for count, of in threads.items() if count != usual]
    return paragraph(f"""
        {settings({**known, "threads": usual})}{f" ({'; '.join(others)})" if others else ""}; medians in one process,
        results compared before anything is timed. Below 1, the other is faster.
    """)


def speed() -> str:
    """Return how many times as long the alternatives take; below 1, they are the faster ones."""
    rows = [_soap(), *_casts(), _recurrent(), *_diffusion(), *_policies(), _concepts()]
    return table(
        ("what", "times as long as effml's", "again, and raw"),
        [
            (
                what,
                ", ".join(
                    f"{peer} **{fixed(ratio, 1) if ratio >= 0.5 else number(ratio, 1)}**"
                    for peer, ratio in ratios.items()
                ),
                f"`nox -s bench -- {package}`, [{bench}](docs/results/bench_{bench}.cpu.jsonl)",
            )
            for what, ratios, package, bench in rows
        ],
    )


Row = tuple[str, dict[str, float], str, str]  # what, each alternative's time over ours, package, benchmark


def _soap() -> Row:
    step = {
        one["optimizer"]: one["mean_ms"]
        for frequency in (10, None)
        for one in lines("bench_soap", list="gpt2-124m", frequency=frequency)
    }
    peers = {"pytorch_optimizer": "pytorch_optimizer", "heavyball": "HeavyBall", "adamw-fused": "a step of AdamW"}
    ratios = {name: step[peer] / step["soap"] for peer, name in peers.items()}
    return "step of SOAP, matrices of GPT-2, bases renewed every 10 steps", ratios, "optim", "soap"


def _casts() -> Iterator[Row]:
    for name, key in (("MXFP8", "mxfp8_e4m3"), ("MXFP4", "mxfp4")):
        where = {"case": "fake", "format": key, "millions": 64, "dtype": "float32"}
        ratios = {
            peer: line("bench_cast", contender=contender, **where)["ours_is_faster"]
            for contender, peer in (("torchao", "torchao"), ("clone", "copying"))
        }
        yield f"casting 64 million float32 numbers to {name} and back", ratios, "quant", "cast"


def _recurrent() -> Row:
    peers = {
        "naive": "autograd through the loop",
        "lucidrains": "lucidrains (a variant)",
        "standard": "a standard layer",
    }
    found = {one["contender"]: one["tiled_is_faster"] for one in lines("bench_recurrent", length=2048)}
    found["standard"] = min(found["standard"], found.get("causal", found["standard"]))  # a mask, or the causal flag
    ratios = {name: found[peer] for peer, name in peers.items()}
    return "layer of the Recurrent Transformer, forward and backward, 2,048 tokens", ratios, "arch", "recurrent"


def _diffusion() -> Iterator[Row]:
    for vocab in (32000, 258):
        ratios = {
            name: line("bench_training", vocab=vocab, contender=peer)["times_faster"]
            for peer, name in (("mdlm", "MDLM"), ("llada", "LLaDA"))
        }
        yield f"training step of masked diffusion, vocabulary of {vocab:,}", ratios, "diffusion", "training"


def _policies() -> Iterator[Row]:
    for precision in ("bfloat16", "float32"):
        ratio = line("bench_grpo", precision=precision, contender="effml")["times_faster"]
        yield f"step of GRPO in {precision}, on the same Llama", {"TRL": ratio}, "rl", "grpo"
    ratio = line("bench_sweep", contender="effml")["times_faster"]
    yield "sampling over 13 temperatures", {"loops over `generate`": ratio}, "rl", "sweep"


def _concepts() -> Row:
    peers = {"dictionary_learning": "dictionary_learning", "sae_lens": "SAELens"}
    ratios = {name: line("bench_sae", kind="topk", contender=peer)["times_faster"] for peer, name in peers.items()}
    return "training step of a TopK autoencoder, 16,384 concepts", ratios, "eval", "sae"
