"""What each package promises: its public names and their signatures, one per line, in docs/api/effml-X.txt.

    python release/public_api.py            compare every file with the sources; one line per package that differs
    python release/public_api.py --write    write the files anew

Annotations and defaults stand as they are written: neither the Python, the torch nor the optional libraries of a
machine change a line.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from public_names import key_of, public_lines
from source_tree import ROOT, Package, Sources, packages


def snapshot_file(package: Package, root: Path = ROOT) -> Path:
    return root / "docs" / "api" / f"{package.name}.txt"


def snapshot(package: Package, sources: Sources) -> str:
    """Return the text of docs/api/effml-X.txt: name and version, then one line per public name."""
    return "\n".join([f"# {package.name} {package.version}", *public_lines(package, sources), ""])


def difference(old: list[str], new: list[str], most: int = 6) -> str:
    """Say in a few words what differs between two lists of lines, "" if nothing does.

    >>> difference(["a.f(x)", "a.g()"], ["a.f(x, y)", "a.h()"])
    'changed a.f; gone a.g; new a.h'
    """
    gone, come = set(old) - set(new), set(new) - set(old)
    before, after = {key_of(line) for line in gone}, {key_of(line) for line in come}
    words = [f"changed {key}" for key in sorted(before & after)]
    words += [f"gone {key}" for key in sorted(before - after)]
    words += [f"new {key}" for key in sorted(after - before)]
    return "; ".join(words[:most] + ([f"and {len(words) - most} more"] if len(words) > most else []))


def fault(package: Package, sources: Sources, root: Path = ROOT) -> str:
    """Return one line that says how a package differs from its file and what to do, "" if it does not."""
    file = snapshot_file(package, root)
    now = snapshot(package, sources)
    stored = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    if stored == now:
        return ""
    write = "run `python release/public_api.py --write`"
    head, *old = stored.splitlines() or [""]
    if not re.fullmatch(rf"# {package.name} \S+", head):
        return f"{file.relative_to(root)}: expected a first line '# {package.name} VERSION'; {write}"
    changes = difference(old, now.splitlines()[1:])
    version = head.split()[-1]
    if version != package.version:
        return f"{package.name}: the version is {package.version}, docs/api has {version}; {write}"
    if not changes:
        return f"{file.relative_to(root)}: edited by hand; {write}"
    toml = package.folder.relative_to(root) / "pyproject.toml"
    return (
        f"{package.name}: the public API changed, the version {version} did not ({changes}): undo it, or raise the"
        f" version in {toml} (if {version} is not released yet, keep it) and {write}"
    )


def _released(package: Package, root: Path) -> bool:
    tag = f"{package.name}-v{package.version}"
    done = subprocess.run(["git", "tag", "--list", tag], cwd=root, capture_output=True, text=True, check=False)
    return bool(done.stdout.strip())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("packages", nargs="*", help="such as effml-optim; all if none is named")
    parser.add_argument("--write", action="store_true", help="write docs/api anew; a released version's is left alone")
    parser.add_argument("--root", type=Path, default=ROOT, help="the workspace (default: this one)")
    options = parser.parse_args(arguments)
    known = {package.name: package for package in packages(options.root)}
    for name in options.packages:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
            print(f"package: got {name!r}, expected one of {', '.join(close or known)}", file=sys.stderr)
            return 2
    sources = Sources(options.root)
    faults = []
    for package in (known[name] for name in options.packages or known):
        try:
            message = fault(package, sources, options.root)
        except SyntaxError as error:
            print(f"{error.filename}:{error.lineno}: {error.msg}", file=sys.stderr)
            return 2
        file = snapshot_file(package, options.root)
        if not message or not options.write:
            faults += [message] if message else []
        elif _released(package, options.root) and "the public API changed" in message:
            faults.append(message.replace(f"(if {package.version} is not released yet, keep it)", "(it is released)"))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(snapshot(package, sources), encoding="utf-8")
            print(f"wrote {file.relative_to(options.root)}")
    print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
