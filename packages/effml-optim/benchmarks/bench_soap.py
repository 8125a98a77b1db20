"""SOAP against its peers: same gradients, same process, same threads. One JSON line per case on stdout.

    python packages/effml-optim/benchmarks/bench_soap.py --table
    python packages/effml-optim/benchmarks/bench_soap.py --lists gpt2-124m --blocks 12 --table
    python packages/effml-optim/benchmarks/bench_soap.py --lists tiny --heavyball-compile none --official soap.py

Peers are timed if they are installed (`uv pip install pytorch-optimizer heavyball`, into an environment of its own);
`--official` takes a copy of soap.py from github.com/nikhilvyas/SOAP. All are set to the same algorithm: lr 3e-3, betas
and Shampoo beta 0.95, eps 1e-8, no weight decay, no merging of axes, no factor for axes above 10000.

First, updates are compared: on small matrices whose bases the first gradient determines, 13 updates with 4 refreshes,
gradients of unequal rows and columns. Differences are relative to the way the weights have gone. `equal` means at most
1e-5 in float64 for every tensor, which shows the conventions, and at most 3e-4 in float32 for the median tensor (in the
worst one rounding may have swapped two nearly equal eigenvalues). HeavyBall is compared uncompiled. Whatever is not
equal is timed all the same and marked, with the convention that differs if it is known.

Then steps are timed, optimizers and limits in turn. A step is plain or renews the bases; at a precondition frequency of
2 these alternate, and every timed step is checked to be what it should be. Medians of both make up a period of f steps,
f - 1 of them plain: `mean_ms` is what training pays, `median_ms` a typical step, `worst_ms` the dearest. With
`stagger=True` every step renews some bases: one real period of 10 is timed. AdamW and Muon (embeddings, heads and
vectors by AdamW) are there for scale, and `soap-no-onednn` for what oneDNN brings: `torch.backends.mkldnn` switched
off. `warm_up_s` is the first call and one step of each kind, compilation included. Python's garbage is collected
between steps, as torch.compile leaves much of it.

Small lists are timed `--runs` times, one run after the other, with the same optimizers: `run` numbers them, and how far
they lie apart is how far to trust them. Optimizers whose states are too large to be there at once take no turns: they
are timed one after the other, the first of them in turn with the limits.

Limits, measured here: 6 mn(m + n) FLOPs per matrix and step, which is also what SOAP here multiplies (symmetric rank-k
products would need 5), at the best rate of its own products; per refresh and side of size d one `torch.linalg.qr` and
2 d^3 FLOPs; and 28 bytes per element at the bandwidth of a copy. The better of two in each turn, medians over turns.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from effml_optim import SOAP, Muon, __version__
from effml_optim.matrix.products import matmul
from effml_shared.benchmarks import publish, say, seconds, settings
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Shape = tuple[int, ...]
FREQUENCIES, STAGGERED, ALTERNATING, WARM_UP, MAX_DIM = (1, 10, 100), 10, 2, 3, 10000
COMMON: dict[str, Any] = {"lr": 3e-3, "betas": (0.95, 0.95), "shampoo_beta": 0.95, "weight_decay": 0.0}
CHECKED: list[Shape] = [(16, 16), (24, 24), (24, 24), (24, 24), (20, 20), (24, 23), (12, 13), (40, 24), (40,)]
GPT2_BLOCK = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (2304,), (768,), (3072,), *[(768,)] * 5]


class List(NamedTuple):
    """Shapes of parameters: embeddings and heads, a block, the rest; what of them is timed by default, how often."""

    outside: list[Shape]
    block: list[Shape]
    last: list[Shape]
    blocks: int
    runs: int
    samples: int  # timed steps of each kind in a run

    def shapes(self, blocks: int) -> list[Shape]:
        return [*self.outside, *self.block * blocks, *self.last]


LISTS = {
    "tiny": List([(32, 32)], [(16, 16), (24, 16), (16, 24), (16,)], [], 2, 2, 2),
    "small": List([(256, 256)] * 2, [*[(256, 256)] * 4, (1024, 256), (256, 1024)], [], 4, 5, 3),
    "gpt2-124m": List([(50257, 768), (1024, 768)], GPT2_BLOCK, [(768,)] * 2, 2, 1, 2),  # two of its twelve blocks
}
PACKAGES = ("pytorch-optimizer", "heavyball")  # peers
MEMORY_GB = 12.0  # more than this, and optimizers are timed one after the other
HEAVYBALL = (
    "eps is a lower bound of the root instead of added to it; before QR, max(eps, 64 d machine epsilons) times the"
    " largest eigenvalue is added to a factor of size d (0.6% of it for d = 768 in float32), so small ones turn slower"
)


class Settings(NamedTuple):
    frequency: int = ALTERNATING
    eps: float = 1e-8
    max_dim: int = MAX_DIM
    outside: int = 0  # how many of the first parameters are embeddings and heads
    heavyball_compile: str | None = None


Build = Callable[[list[Parameter], Settings], Optimizer]


class Contender(NamedTuple):
    """`kind` is ours, peer or scale; `dtypes` are those to compare updates in; `convention` is known to differ."""

    name: str
    version: str
    kind: str
    build: Build
    frequency: int | None = ALTERNATING
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    convention: str = "not known"


def builder(soap: Any, limit: str = "max_precond_dim", **extra: Any) -> Build:
    def build(params: list[Parameter], s: Settings) -> Optimizer:
        options = {"precondition_frequency": s.frequency, limit: s.max_dim, "eps": s.eps, **COMMON, **extra}
        return soap(params, merge_dims=False, correct_bias=True, **options)

    return build


def without_onednn(params: list[Parameter], s: Settings) -> Optimizer:
    optimizer = builder(SOAP)(params, s)
    step = optimizer.step

    def plain(*args: Any) -> Any:
        before, *_ = torch.backends.mkldnn.set_flags(False)
        try:
            return step(*args)
        finally:
            torch.backends.mkldnn.set_flags(before)

    optimizer.step = plain  # type: ignore[method-assign]
    return optimizer


def heavyball(params: list[Parameter], s: Settings) -> Optimizer:
    options = {"storage_dtype": str(params[0].dtype)[6:], "max_precond_dim": s.max_dim, "eps": s.eps, **COMMON}
    module = importlib.import_module("heavyball")
    module.utils.compile_mode = s.heavyball_compile
    optimizer = module.SOAP(params, merge_dims=False, **options)
    # By itself it adds 1/f up and refreshes at whole numbers: one update earlier, unless rounding delays it.
    optimizer.precond_schedule = lambda call: float(call > 1 and (call - 1) % s.frequency == 0)
    return optimizer


def muon(params: list[Parameter], s: Settings) -> Optimizer:
    matrices = [p for p in params[s.outside :] if p.ndim == 2]
    rest = [*params[: s.outside], *(p for p in params[s.outside :] if p.ndim < 2)]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "use_adamw": True}]
    return Muon(groups)


def contenders(options: argparse.Namespace) -> list[Contender]:
    """Return SOAP and its variants, the peers that are installed, and AdamW and Muon."""
    stagger = builder(SOAP, stagger=True, precondition_frequency=STAGGERED)
    found = [Contender("soap", __version__, "ours", builder(SOAP), dtypes=())]
    found += [Contender("soap-stagger", __version__, "ours", stagger, STAGGERED, dtypes=())]
    if options.device.type == "cpu" and torch.backends.mkldnn.is_available():
        found += [Contender("soap-no-onednn", __version__, "ours", without_onednn, dtypes=())]
    if options.device.type == "cuda":
        found += [Contender("soap-cholqr", __version__, "ours", builder(SOAP, basis_update="cholqr"))]
    single = (torch.float32,)
    if "product_dtype" in inspect.signature(SOAP).parameters:
        build, text = builder(SOAP, product_dtype=torch.bfloat16), "products are in bfloat16"
        found += [Contender("soap-bf16", __version__, "ours", build, dtypes=single, convention=text)]
    for package in PACKAGES:
        if not importlib.util.find_spec(name := package.replace("-", "_")):
            say(f"{package} is not installed and left out: uv pip install {package}")
            continue
        module, version = importlib.import_module(name), importlib.metadata.version(package)
        if name == "heavyball":
            modes = {"shipped": module.utils.compile_mode, "none": None}
            options.heavyball_compile = modes.get(options.heavyball_compile, options.heavyball_compile)
            version += f", compile mode {options.heavyball_compile}"
            found += [Contender(name, version, "peer", heavyball, convention=HEAVYBALL)]
        else:
            found += [Contender(name, version, "peer", builder(module.SOAP, "max_precondition_dim"))]
    if options.official:  # takes eigenvectors in float32 whatever the gradients
        spec: Any = importlib.util.spec_from_file_location("official_soap", options.official)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "SOAP"):
            sys.exit(f"--official: {options.official} defines no SOAP")
        found += [Contender("official", options.official.name, "peer", builder(module.SOAP), dtypes=single)]
    adamw: Build = lambda params, _: torch.optim.AdamW(params, fused=True)  # noqa: E731
    found += [Contender("adamw-fused", torch.__version__, "scale", adamw, None, ())]
    found += [Contender("muon", __version__, "scale", muon, None, ())]
    if unknown := set(options.only or ()) - {contender.name for contender in found}:
        sys.exit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in found)}")
    return [contender for contender in found if contender.name in (options.only or contender.name)]


def trajectory(build: Build, dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """Return the weights, starting from 0, after each of 13 updates."""
    generator, history = torch.Generator().manual_seed(0), []
    params = [Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in CHECKED]
    optimizer = build(params, Settings(frequency=3, eps=1e-12, max_dim=30))
    for _ in range(14):
        for param in params:
            gradient = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            scales = [torch.logspace(0.5, -0.5, size, dtype=torch.float64) for size in param.shape]
            gradient *= scales[0].outer(scales[1]) if param.ndim == 2 else scales[0]
            param.grad = gradient.to(device, dtype)
        optimizer.step()
        history.append([param.detach().double().clone() for param in params])
    return history[1:]


def compare(contender: Contender, device: torch.device) -> dict[str, Any]:
    """Return how far a contender's updates are from SOAP's, and whether that is equal."""
    report: dict[str, Any] = {"equal": True if contender.dtypes else None}
    for dtype in contender.dtypes:
        steps = zip(trajectory(builder(SOAP), dtype, device), trajectory(contender.build, dtype, device), strict=True)
        each = [[((b - a).norm() / a.norm()).item() for a, b in zip(*pair, strict=True)] for pair in steps]
        of_tensors = [max(values) for values in zip(*each, strict=True)]
        worst, median = max(of_tensors), statistics.median(of_tensors)
        report[f"difference_{str(dtype)[6:]}"] = {"worst": float(f"{worst:.1e}"), "median": float(f"{median:.1e}")}
        if dtype == torch.float64 and not worst <= 1e-5:  # so that NaN is not equal
            report |= {"equal": False, "convention": "not known"}
        elif dtype == torch.float32 and not median <= 3e-4:  # explained only if float64 agrees
            report = {"convention": contender.convention, **report, "equal": False}
    return report


class Run:
    """One optimizer at work: its parameters, and the milliseconds of timed steps, plain ones and refreshes."""

    def __init__(
        self, contender: Contender, chosen: List, blocks: int, samples: int, options: argparse.Namespace
    ) -> None:
        self.contender, self.device, self.calls, self.warm_up_s = contender, options.device, 0, 0.0
        self.name, self.in_a_run = contender.name, STAGGERED if contender.frequency == STAGGERED else 2 * samples
        self.params = [Parameter(torch.zeros(shape, device=self.device)) for shape in chosen.shapes(blocks)]
        settings = Settings(outside=len(chosen.outside), heavyball_compile=options.heavyball_compile)
        self.optimizer = contender.build(self.params, settings)
        self.probe = min((p for p in self.params if p.ndim == 2 and max(p.shape) <= MAX_DIM), key=Tensor.numel)
        self.times: dict[bool, list[float]] = {False: [], True: []}

    def step(self, gradients: list[Tensor]) -> float:
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient.clone()
        before = [basis.clone() for basis in self._bases()]
        elapsed = once(self.device, self.optimizer.step)
        for param in self.params:
            param.grad = None
        self.calls += 1
        if self.calls <= WARM_UP:
            self.warm_up_s += elapsed
            return elapsed
        renewed = any(not torch.equal(old, new) for old, new in zip(before, self._bases(), strict=True))
        if self.contender.frequency == ALTERNATING and renewed == bool((self.calls - 1) % ALTERNATING):
            raise RuntimeError(f"update {self.calls - 1} has {'renewed' if renewed else 'kept'} its bases")
        self.times[renewed].append(round(1e3 * elapsed, 4))
        return elapsed

    def _bases(self) -> list[Tensor]:
        found = tensors(self.optimizer.state.get(self.probe, {}))
        return [tensor for path, tensor in found if re.search(r"/basis_\d|[/_]Q(_|/|$)", path)]

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield one record per precondition frequency f of what was timed since the last time."""
        contender, plain, refresh = self.contender, self.times[False], self.times[True]
        self.times = {False: [], True: []}
        storages = [tensor.untyped_storage() for _, tensor in tensors(list(self.optimizer.state.values()))]
        extra: dict[str, Any] = {"kind": contender.kind, "version": contender.version}
        extra["state_bytes"] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        extra |= {"warm_up_s": round(self.warm_up_s, 2), "plain_steps_ms": plain, "refresh_steps_ms": refresh}
        if contender.frequency is None:
            yield record(contender.name, None, [statistics.median(plain)], **extra)
        elif contender.frequency == STAGGERED:
            if len(refresh) != 1:
                raise RuntimeError(f"{contender.name}: {len(refresh)} refreshes of one matrix in one period")
            yield record(contender.name, STAGGERED, plain + refresh, **extra)
        else:
            typical = statistics.median(plain)
            for f in FREQUENCIES:
                yield record(contender.name, f, [typical] * (f - 1) + [statistics.median(refresh)], **extra)


