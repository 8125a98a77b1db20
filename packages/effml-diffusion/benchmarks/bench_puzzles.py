"""Rates at which puzzles are made, on one core, against a generator that counts solutions after every removal.

    python packages/effml-diffusion/benchmarks/bench_puzzles.py --table
    python packages/effml-diffusion/benchmarks/bench_puzzles.py --seconds 0.2 --boxes 2x2

One JSON line per case on stdout: items per second of processor time, and `times_faster` where there is a contender.
`counting` is the usual generator, written here: the same solver, asked after every removal whether there are two
solutions. Both make the same puzzles from the same random numbers, which is checked.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.maze_paths import MazePaths
from effml_diffusion.puzzles.sample_stream import SampleStream
from effml_diffusion.puzzles.sudoku import Sudoku
from effml_diffusion.puzzles.sudoku_samples import SudokuSamples
from effml_diffusion.puzzles.sudoku_search import Units, dig, fill, search
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_shared.benchmarks import publish, settings

CLUES = {"2x2": 5, "2x3": 12, "3x3": 30}
KEYS = ("case", "size", "contender", "per_second", "times_faster")


def dig_by_counting(units: Units, grid: Sequence[int], clues: int, rng: Random) -> list[int] | None:
    """Remove clues as long as there is one solution, counted anew each time."""
    puzzle = list(grid)
    order = list(range(len(puzzle)))
    rng.shuffle(order)
    for cell in order:
        if sum(map(bool, puzzle)) == clues:
            break
        value, puzzle[cell] = puzzle[cell], 0
        if len(search(units, puzzle, limit=2).solutions) > 1:
            puzzle[cell] = value
    return puzzle if sum(map(bool, puzzle)) == clues else None


def rate(work: Callable[[int], Any], seconds: float, *, items: int = 1) -> float:
    """Return items per second of processor time of work(0), work(1), ..., each of which makes so many."""
    start = time.process_time()
    for done in itertools.count(1):
        work(done - 1)
        spent = time.process_time() - start
        if spent >= seconds:
            return done * items / spent
    raise AssertionError("unreachable")


def sudoku_cases(boxes: str, seconds: float) -> Iterator[dict[str, Any]]:
    rules, clues = Sudoku(*map(int, boxes.split("x"))), CLUES[boxes]
    units = [(r, rules.n + c, 2 * rules.n + b) for r, c, b in rules.places.tolist()]
    grids = rules.grids(64).tolist()
    for seed, grid in enumerate(grids[:4]):
        if dig(units, grid, clues, Random(seed)) != dig_by_counting(units, grid, clues, Random(seed)):
            raise SystemExit("the generators disagree")
    yield {"case": "grids", "size": boxes, "per_second": rate(lambda i: fill(units, Random(i)), seconds)}
    rates = {
        name: rate(lambda i, by=by: by(units, grids[i % 64], clues, Random(i)), seconds)  # type: ignore[misc]
        for name, by in (("effml", dig), ("counting", dig_by_counting))
    }
    for name, value in rates.items():
        faster = {"times_faster": value / rates["counting"]}
        yield {"case": f"puzzles of {clues} clues", "size": boxes, "contender": name, "per_second": value, **faster}
    puzzles = rules.puzzles(32, clues).clues.tolist()
    check = rate(lambda i: rules.count_solutions(puzzles[i % 32]), seconds)
    yield {"case": "uniqueness checks", "size": boxes, "per_second": check}
    stream = SampleStream(SudokuSamples(SudokuTokens(rules), rules.grids(64)))
    yield {
        "case": "changed grids, batches of 256",
        "size": boxes,
        "per_second": rate(lambda i: stream.next(256), seconds, items=256),
    }


def maze_cases(n: int, seconds: float) -> Iterator[dict[str, Any]]:
    size = f"{n}x{n}"
    yield {"case": "mazes with their tables", "size": size, "per_second": rate(lambda i: table(n, i), seconds)}
    stream = SampleStream(MazePaths(Maze.random(n), inner=2))
    made = rate(lambda i: stream.next(256), seconds, items=256)
    yield {"case": "paths through 4 waypoints, batches of 256", "size": size, "per_second": made}


def table(n: int, seed: int) -> Any:
    return Maze.random(n, seed=seed).distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", nargs="+", choices=list(CLUES), default=list(CLUES))
    parser.add_argument("--mazes", nargs="*", type=int, default=[5, 10, 20], help="cells of a side")
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time per case")
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    rows = itertools.chain(
        *(sudoku_cases(boxes, options.seconds) for boxes in options.boxes),
        *(maze_cases(n, options.seconds) for n in options.mazes),
    )
    publish(settings(options), ({"contender": "effml", **row} for row in rows), KEYS, table=options.table)


if __name__ == "__main__":
    main()
