"""Rates at which programs run in the sandbox and completions are verified, against a fresh interpreter per program.

    python packages/effml-rl/benchmarks/bench_sandbox.py --table
    python packages/effml-rl/benchmarks/bench_sandbox.py --seconds 0.5 --workers 1

One JSON line per case on stdout: items per second of wall time, and `times_faster` where there is a contender, all
timed in turn, each number of workers too: medians over rounds, and of ratios within a round. `interpreter` is the usual
way, as many at a time: `python -I -S -B` per program, which prints its value, with a time limit and no other guard.
`exec` runs the program in the trainer's own process: it is what the sandbox spares the trainer, and the bound on the
rate. For timeouts, `seconds_over` says how long after its limit a program that never ends was dead and buried.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from effml_rl.sandbox import Program, PythonSandbox
from effml_rl.verifiers import WordProblemMatch
from effml_shared.benchmarks import publish, seconds, settings
from effml_shared.data.miniature import MINIATURE_FORMATS, miniature_problems
from effml_shared.data.solution_formats import FORMATS, FormatSpec, built_in_formats
from effml_shared.data.word_problems import WordProblem, WordProblemGenerator

CALL = "simple_math_problem()"
KEYS = ("case", "contender", "workers", "per_second", "times_faster", "seconds_over")
T = TypeVar("T")
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


def rounds(contenders: Mapping[T, Work], codes: Sequence[str], least: float) -> dict[T, list[float]]:
    """Return programs per second in rounds of so many seconds each, in which all contenders take their turn."""
    for name, work in contenders.items():  # which also warms up
        if work(codes) != exec_work(codes):
            raise SystemExit(f"{name} computes something else")
    found: dict[T, list[float]] = {name: [] for name in contenders}
    spent = 0.0
    while spent < least * len(contenders) or len(next(iter(found.values()))) < 3:
        for name, work in contenders.items():
            taken = seconds(partial(work, codes))
            found[name].append(len(codes) / taken)
            spent += taken
    return found


def program_cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per contender and number of workers."""
    codes = [FORMATS["python_function"].render(p) for p in WordProblemGenerator().problems(options.programs)]
    with ExitStack() as stack:
        contenders: dict[tuple[str, int], Work] = {("exec", 0): exec_work}
        for workers in options.workers:
            sandbox = stack.enter_context(PythonSandbox(workers=workers))
            contenders["effml", workers] = sandbox_work(sandbox)
            contenders["interpreter", workers] = interpreter_work(workers)
        found = rounds(contenders, codes, options.seconds)
    for (name, workers), rates in found.items():
        row = {"case": "programs", "contender": name, "workers": workers, "per_second": statistics.median(rates)}
        if ("interpreter", workers) in found:
            ratios = [a / b for a, b in zip(rates, found["interpreter", workers], strict=True)]
            row["times_faster"] = statistics.median(ratios)
        yield {**row, "per_second_all": [round(rate, 1) for rate in rates]}


def timeout_case(least: float) -> dict[str, Any]:
    with PythonSandbox(timeout=0.2, workers=1) as sandbox:
        sandbox.run(Program("1", last_expression=True))  # the server starts
        over = []
        for _ in range(max(3, int(least / 0.2))):
            start = time.perf_counter()
            execution = sandbox.run(Program("while True: pass"))
            over.append(time.perf_counter() - start - 0.2)
            if execution.status != "timeout":
                raise SystemExit(f"got {execution.status} for a program that never ends")
    return {"case": "timeouts of 0.2 s", "workers": 1, "seconds_over": statistics.median(over)}


def verifier_cases(workers: int, completions: int, least: float) -> Iterator[dict[str, Any]]:
    with PythonSandbox(workers=workers) as sandbox:
        built_in = WordProblemMatch(sandbox, built_in_formats(*FORMATS))
        problems = WordProblemGenerator().problems(completions)
        for spec in FORMATS.values():
            yield verifier_case(built_in, spec, problems, workers, least)
    miniature = WordProblemMatch(None, MINIATURE_FORMATS)
    for spec in MINIATURE_FORMATS:
        yield verifier_case(miniature, spec, miniature_problems().problems(completions), 1, least)


def verifier_case(
    verifier: WordProblemMatch, spec: FormatSpec, problems: Sequence[WordProblem], workers: int, least: float
) -> dict[str, Any]:
    texts, golds = [spec.render(problem) for problem in problems], [problem.answer for problem in problems]
    prompts, times = [problem.question for problem in problems], list[float]()
    while sum(times) < least or len(times) < 3:
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
    parser.add_argument("--programs", type=int, default=50, help="per round")
    parser.add_argument("--seconds", type=float, default=15.0, help="of programs, per contender")
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()

    rows = itertools.chain(
        program_cases(options),
        [timeout_case(options.seconds / 3)],
        verifier_cases(max(options.workers), 4 * options.programs, options.seconds / 10),
    )
    publish(settings(options), ({"contender": "effml", **row} for row in rows), KEYS, table=options.table)


if __name__ == "__main__":
    main()
