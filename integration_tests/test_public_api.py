"""The public API of every package is what docs/api says, and what a release asks of a package is enforced."""

import importlib
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULE = """
from dataclasses import dataclass, field
from effml_shared.errors import Options
from effml_toy import kernels
from effml_toy.shapes import Shape as Shape
from elsewhere import Base

__all__ = ["LIMIT", "Circle", "Shape", "area", "cast", "Timed", "twice"]
LIMIT = 3
cast = kernels.cast

def area(shape: Shape, *, scale: float = 1.0) -> float:
    return scale

class twice(Base):
    def __init__(self, x): ...
    def _private(self): ...

@dataclass(frozen=True, kw_only=True)
class Circle(Shape):
    radius: float = 1.0
    tags: list[str] = field(default_factory=list)
    area: float = field(init=False)
    def grown(self, by: float) -> "Circle": ...

@dataclass
class Timed(Options):
    seconds: float = 1.0
"""
SHAPES = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Shape:
    name: str
    @property
    def corners(self) -> int: ...
    @classmethod
    def unit(cls) -> "Shape": ...
    def __len__(self) -> int: ...
"""
SNAPSHOT = """\
# effml-toy 0.1.0
effml_toy.area(shape: Shape, *, scale: float=1.0) -> float
effml_toy.cast(x: float) -> float
effml_toy.Circle: frozen dataclass(Shape)
effml_toy.Circle.__init__(name: str, *, radius: float=1.0, tags: list[str]=list())
effml_toy.Circle.__len__() -> int
effml_toy.Circle.area: float
effml_toy.Circle.corners: property -> int
effml_toy.Circle.grown(by: float) -> 'Circle'
effml_toy.Circle.unit() -> 'Shape', of the class
effml_toy.LIMIT = 3
effml_toy.Shape: frozen dataclass
effml_toy.Shape.__init__(name: str)
effml_toy.Shape.__len__() -> int
effml_toy.Shape.corners: property -> int
effml_toy.Shape.unit() -> 'Shape', of the class
effml_toy.Timed: dataclass(Options)
effml_toy.Timed.__init__(..., seconds: float=1.0)
effml_toy.twice: class(Base)
effml_toy.twice.__init__(x)
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a script of release/ and returns its exit status and what it printed."""
    monkeypatch.syspath_prepend(ROOT / "release")

    def main(script, *options):
        status = importlib.import_module(script).main([str(option) for option in options])
        said = capsys.readouterr()
        return status, (said.out + said.err).strip()

    return main


class Workspace:
    """A workspace of the core and one package, under git."""

    def __init__(self, root, run):
        self.root, self.run = root, run
        self.write("shared/src/effml_shared/__init__.py", '__all__ = ["__version__"]\n')
        self.write("shared/src/effml_shared/errors.py", "@dataclass\nclass Options:\n    seed: int = 0\n")
        self.write("packages/effml-toy/src/effml_toy/__init__.py", MODULE)
        self.write("packages/effml-toy/src/effml_toy/shapes.py", SHAPES)
        self.write("packages/effml-toy/src/effml_toy/kernels.py", "def cast(x: float) -> float: ...\n")
        self.project("shared", "effml-shared")
        self.project("packages/effml-toy", "effml-toy")
        self.git("init", "--quiet")

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def edit(self, path, old, new):
        text = (self.root / path).read_text()
        assert old in text
        self.write(path, text.replace(old, new))

    def project(self, folder, name, version="0.1.0", core="effml-shared>=0.1,<0.2"):
        needs = [] if name == "effml-shared" else [core]
        self.write(
            f"{folder}/pyproject.toml", f'[project]\nname = "{name}"\nversion = "{version}"\ndependencies = {needs}\n'
        )
        self.write(f"{folder}/CHANGELOG.md", f"# Changelog\n\n## {version}\n\n- What is new.\n")

    def git(self, *command):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *command], cwd=self.root, check=True, capture_output=True)

    def api(self, *options):
        return self.run("public_api", "--root", self.root, *options)

    def commit(self):
        self.api("--write")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", "state")

    def rules(self, *options):
        return self.run("rules", "toy", "--root", self.root, *options)

    def tag(self):
        """The rules' status and first line: what a release goes by, without the warnings."""
        status, said = self.rules()
        return status, said.partition("\n")[0]


@pytest.fixture
def workspace(tmp_path, run):
    return Workspace(tmp_path, run)


def test_the_packages_are_what_docs_api_says(run):
    status, said = run("public_api")
    assert status == 0, said


