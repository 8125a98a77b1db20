"""Take finished runs over into docs/results, so that the pages can be written from them.

    python docs/measured/record.py DIR...        run directories, or directories of run directories

What is kept is the summary (claims, tables, every trial's results) and of the manifest what made it: preset, versions,
machine, commit. Paths stay behind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

KEPT = ("experiment", "preset", "started", "versions", "machine", "git")


def runs_in(folder: Path) -> Iterator[Path]:
    """Yield a folder that is a run directory, or those in it."""
    if (folder / "manifest.json").exists():
        yield folder
        return
    yield from sorted(path.parent for path in folder.glob("*/manifest.json"))


def record(run: Path, results: Path) -> Path:
    """Write one run's NAME.PRESET.json; returns its path.

    Raises:
        ValueError: the run is not finished.
    """
    manifest = json.loads((run / "manifest.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    if summary.get("status") != "finished":
        raise ValueError(f"{run}: got status {summary.get('status')!r}, expected 'finished': effml resume {run}")
    path = results / f"{manifest['experiment']}.{manifest['preset']}.json"
    kept = {"manifest": {key: manifest[key] for key in KEPT}, **summary}
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return path


def main(folders: list[str], results: Path = Path(__file__).parents[1] / "results") -> int:
    found = [run for folder in folders for run in runs_in(Path(folder))]
    if not found:
        print(f"got {' '.join(folders) or 'nothing'}, expected run directories", file=sys.stderr)
        return 2
    try:
        for run in found:
            print(f"recorded {record(run, results).name}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
