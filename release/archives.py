"""What a built package holds: the files of the last commit that belong in it, none missing and none besides.

    python release/archives.py quant DIRECTORY    compare the wheel and the source archive that lie there

The wheel holds what lies below `src/` (C files, styles and `py.typed` too); the source archive all of the package's
folder but its benchmarks, which need what stands elsewhere in the workspace.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rules import run_git
from source_tree import ROOT, Package, find_package

LEFT_OUT = ("benchmarks/",)
MOST = 6  # files that a line names


def committed_files(package: Package, root: Path) -> set[str]:
    """Return the files of a package in the last commit, relative to its folder."""
    folder = package.folder.relative_to(root).as_posix()
    listed = run_git(root, "ls-tree", "-r", "-z", "--name-only", "HEAD", f"{folder}/").split("\0")
    return {name.removeprefix(f"{folder}/") for name in listed if name}


def wheel_files(file: Path) -> set[str]:
    """Return what a wheel holds, its own metadata left out."""
    with zipfile.ZipFile(file) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def source_files(file: Path) -> set[str]:
    """Return what a source archive holds below its one folder, its own metadata left out."""
    with tarfile.open(file) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    return names - {"PKG-INFO", "pyproject.toml.orig"}


def _differences(file: Path, held: set[str], expected: set[str]) -> list[str]:
    words = [("lacks", sorted(expected - held)), ("holds, though no commit does,", sorted(held - expected))]
    return [
        f"{file.name}: {verb} {', '.join(names[:MOST])}{f' and {len(names) - MOST} more' * (len(names) > MOST)}"
        for verb, names in words
        if names
    ]


def archive_faults(package: Package, directory: Path, root: Path) -> list[str]:
    """Return what is wrong with the wheel and the source archive of a package, one line per kind of fault."""
    stem = f"{package.module}-{package.version}"
    wheel, source = directory / f"{stem}-py3-none-any.whl", directory / f"{stem}.tar.gz"
    absent = [file.name for file in (wheel, source) if not file.is_file()]
    if absent:
        return [f"{directory}: expected {' and '.join(absent)}"]
    files = committed_files(package, root)
    code = {name.removeprefix("src/") for name in files if name.startswith("src/")}
    faults = _differences(wheel, wheel_files(wheel), code)
    return faults + _differences(source, source_files(source), {f for f in files if not f.startswith(LEFT_OUT)})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", help="such as quant or effml-quant")
    parser.add_argument("directory", type=Path, help="where `uv build` left them")
    parser.add_argument("--root", type=Path, default=ROOT, help="the workspace (default: this one)")
    options = parser.parse_args(arguments)
    package = find_package(options.package, options.root)
    faults = archive_faults(package, options.directory, options.root)
    print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
