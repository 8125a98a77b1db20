"""What must hold before a package is released: prints the tag to push, or one line per rule that is broken.

    python release/rules.py quant                  the rules; `nox -s release -- quant` builds and tries the wheel too
    python release/rules.py quant --lowest-core    the tag of the oldest released core that the package allows, if any

Tags are `effml-X-vMAJOR.MINOR.PATCH`. While the major version is 0, the minor one is what changes with the public API:
that is why a package asks for `effml-shared>=0.b,<0.(b+1)`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version
from public_api import difference, fault, snapshot_file
from source_tree import ROOT, Package, Sources, find_package, read_project

CORE = "effml-shared"
VERSION = r"\d+\.\d+\.\d+"


def run_git(root: Path, *command: str) -> str:
    """Return what a git command prints; ends the program, in one line, if it fails."""
    done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {command[0]}: {done.stderr.strip().splitlines()[0]}")
    return done.stdout


def released_versions(name: str, root: Path) -> list[Version]:
    """Return the tagged versions of a package, oldest first; tags that are no version are nobody's release."""
    prefix = f"{name}-v"
    versions = []
    for tag in run_git(root, "tag", "--list", f"{prefix}*").split():
        try:
            versions.append(Version(tag.removeprefix(prefix)))
        except InvalidVersion:
            print(f"{tag}: not a version, left out", file=sys.stderr)
    return sorted(versions)


def version_faults(package: Package, root: Path) -> list[str]:
    """Return what is wrong with a package's version: its form, its place after the last, what the API asks of it."""
    where = f"{package.folder.relative_to(root)}/pyproject.toml"
    if not re.fullmatch(VERSION, package.version):
        return [f"{where}: version: got {package.version!r}, expected MAJOR.MINOR.PATCH"]
    version, released = Version(package.version), released_versions(package.name, root)
    if not released:
        return []
    last = released[-1]
    if version <= last:
        return [f"{where}: version: got {version}, but {package.name}-v{last} is tagged already: raise it"]
    file = snapshot_file(package, root)
    old = run_git(root, "show", f"{package.name}-v{last}:{file.relative_to(root).as_posix()}")
    changes = difference(old.splitlines()[1:], file.read_text().splitlines()[1:] if file.exists() else [])
    if changes and version.release[:2] == last.release[:2]:
        return [
            f"{where}: version: got {version}, but the public API differs from {last}'s ({changes}): raise the minor"
        ]
    return []


def changelog_faults(package: Package, root: Path) -> list[str]:
    """Return what is wrong with the changelog: its first entry is the version's, and says something."""
    file = package.folder / "CHANGELOG.md"
    text = file.read_text() if file.exists() else ""
    first = re.search(r"^## +(\S+)[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if first is None or first[1] != package.version:
        return [f"{file.relative_to(root)}: expected the first entry to be '## {package.version}'"]
    return [] if first[2].strip() else [f"{file.relative_to(root)}: the entry '## {package.version}' is empty"]


def core_requirement(package: Package) -> Requirement:
    """Return what a package requires of the core; nothing in particular if it does not say so in a readable way."""
    try:
        return Requirement(_core_line(package))
    except InvalidRequirement:
        return Requirement(CORE)


def _core_line(package: Package) -> str:
    lines = read_project(package.folder).get("dependencies", [])
    return next((line for line in lines if re.match(rf"{CORE}\b", line)), CORE)


def core_faults(package: Package, core: Package, root: Path) -> list[str]:
    """Return what is wrong with the range of the core: one minor version, and this tree's core lies in it."""
    if package.name == CORE:
        return []
    where, range_ = f"{package.folder.relative_to(root)}/pyproject.toml", core_requirement(package).specifier
    bounds = {bound.operator: bound.version for bound in range_}
    low = [int(part) for part in re.findall(r"\d+", bounds.get(">=", ""))]
    if len(range_) != 2 or len(low) < 2 or bounds.get("<") != f"{low[0]}.{low[1] + 1}":
        return [f"{where}: dependencies: got '{_core_line(package)}', expected '{CORE}>=a.b,<a.(b+1)'"]
    if not re.fullmatch(VERSION, core.version) or Version(core.version) not in range_:
        return [f"{where}: dependencies: '{CORE}{range_}' leaves out this tree's core, {core.version}"]
    return []


def lowest_core(package: Package, root: Path) -> str:
    """Return the tag of the oldest released core that a package allows; "" if only this tree's is left."""
    allowed = [v for v in released_versions(CORE, root) if v in core_requirement(package).specifier]
    return f"{CORE}-v{allowed[0]}" if allowed and package.name != CORE else ""


def all_faults(package: Package, core: Package, root: Path) -> list[str]:
    """Return every broken rule of a package, one line each."""
    faults = version_faults(package, root) + changelog_faults(package, root) + core_faults(package, core, root)
    try:
        api = fault(package, Sources(root), root)
    except SyntaxError as error:
        api = f"{error.filename}:{error.lineno}: {error.msg}"
    where = [str(package.folder), str(snapshot_file(package, root))]
    changed = [line[3:] for line in run_git(root, "status", "--porcelain", "--", *where).splitlines()]
    loose = f"{package.name}: a tag would not hold what is not committed: {', '.join(changed)}" if changed else ""
    return faults + [line for line in (api, loose) if line]


def doubts(package: Package, root: Path) -> list[str]:
    """Return what the owners should know before they publish, one line each; none of it hinders a release."""
    about = read_project(package.folder)
    lines = []
    if "license" not in about:
        where = f"{package.folder.relative_to(root)}/pyproject.toml"
        lines.append(f"no license declared: {where} has no `license`, and without one nobody may use what is published")
    if package.name != CORE and not lowest_core(package, root):
        lines.append(f"no released core: no tag of {CORE} fits '{core_requirement(package)}', so release that first")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", help="such as quant or effml-quant")
    parser.add_argument("--lowest-core", action="store_true", help="print the tag of the oldest core that is allowed")
    parser.add_argument("--root", type=Path, default=ROOT, help="the workspace (default: this one)")
    options = parser.parse_args(arguments)
    package = find_package(options.package, options.root)
    if options.lowest_core:
        print(lowest_core(package, options.root))
        return 0
    faults = all_faults(package, find_package(CORE, options.root), options.root)
    for line in faults or [f"warning: {doubt}" for doubt in doubts(package, options.root)]:
        print(line, file=sys.stderr)
    if not faults:
        print(f"{package.name}-v{package.version}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
