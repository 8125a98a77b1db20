"""What the documentation says is run: Python examples, `effml` commands, links between files."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from effml_shared.cli import parse
from effml_shared.experiments import find

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "shared/README.md",
    *sorted(ROOT.glob("packages/*/README.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
pages = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pages
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


@pages
def test_commands_parse_and_their_experiments_and_fields_exist(page):
    for code in blocks(page, "(?:bash|sh)"):
        for line in code.splitlines():
            _, found, command = line.partition("effml ")
            if (
                not found
                or line.startswith("#")
                or not re.search(r"(^|\s)effml (list|run|resume|report|compare|reproduce|sweep|cite|doctor)", line)
            ):
                continue
            options = parse(shlex.split(command, comments=True))
            if hasattr(options, "overrides"):
                find(options.name).configure(options.preset, overrides=options.overrides)


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page} links to {target}"


def test_every_package_has_its_rooms_and_says_its_version():
    for project in [ROOT / "shared", *sorted(ROOT.glob("packages/effml-*"))]:
        about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
        assert f"## {about['version']}" in (project / "CHANGELOG.md").read_text()
        module = project / "src" / about["name"].replace("-", "_")
        assert (module / "py.typed").exists()
        assert (module / "__init__.py").exists()
        for source in module.rglob("*.py"):
            relative = source.relative_to(module)
            lines = source.read_text().count("\n")
            if source.name == "__init__.py" or lines < 30 or relative.parts[0] == "experiments":
                continue
            test = project / "tests" / f"test_{source.stem}.py"
            assert test.exists(), f"{relative} of {about['name']} has no {test.name}"


def test_the_two_commands_of_the_readme():
    commands = [
        line for code in blocks(ROOT / "README.md", "bash") for line in code.splitlines() if "pip install" in line
    ]
    assert [command.partition(" #")[0].strip() for command in commands] == [
        "pip install uv && uv run effml run optim.soap",
        "pip install uv && uv run --only-group dev nox",
    ]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install")
