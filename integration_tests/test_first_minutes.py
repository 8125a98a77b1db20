"""What a newcomer would stumble over in an installed package is found, and said in one line."""

import importlib
import importlib.metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def first_minutes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "release")
    return importlib.import_module("first_minutes")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that puts a package of some modules into a directory of the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, readme="", **modules):
        about = f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.1.0\nProvides-Extra: hf\n\n{readme}"
        files = {f"{name}/{module}.py": text for module, text in {"__init__": "", **modules}.items()}
        files[f"{name}-0.1.0.dist-info/METADATA"] = about
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        record = "".join(f"{path},,\n" for path in files)
        (tmp_path / f"{name}-0.1.0.dist-info" / "RECORD").write_text(record)
        importlib.invalidate_caches()
        return importlib.metadata.distribution(name)

    return install


def test_a_module_imports_or_names_its_extra(first_minutes, install):
    package = install("toy_plain", asks="raise ImportError('run `pip install toy_plain[hf]`')", plain="import json")
    assert first_minutes.import_modules(package) == "3 modules, 1 of them ask for an extra"
    hidden = install("toy_hidden", needs="import absent_library")
    with pytest.raises(first_minutes.Fault, match=r"^toy_hidden\.needs: ModuleNotFoundError: No module named 'absent_"):
        first_minutes.import_modules(hidden)


def test_examples_of_the_readme_are_found_and_run(first_minutes, install, tmp_path):
    readme = "Text.\n```python\nprint(1)\n```\n```bash\nfalse\n```\n```python\nraise ValueError('odd')\n```\n"
    steps = dict(first_minutes.steps(install("toy_examples", readme), tmp_path))
    assert list(steps) == ["imports", "effml list", "example 1 of the README", "example 2 of the README"]
    assert steps["example 1 of the README"]() == "runs"
    with pytest.raises(first_minutes.Fault, match=r"ValueError: odd$"):
        steps["example 2 of the README"]()


def test_an_experiment_that_is_not_there_and_an_unknown_package(first_minutes, tmp_path, capsys):
    with pytest.raises(first_minutes.Fault, match=r"unknown experiment 'optim\.sope'"):
        first_minutes.run_experiment(tmp_path, "optim.sope")
    assert first_minutes.main(["toy-absent"]) == 2
    assert capsys.readouterr().err.startswith("package: got 'toy-absent', expected one that ")