def record(optimizer: str, frequency: int | None, period: list[float], **extra: Any) -> dict[str, Any]:
    values = {"mean_ms": statistics.mean(period), "median_ms": statistics.median(period), "worst_ms": max(period)}
    rounded = {name: round(value, 4) for name, value in values.items()}
    return {"optimizer": optimizer, "frequency": frequency, **rounded, **extra}


def tensors(node: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield path, node
    elif isinstance(node, Mapping | list | tuple):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from tensors(value, f"{path}/{key}")


def once(device: torch.device, work: Callable[..., Any], *args: Any) -> float:
    """Return the seconds that some work takes. No garbage is collected meanwhile."""
    gc.disable()
    try:
        return seconds(partial(work, *args), device.type)
    finally:
        gc.enable()


def guarded(contender: Contender, work: Callable[..., Any], *args: Any) -> Any:
    """Return what `work` returns, or None if it belongs to a peer and fails: that peer is then left out."""
    try:
        return work(*args)
    except Exception as error:
        if contender.kind != "peer":
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        say(f"{contender.name} {contender.version} fails and is left out: {type(error).__name__}: {first}")
        return None


class Limits:
    """What no implementation of these products can beat on this machine, measured once a turn."""

    name = "limits"

    def __init__(self, shapes: list[Shape], samples: int, device: torch.device) -> None:
        self.device, self.in_a_run = device, 2 * samples
        self.counts = Counter(shape for shape in shapes if len(shape) == 2)
        sides = {d: sum(k * s.count(d) for s, k in self.counts.items()) for s in self.counts for d in s}
        self.sides = {d: count for d, count in sides.items() if d <= MAX_DIM}
        self.elements = sum(map(math.prod, shapes))
        self.times: dict[tuple[Any, ...], list[float]] = {}
        self.sources = {d: torch.randn(d, d, device=device) for d in self.sides}
        self.copied = torch.ones(2**26, device=device)
        self.copy = torch.zeros_like(self.copied)

    def step(self, gradients: list[Tensor]) -> float:
        """Time each product, decomposition and copy twice, and keep the better time."""
        before = time.perf_counter()
        for dtype in ("float32", "bfloat16"):
            for (m, n), count in self.counts.items():
                if max(m, n) <= MAX_DIM:
                    k = max(1, min(count, 2**22 // (m * n))) if self.device.type == "cuda" else 1
                    sizes = ((k, m, m), (k, m, n), (k, n, n))
                    left, x, right = (torch.randn(size, device=self.device).to(getattr(torch, dtype)) for size in sizes)
                    for case, (a, b) in enumerate(((left, x), (x, right), (x, x.mT), (x.mT, x))):
                        work = 2 * k * a.shape[1] * a.shape[2] * b.shape[2]
                        self._add((dtype, m, n, case, "torch", work), torch.bmm, a, b)
                        self._add((dtype, m, n, case, "ours", work), matmul, a, b)
        for d, source in self.sources.items():
            self._add(("qr", d), torch.linalg.qr, source)
        self._add(("copy",), self.copy.copy_, self.copied)
        return time.perf_counter() - before

    def _add(self, key: tuple[Any, ...], work: Callable[..., Any], *args: Any) -> None:
        best = min(once(self.device, work, *args) for _ in range(2))
        self.times.setdefault(key, []).append(best)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield one record per dtype of products and precondition frequency f, and one of the memory."""
        median = {key: statistics.median(times) for key, times in self.times.items()}
        self.times = {}
        flop = sum(6 * m * n * d * k for (m, n), k in self.counts.items() for d in (m, n) if d <= MAX_DIM)
        rates = {
            dtype: max(key[-1] / spent for key, spent in median.items() if key[0] == dtype)
            for dtype in ("float32", "bfloat16")
        }
        refresh = sum(k * (median["qr", d] + 2 * d**3 / rates["float32"]) for d, k in self.sides.items())
        for dtype, rate in rates.items():
            step, extra = 1e3 * flop / rate, 1e3 * refresh
            measured = {"gflop_per_step": flop / 1e9, "gflops": round(rate / 1e9, 1), "refresh_ms": round(extra, 4)}
            for f in FREQUENCIES:
                yield record(f"limit: {dtype} products", f, [step] * (f - 1) + [step + extra], **measured)
        bandwidth = 2 * self.copied.nbytes / median["copy",]
        yield record("limit: memory", None, [1e3 * 28 * self.elements / bandwidth], gb_per_s=round(bandwidth / 1e9, 1))


def measure(
    group: list[Contender], chosen: List, blocks: int, runs: int, samples: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Time optimizers and limits in turn, each optimizer on its own copy of the same gradients; yield every run."""
    shapes = chosen.shapes(blocks)
    timed: list[Run | Limits] = [Run(contender, chosen, blocks, samples, options) for contender in group]
    timed.append(Limits(shapes, samples, options.device))
    calls = 0
    for number in range(runs):
        warm_up = 0 if number else WARM_UP
        for call in range(warm_up + max(one.in_a_run for one in timed)):
            generator = torch.Generator(options.device).manual_seed(1000 + calls)
            gradients = [torch.randn(shape, generator=generator, device=options.device) for shape in shapes]
            first, calls = calls % len(timed), calls + 1
            for one in timed[first:] + timed[:first]:
                if call >= one.in_a_run + (warm_up if isinstance(one, Run) else 0):
                    continue
                gc.collect()
                elapsed = guarded(one.contender, one.step, gradients) if isinstance(one, Run) else one.step(gradients)
                if elapsed is None:
                    timed.remove(one)
                elif elapsed > 2:
                    say(f"{one.name}: call {call + 1} took {elapsed:.1f} s")
        for one in timed:
            yield from ({"run": number + 1, **case} for case in one.records())


def over_runs(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record per optimizer and frequency, with the medians of its times over runs."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in cases:
        found.setdefault((case["optimizer"], case["frequency"]), []).append(case)
    keys = ("mean_ms", "median_ms", "worst_ms")
    return [{**of[0], **{key: statistics.median(one[key] for one in of) for key in keys}} for of in found.values()]


def table(cases: list[dict[str, Any]]) -> str:
    rows = [("optimizer", "f", "mean ms", "median ms", "worst ms", "state MB", "x fastest peer", "equal")]
    for f in (None, *FREQUENCIES):
        group = sorted((case for case in cases if case["frequency"] == f), key=lambda case: case["mean_ms"])
        fastest = min((case["mean_ms"] for case in group if case.get("kind") == "peer"), default=None)
        for case in group:
            times = [f"{case[name]:.3f}" for name in ("mean_ms", "median_ms", "worst_ms")]
            state = f"{case['state_bytes'] / 1e6:.1f}" if "state_bytes" in case else ""
            ratio = f"{case['mean_ms'] / fastest:.2f}" if fastest else ""
            equal = {None: "", True: "yes", False: "NO"}[case.get("equal")]
            rows.append((case["optimizer"], str(f or "-"), *times, state, ratio, equal))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    differing = {case["optimizer"]: case["convention"] for case in cases if "convention" in case}
    return "\n".join([*lines, *(f"not equal: {name}: {text}" for name, text in differing.items())])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", nargs="+", default=["small", "gpt2-124m"], choices=list(LISTS))
    parser.add_argument("--blocks", type=int, help="so many blocks of each list instead of its own number")
    parser.add_argument("--runs", type=int, help="so many runs of each list instead of its own number")
    parser.add_argument("--samples", type=int, help="timed steps of each kind in a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="names of optimizers to take, as in the output")
    parser.add_argument("--official", type=Path, help="path of the official soap.py")
    parser.add_argument("--heavyball-compile", default="shipped", help="its torch.compile mode, `shipped` or `none`")
    parser.add_argument("--sequential", action="store_true", help="one optimizer after the other: least memory")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--table", action="store_true", help="also print a table, on stderr")
    options = parser.parse_args()
    for name in ("blocks", "runs", "samples"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    options.device = torch.device(options.device)
    if options.official and not options.official.is_file():
        parser.error(f"--official: no file {options.official}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    group = contenders(options)
    reports = {c.name: report for c in group if (report := guarded(c, compare, c, options.device))}
    group = [contender for contender in group if contender.name in reports]
    for contender in group:
        if contender.dtypes:
            say(f"{contender.name} {contender.version}: {reports[contender.name]}")
    head = settings(options, *PACKAGES) | {"matmul_precision": torch.get_float32_matmul_precision()}
    found = publish(head, cases(group, reports, options), (), table=False)
    for name in options.lists if options.table else ():
        say(f"{name}, medians over runs")
        say(table(over_runs([case for case in found if case["list"] == name])))


def cases(
    group: list[Contender], reports: Mapping[str, dict[str, Any]], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the records of every list and run."""
    names = {contender.name for contender in group}
    for name in options.lists:
        chosen = LISTS[name]
        blocks, runs, samples = (getattr(options, key) or getattr(chosen, key) for key in ("blocks", "runs", "samples"))
        shapes = chosen.shapes(blocks)
        elements = sum(map(math.prod, shapes))
        state = SOAP([Parameter(torch.empty(shape, device="meta")) for shape in shapes]).memory_report()["total"]
        each = (state + 8 * elements) / 1e9  # with weights and a gradient
        in_turn = not options.sequential and each * len(group) <= MEMORY_GB
        order = "in turn" if in_turn else "one after the other"
        say(f"{name}: {elements / 1e6:.1f} M parameters, {each:.1f} GB per optimizer, {len(group)} {order}")
        where = {"list": name, "blocks": blocks, "order": order}
        for number, part in enumerate([group] if in_turn else [[contender] for contender in group]):
            for case in measure(part, chosen, blocks, runs, samples, options):
                if case["optimizer"] in names or not number:
                    yield {**where, **case, **reports.get(case["optimizer"], {})}
            gc.collect()


if __name__ == "__main__":
    main()
