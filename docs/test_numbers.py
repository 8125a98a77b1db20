"""Measured numbers are written by a command: what `nox -s numbers` cannot see by comparing pages with measurements."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "shared/README.md", *sorted(ROOT.glob("packages/*/README.md"))]
MEASURED = re.compile(
    r"\[-?[\d,.]+, -?[\d,.]+\]"  # an interval
    r"|\d+\.\d+ ?(?:x|times|%|ms|s|min|MiB|GB/s|nats|points)\b"
    r"|\d\.\d+ ± \d"
    r"|\| (?:does not hold|inconclusive|holds) \|"
)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_measurement_is_written_by_hand(page):
    text = re.sub(r"^<!-- \[\[\[cog.*?^<!-- \[\[\[end\]\]\] -->", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert [line for line in text.splitlines() if MEASURED.search(line) and "paper" not in line] == []


def a_run(folder, status):
    folder.mkdir(parents=True)
    manifest = {
        "experiment": "x.y",
        "preset": "cpu",
        "started": "2026-01-01",
        "versions": {},
        "machine": {},
        "git": "a",
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "command": "effml run x.y --out /home/me/run"}))
    (folder / "summary.json").write_text(json.dumps({"status": status, "claims": []}))
    return folder


@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("measured.record").main


def test_runs_are_recorded_without_the_paths_of_a_machine(record, tmp_path):
    a_run(tmp_path / "many" / "one", "finished")
    assert record([str(tmp_path / "many")], tmp_path) == 0
    stored = json.loads((tmp_path / "x.y.cpu.json").read_text())
    assert stored["manifest"]["preset"] == "cpu"
    assert stored["status"] == "finished"
    assert "/home" not in (tmp_path / "x.y.cpu.json").read_text()


@pytest.mark.parametrize("folder", ["one", "nothing"])
def test_what_is_no_finished_run_is_refused_in_one_line(folder, record, tmp_path, capsys):
    a_run(tmp_path / "one", "running")
    assert record([str(tmp_path / folder)], tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.y.cpu.json").exists()
