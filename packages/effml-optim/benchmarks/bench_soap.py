"""Time one step of SOAP, batched by shape and parameter by parameter: one JSON line per case.

Both paths run in one process on the same gradients, alternating, over whole refresh periods after a warm-up period.
`median_ms` is a typical step, `max_ms` the dearest one (with the refresh), `mean_ms` what training pays. `adamw` is
torch's AdamW on the same parameters, for scale.

    python packages/effml-optim/benchmarks/bench_soap.py [--device cuda] [--periods 3]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from effml_optim import SOAP
from torch.nn import Parameter

CASES = {
    "48 of 64x64": [(64, 64)] * 48,
    "12 of 256x256": [(256, 256)] * 12,
    "4 blocks of width 256": [shape for _ in range(4) for shape in [(256, 256)] * 4 + [(1024, 256), (256, 1024)]],
    "12 blocks of width 768": [shape for _ in range(12) for shape in [(768, 768)] * 4 + [(3072, 768), (768, 3072)]],
}


def milliseconds(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, device: torch.device, frequency: int, periods: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = CASES[name]
    sets = [[Parameter(torch.zeros(shape, device=device)) for shape in shapes]]
    sets += [copy.deepcopy(sets[0]) for _ in range(2)]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "batched": SOAP(sets[0], precondition_frequency=frequency),
        "one_by_one": SOAP(sets[1], precondition_frequency=frequency, foreach=False),
        "adamw": torch.optim.AdamW(sets[2]),
    }
    times: dict[str, list[float]] = {path: [] for path in optimizers}
    for step in range(1 + frequency * (1 + periods)):
        for params in zip(*sets, strict=True):
            grad = torch.randn(params[0].shape, generator=generator, device=device)
            for param in params:
                param.grad = grad
        for path, optimizer in optimizers.items():
            elapsed = milliseconds(optimizer, device)
            if step > frequency:
                times[path].append(elapsed)
    gflop = (
        sum(6 * m * n * (m + n) + (4 * m * n * (m + n) + 14 / 3 * (m**3 + n**3)) / frequency for m, n in shapes) / 1e9
    )
    report: dict[str, Any] = {"case": name, "frequency": frequency, "gflop_per_step": round(gflop, 3)}
    for path, values in times.items():
        summary = {"median_ms": statistics.median(values), "mean_ms": statistics.mean(values), "max_ms": max(values)}
        report[path] = {key: round(value, 3) for key, value in summary.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--periods", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(CASES)[:3], choices=list(CASES))
    options = parser.parse_args()
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    for name in options.cases:
        result = measure(name, device, options.frequency, options.periods)
        print(json.dumps({**result, "device": where, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