def test_a_snapshot_shows_signatures_fields_and_what_is_inherited(workspace):
    assert workspace.api("--write")[0] == 0
    assert (workspace.root / "docs/api/effml-toy.txt").read_text() == SNAPSHOT
    core = (workspace.root / "docs/api/effml-shared.txt").read_text()
    path = "effml_shared.errors.Options"
    assert core == f"# effml-shared 0.1.0\n{path}: dataclass\n{path}.__init__(seed: int=0)\n"
    assert workspace.api() == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("scale: float = 1.0", "scale: float = 2.0", "changed effml_toy.area"),
        ("def area(shape: Shape, *", "def area(form: Shape, *", "changed effml_toy.area"),
        (', "twice"]', "]", "gone effml_toy.twice; gone effml_toy.twice.__init__"),
        ("def _private", "def shown", "new effml_toy.twice.shown"),
        ("radius: float = 1.0", "radius: float", "changed effml_toy.Circle.__init__"),
    ],
)
def test_a_changed_api_at_an_unchanged_version_is_one_line(workspace, old, new, said):
    workspace.api("--write")
    workspace.edit("packages/effml-toy/src/effml_toy/__init__.py", old, new)
    status, line = workspace.api()
    assert status == 1
    assert line.startswith(f"effml-toy: the public API changed, the version 0.1.0 did not ({said})")
    assert line.endswith("run `python release/public_api.py --write`")
    assert "\n" not in line


def test_what_is_not_public_changes_nothing(workspace):
    workspace.api("--write")
    workspace.edit("packages/effml-toy/src/effml_toy/__init__.py", "def _private(self)", "def _other(self, x)")
    workspace.edit("packages/effml-toy/src/effml_toy/__init__.py", "return scale", "return 2 * scale")
    assert workspace.api() == (0, "")


def test_a_released_version_is_not_written_over(workspace):
    workspace.commit()
    workspace.git("tag", "effml-toy-v0.1.0")
    workspace.edit("packages/effml-toy/src/effml_toy/__init__.py", "LIMIT = 3", "LIMIT = 4")
    status, line = workspace.api("--write")
    assert (status, "changed effml_toy.LIMIT" in line, "(it is released)" in line) == (1, True, True)
    assert (workspace.root / "docs/api/effml-toy.txt").read_text() == SNAPSHOT
    workspace.project("packages/effml-toy", "effml-toy", "0.2.0")
    assert "docs/api has 0.1.0" in workspace.api()[1]
    assert workspace.api("--write")[0] == 0


@pytest.mark.parametrize(
    "stored", ["", "\0", "# effml-other 0.1.0\n", SNAPSHOT + "\n", SNAPSHOT.replace("LIMIT = 3\n", "")]
)
def test_a_damaged_snapshot_is_one_line(workspace, stored):
    workspace.api("--write")
    workspace.write("docs/api/effml-toy.txt", stored)
    status, line = workspace.api()
    assert (status, "\n" in line) == (1, False)
    assert "--write" in line


def test_a_module_that_does_not_parse_and_an_unknown_package_are_one_line(workspace):
    assert workspace.api("effml-toyz") == (2, "package: got 'effml-toyz', expected one of effml-toy")
    workspace.write("packages/effml-toy/src/effml_toy/shapes.py", "def (")
    status, line = workspace.api()
    assert (status, "shapes.py:1: " in line) == (2, True)


def test_a_first_release_and_a_second_one_pass(workspace):
    workspace.commit()
    assert workspace.tag() == (0, "effml-toy-v0.1.0")
    assert workspace.rules("--lowest-core") == (0, "")
    workspace.git("tag", "effml-toy-v0.1.0")
    workspace.git("tag", "effml-shared-v0.1.0")
    workspace.project("shared", "effml-shared", "0.1.1")
    workspace.project("packages/effml-toy", "effml-toy", "0.1.1")
    workspace.commit()
    assert workspace.tag() == (0, "effml-toy-v0.1.1")
    assert workspace.rules("--lowest-core") == (0, "effml-shared-v0.1.0")


def test_a_release_warns_of_what_its_owners_owe_and_does_not_fail(workspace):
    workspace.commit()
    status, said = workspace.rules()
    _, license_, core = said.splitlines()
    assert status == 0
    assert license_.startswith("warning: no license declared: packages/effml-toy/pyproject.toml has no `license`")
    assert (
        core == "warning: no released core: no tag of effml-shared fits 'effml-shared<0.2,>=0.1', so release that first"
    )
    workspace.git("tag", "effml-shared-v0.1.0")
    workspace.edit("packages/effml-toy/pyproject.toml", "[project]", '[project]\nlicense = "MIT"')
    workspace.commit()
    assert workspace.rules() == (0, "effml-toy-v0.1.0")


@pytest.mark.parametrize(
    ("toml", "said"),
    [("[project", "pyproject.toml: "), ('[project]\nname = "effml-toy"\n', "pyproject.toml: expected project.version")],
)
def test_a_damaged_project_file_and_an_unknown_package_end_in_one_line(workspace, toml, said):
    with pytest.raises(SystemExit, match=r"^package: got 'toyz', expected one of effml-shared, effml-toy$"):
        workspace.run("rules", "toyz", "--root", workspace.root)
    workspace.write("packages/effml-toy/pyproject.toml", toml)
    with pytest.raises(SystemExit) as stop:
        workspace.rules()
    assert said in str(stop.value)
    assert "\n" not in str(stop.value)


