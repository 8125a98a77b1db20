"""A newcomer's first minutes with one package, in an environment that holds what the package asks for and no more.

    PYTHON -I release/first_minutes.py effml-quant

PYTHON is that environment's. Nothing of this workspace is imported: each module of the installed package must import or
say which extra it needs, `effml list` must show the package's experiments, `effml run NAME --preset smoke` must finish
each of them, and the Python examples of the README, as the wheel carries it, must run. One line per step.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

PATIENCE = 600  # seconds that one command or example may take; each takes a few
FOREIGN = ("PYTHON", "COVERAGE", "VIRTUAL_ENV")  # variables of whoever calls; a newcomer has none of them
EFFML = Path(sysconfig.get_path("scripts")) / ("effml.exe" if sys.platform == "win32" else "effml")


class Fault(Exception):
    """A step did not do what it promises; says what it did."""


def execute(folder: Path, *command: str) -> str:
    """Run a command in a folder and return what it printed.

    Raises:
        Fault: it failed or took too long; holds the end of what it said.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")  # nothing is built yet
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise Fault(f"not finished after {PATIENCE} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Fault("\n".join([f"exit code {done.returncode}", *said[-12:]]))
    return done.stdout


def import_modules(package: importlib.metadata.Distribution) -> str:
    """Import each module of a package; one that needs an extra must say so, and the package must declare that extra."""
    files = sorted(file for file in package.files or [] if file.suffix == ".py")
    extras = {f"{package.name}[{extra}]" for extra in package.metadata.get_all("Provides-Extra", [])}
    want: list[str] = []
    for file in files:
        name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        try:
            origin = importlib.import_module(name).__file__
        except ImportError as error:
            if not any(extra in str(error) for extra in extras):
                raise Fault(f"{name}: {type(error).__name__}: {error}") from None
            want.append(name)
        else:
            if origin != str(file.locate()):
                raise Fault(f"{name}: imported from {origin}, expected {file.locate()}")
    return f"{len(files)} modules" + (f", {len(want)} of them ask for an extra" if want else "")


def list_experiments(folder: Path, names: Sequence[str]) -> str:
    """Ask `effml list` for the experiments, which must all be there."""
    shown = execute(folder, str(EFFML), "list")
    missing = [name for name in names if name not in shown]
    if missing:
        raise Fault(f"`effml list` does not show {', '.join(missing)}:\n{shown}")
    return f"shows {', '.join(names) or 'no experiment, as it should'}"


def run_experiment(folder: Path, name: str) -> str:
    """Run an experiment at its smallest preset; it must finish, judge its claims and draw its report."""
    run = folder / name
    execute(folder, str(EFFML), "run", name, "--preset", "smoke", "--out", str(run))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if summary["status"] != "finished" or not summary["claims"] or not (run / "report.html").exists():
        raise Fault(f"status {summary['status']}, {len(summary['claims'])} claims, left {os.listdir(run)}")
    return f"{len(summary['claims'])} claims judged"


def run_example(folder: Path, code: str) -> str:
    """Run one Python example of the README in a process of its own."""
    (folder / "example.py").write_text(code, encoding="utf-8")
    execute(folder, sys.executable, "-I", "example.py")
    return "runs"


def steps(package: importlib.metadata.Distribution, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each step and what takes it."""
    experiments = [entry.name for entry in package.entry_points if entry.group == "effml.experiments"]
    readme = package.metadata["Description"]
    yield "imports", partial(import_modules, package)
    yield "effml list", partial(list_experiments, folder, experiments)
    for name in experiments:
        yield f"effml run {name}", partial(run_experiment, folder, name)
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL), 1):
        yield f"example {number} of the README", partial(run_example, folder, code)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", help="an installed distribution, such as effml-quant")
    options = parser.parse_args(arguments)
    try:
        package = importlib.metadata.distribution(options.package)
    except importlib.metadata.PackageNotFoundError:
        print(f"package: got {options.package!r}, expected one that {sys.executable} has", file=sys.stderr)
        return 2
    print(f"{package.name} {package.version} on Python {'.'.join(map(str, sys.version_info[:3]))}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, take in steps(package, Path(folder)):
            begun = time.monotonic()
            try:
                words = take()
            except Fault as fault:
                failed += 1
                words = f"FAILED: {fault}".replace("\n", "\n    ")
            print(f"{time.monotonic() - begun:6.1f} s  {name}: {words}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
