"""Rates at which programs run in the sandbox and completions are verified, against a fresh interpreter per program.

    python packages/effml-rl/benchmarks/bench_sandbox.py --table
    python packages/effml-rl/benchmarks/bench_sandbox.py --seconds 0.5 --workers 1

One JSON line per case on stdout: items per second of wall time, and `times_faster` where there is a contender, both
timed in turn. `interpreter` is the usual way, as many at a time: `python -I -S -B` per program, which prints its value,
with a time limit and no other guard. `exec` runs the program in the trainer's own process: it is what the sandbox
spares the trainer, and the bound on the rate. For timeouts, `seconds_over` says how long after its limit a program that
never ends was dead and buried.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from effml_rl.sandbox import Program, PythonSandbox
from effml_rl.verifiers import WordProblemMatch
from effml_shared.data.miniature import MINIATURE_FORMATS, miniature_problems
from effml_shared.data.solution_formats import FORMATS, FormatSpec, built_in_formats
from effml_shared.data.word_problems import WordProblem, WordProblemGenerator

CALL = "simple_math_problem()"
KEYS = ("case", "contender", "workers", "per_second", "times_faster")
Work = Callable[[Sequence[str]], list[Any]]


def sandbox_work(sandbox: PythonSandbox) -> Work:
    def work(codes: Sequence[str]) -> list[Any]:
        return [execution.values[0] for execution in sandbox.run_many([Program(code, (CALL,)) for code in codes])]

    return work


def interpreter_work(workers: int) -> Work:
    def one(code: str) -> Any:
        command = [sys.executable, "-I", "-S", "-B", "-c", f"{code}\nprint({CALL})"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3, check=True)
        return json.loads(done.stdout)

    def work(codes: Sequence[str]) -> list[Any]:
        with ThreadPoolExecutor(workers) as threads:
            return list(threads.map(one, codes))

    return work


def exec_work(codes: Sequence[str]) -> list[Any]:
    values = []
    for code in codes:
        names: dict[str, Any] = {}
        exec(code, names)
        values.append(eval(CALL, names))
    return values


def rates(contenders: dict[str, Work], codes: Sequence[str], seconds: float) -> dict[str, float]:
    """Return programs per second: the median over rounds in which each contender does all of them in turn."""
    for name, work in contenders.items():
        if work(codes) != exec_work(codes):
            raise SystemExit(f"{name} computes something else")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    while sum(map(sum, times.values())) < seconds * len(contenders) or len(next(iter(times.values()))) < 3:
        for name, work in contenders.items():
            start = time.perf_counter()
            work(codes)
            times[name].append(time.perf_counter() - start)
    return {name: len(codes) / statistics.median(spent) for name, spent in times.items()}


def program_cases(workers: int, programs: int, seconds: float) -> Iterator[dict[str, Any]]:
    codes = [FORMATS["python_function"].render(p) for p in WordProblemGenerator().problems(programs)]
    with PythonSandbox(workers=workers) as sandbox:
        contenders = {"effml": sandbox_work(sandbox), "interpreter": interpreter_work(workers)}
        found = rates(contenders, codes, seconds)
        for name, rate in found.items():
            faster = {"times_faster": rate / found["interpreter"]}
            yield {"case": "programs", "contender": name, "workers": workers, "per_second": rate, **faster}


def timeout_case(seconds: float) -> dict[str, Any]:
    with PythonSandbox(timeout=0.2, workers=1) as sandbox:
        sandbox.run(Program("1", last_expression=True))  # the server starts
        over = []
        for _ in range(max(3, int(seconds / 0.2))):
            start = time.perf_counter()
            execution = sandbox.run(Program("while True: pass"))
            over.append(time.perf_counter() - start - 0.2)
            if execution.status != "timeout":
                raise SystemExit(f"got {execution.status} for a program that never ends")
    return {"case": "timeouts of 0.2 s", "workers": 1, "seconds_over": statistics.median(over)}


def verifier_cases(workers: int, completions: int, seconds: float) -> Iterator[dict[str, Any]]:
    with PythonSandbox(workers=workers) as sandbox:
        built_in = WordProblemMatch(sandbox, built_in_formats(*FORMATS))
        problems = WordProblemGenerator().problems(completions)
        for spec in FORMATS.values():
            yield verifier_case(built_in, spec, problems, workers, seconds)
    miniature = WordProblemMatch(None, MINIATURE_FORMATS)
    for spec in MINIATURE_FORMATS:
        yield verifier_case(miniature, spec, miniature_problems().problems(completions), 1, seconds)


def verifier_case(
    verifier: WordProblemMatch, spec: FormatSpec, problems: Sequence[WordProblem], workers: int, seconds: float
) -> dict[str, Any]:
    texts, golds = [spec.render(problem) for problem in problems], [problem.answer for problem in problems]
    prompts, times = [problem.question for problem in problems], list[float]()
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        verdicts = verifier(prompts, texts, golds)
        times.append(time.perf_counter() - start)
        if not all(verdict.status == "correct" for verdict in verdicts):
            raise SystemExit(f"a right solution in format {spec.name} is not found correct")
    rate = len(texts) / statistics.median(times)
    return {"case": f"verified, {spec.name}", "workers": workers, "per_second": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--programs", type=int, default=200, help="per round")
    parser.add_argument("--seconds", type=float, default=5.0, help="wall time per case and contender")
    parser.add_argument("--table", action="store_true", help="a readable table instead of JSON lines")
    options = parser.parse_args()

    def rows() -> Iterator[dict[str, Any]]:
        codes = [FORMATS["python_function"].render(p) for p in WordProblemGenerator().problems(options.programs)]
        (rate,) = rates({"exec": exec_work}, codes, options.seconds / 5).values()
        yield {"case": "programs", "contender": "exec", "workers": 0, "per_second": rate}
        for workers in options.workers:
            yield from program_cases(workers, options.programs, options.seconds)
        yield timeout_case(options.seconds)
        yield from verifier_cases(max(options.workers), options.programs, options.seconds / 5)

    for row in rows():
        row = {"contender": "effml", **row}
        if not options.table:
            print(json.dumps(row), flush=True)
            continue
        cells = [f"{row[key]:,.1f}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in KEYS]
        last = f"{row['seconds_over']:.3f} s over" if "seconds_over" in row else f"{cells[3]}/s"
        print(f"{cells[0]:28}{cells[1]:13}{cells[2]:>3} workers {last:>16}  {cells[4]:>6}", flush=True)


if __name__ == "__main__":
    main()