def test_archives_hold_what_is_committed_and_nothing_else(workspace, tmp_path_factory):
    dist = tmp_path_factory.mktemp("dist")
    workspace.write("packages/effml-toy/src/effml_toy/kernel.c", "int one;")
    workspace.write("packages/effml-toy/benchmarks/bench_area.py", "")
    workspace.commit()
    package = workspace.root / "packages" / "effml-toy"
    files = [file for file in package.rglob("*") if file.is_file() and file.parent.name != "benchmarks"]
    assert len(files) == 6

    def built(*, without="", and_also=""):
        with zipfile.ZipFile(dist / "effml_toy-0.1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("effml_toy-0.1.0.dist-info/METADATA", "")
            for file in files:
                if "src" in file.parts and file.name != without:
                    wheel.write(file, file.relative_to(package / "src"))
        with tarfile.open(dist / "effml_toy-0.1.0.tar.gz", "w:gz") as source:
            for file in files:
                source.add(file, Path("effml_toy-0.1.0") / file.relative_to(package))
            if and_also:
                source.add(package / "pyproject.toml", f"effml_toy-0.1.0/{and_also}")
        return workspace.run("archives", "toy", dist, "--root", workspace.root)

    assert built() == (0, "")
    assert built(without="kernel.c") == (1, "effml_toy-0.1.0-py3-none-any.whl: lacks effml_toy/kernel.c")
    said = "effml_toy-0.1.0.tar.gz: holds, though no commit does, notes.txt"
    assert built(and_also="notes.txt") == (1, said)
    (dist / "effml_toy-0.1.0.tar.gz").unlink()
    assert workspace.run("archives", "toy", dist, "--root", workspace.root)[1].endswith(
        "expected effml_toy-0.1.0.tar.gz"
    )


def test_a_tagged_version_is_not_released_again(workspace):
    workspace.commit()
    for tag in ("effml-toy-v0.1.0", "effml-toy-vnext"):
        workspace.git("tag", tag)
    status, said = workspace.rules()
    assert status == 1
    assert "effml-toy-vnext: not a version, left out" in said
    assert "version: got 0.1.0, but effml-toy-v0.1.0 is tagged already: raise it" in said


def test_a_changed_api_asks_for_a_minor_version(workspace):
    workspace.commit()
    workspace.git("tag", "effml-toy-v0.1.0")
    workspace.edit("packages/effml-toy/src/effml_toy/__init__.py", "LIMIT = 3", "LIMIT = 4")
    workspace.project("packages/effml-toy", "effml-toy", "0.1.1")
    workspace.commit()
    status, line = workspace.rules()
    assert status == 1
    assert line.endswith("the public API differs from 0.1.0's (changed effml_toy.LIMIT): raise the minor")
    workspace.project("packages/effml-toy", "effml-toy", "0.2.0")
    workspace.commit()
    assert workspace.tag() == (0, "effml-toy-v0.2.0")


@pytest.mark.parametrize(
    ("core", "said"),
    [
        ("effml-shared", "got 'effml-shared', expected 'effml-shared>=a.b,<a.(b+1)'"),
        ("effml-shared>=0.1", "got 'effml-shared>=0.1', expected"),
        ("effml-shared>=0.1.x,<0.2", "got 'effml-shared>=0.1.x,<0.2', expected"),
        ("effml-shared>=0.1,<0.3", "expected 'effml-shared>=a.b,<a.(b+1)'"),
        ("effml-shared>=0.2,<0.3", "leaves out this tree's core, 0.1.0"),
        ("other>=1", "got 'effml-shared', expected"),
    ],
)
def test_the_range_of_the_core_is_one_minor_version(workspace, core, said):
    workspace.project("packages/effml-toy", "effml-toy", core=core)
    workspace.commit()
    status, line = workspace.rules()
    assert (status, said in line) == (1, True), line


@pytest.mark.parametrize("changelog", ["", "# Changelog\n", "## 0.0.9\n- Old.\n", "## 0.1.0\n\n## 0.0.9\n\n- Old.\n"])
def test_the_changelog_says_what_is_new(workspace, changelog):
    workspace.write("packages/effml-toy/CHANGELOG.md", changelog)
    workspace.commit()
    status, line = workspace.rules()
    assert (status, "CHANGELOG.md: " in line, "## 0.1.0" in line) == (1, True, True)


def test_what_is_not_committed_is_not_released(workspace):
    workspace.commit()
    workspace.write("packages/effml-toy/README.md", "new")
    said = "effml-toy: a tag would not hold what is not committed: packages/effml-toy/README.md"
    assert workspace.rules() == (1, said)
    workspace.write("packages/effml-toy/src/effml_toy/shapes.py", "def (")
    assert "shapes.py:1: " in workspace.rules()[1]
