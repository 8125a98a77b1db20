"""The structure that docs/ tells and draws is that of the sources: picture, floors, rooms, walks, papers."""

import ast
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from effml_shared.config import load_config
from effml_shared.errors import ConfigError
from effml_shared.experiments import discover, find

sys.path.append(str(Path(__file__).parent))
from draw_architecture import HOUSES, PICTURE, draw
from import_graph import ImportGraph
from walk import Walk

DOCS, GRAPH = Path(__file__).parent, ImportGraph()
SOURCES = GRAPH.sources
ARCHITECTURE, PAPERS = ((DOCS / name).read_text() for name in ("architecture.md", "paper_index.md"))
EXAMPLES = {"2401.00001"}  # of no paper: in doctests


def section(page, title):
    """Return what stands below a heading, up to the next of its rank."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[2]


def table(page):
    """Return the cells of a page's tables, row by row, without their heads."""
    rows = [row for rows in re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE) for row in rows.splitlines()[2:]]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


# The picture


def test_the_picture_is_what_the_script_draws():
    drawn = draw(GRAPH)
    assert PICTURE.read_text() == drawn, "the imports changed: run `python docs/draw_architecture.py`"
    assert ET.fromstring(drawn).tag.endswith("svg")
    assert set(HOUSES) == set(GRAPH.packages)


def test_the_picture_has_no_text_beyond_its_edges():
    picture = ET.fromstring(draw(GRAPH))
    width, height = (float(picture.get(name)) for name in ("width", "height"))
    for text in picture.iter("{http://www.w3.org/2000/svg}text"):
        x, y, size = (float(text.get(name)) for name in ("x", "y", "font-size"))
        length = 0.62 * size * len(text.text)  # of a wide font
        left = x - {None: 0, "middle": length / 2, "end": length}[text.get("text-anchor")]
        assert 0 < left < left + length < width, text.text
        assert size < y < height, text.text


def test_imports_that_break_a_wall_are_counted(tmp_path):
    def write(path, text=""):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    for folder, name in (("shared", "effml-shared"), ("packages/effml-a", "effml-a"), ("packages/effml-b", "effml-b")):
        write(f"{folder}/pyproject.toml", f'[project]\nname = "{name}"\nversion = "0"\n')
        write(f"{folder}/src/{name.replace('-', '_')}/__init__.py")
    layers = '[[tool.importlinter.contracts]]\ntype = "layers"\nlayers = ["upper", "lower | other"]\n'
    write("pyproject.toml", layers)
    write("shared/src/effml_shared/upper.py", "from effml_shared import lower\n")
    write("shared/src/effml_shared/lower.py", "def f():\n    from effml_shared.upper import g\n")
    write("shared/src/effml_shared/other/__init__.py", "import effml_a\n")
    write("packages/effml-a/src/effml_a/method.py", "import torch, effml_b\nfrom effml_a.experiments import x\n")
    write("packages/effml-a/src/effml_a/experiments/__init__.py")
    write("packages/effml-a/src/effml_a/experiments/x.py", "from effml_shared import upper, other\n")
    graph = ImportGraph(tmp_path)
    assert list(graph.crossings().values()) == [1, 1, 1, 1]
    assert graph.floors == [["lower", "other"], ["upper"]]
    assert graph.taken("effml_a", experiments=True) == {0: 1, 1: 1}
    assert graph.taken("effml_a", experiments=False) == {0: 0, 1: 0}
    assert "#b3261e" not in draw(GRAPH)


# Floors and rooms


def test_the_table_of_floors_is_what_import_linter_holds():
    rows = table(section(ARCHITECTURE, "The floors of the core"))
    told = {int(number): sorted(quoted(modules)) for number, modules, _ in rows}
    assert told == {number: sorted(names) for number, names in enumerate(GRAPH.floors)}
    assert [int(number) for number, *_ in rows] == sorted(told, reverse=True)


@pytest.mark.parametrize("package", GRAPH.packages)
def test_rooms_are_those_of_the_tree(package):
    block = re.search(r"```text\n(.*?)```", section(ARCHITECTURE, package.replace("_", "-")), re.DOTALL)[1]
    folder, named, opened = "", [], set()
    for line in block.splitlines():
        names, text = re.fullmatch(r"(.*?)(?:\s{3,}(\S.*))?", line).groups()
        if line.startswith(" "):
            opened.add(folder)
            named += [f"{folder}.{name}" for name in names.split()]
        else:
            assert text or line.endswith("/"), line
            named += [f"{package}.{name.rstrip('/').replace('/', '.')}" for name in names.split()]
            folder = named[-1]
            for name in names.split():
                file = SOURCES.file(f"{package}.{name.rstrip('/')}")
                assert file, f"{package}: no {name}"
                assert (file.name == "__init__.py") == name.endswith("/"), f"{package}: {name}"
    assert len(named) == len(set(named))
    assert [name for name in named if not SOURCES.file(name)] == []
    covered = tuple(f"{name}." for name in named if name not in opened)
    modules = [m for m in SOURCES.modules(package) if m != package and m not in opened]
    assert [m for m in modules if not f"{m}.".startswith(covered)] == []
    experiments = {name for name, entry in discover().items() if entry.value.startswith(f"{package}.")}
    assert set(re.search(r"^experiments/ +(.*)$", block, re.MULTILINE)[1].split(", ")) == experiments


def test_the_two_halves_of_evaluation_import_nothing_of_each_other():
    second = {"activations", "sae", "concepts", "explorer"}
    between = [
        (a, b)
        for a, b in GRAPH.imports
        if a.startswith("effml_eval.") and not a.startswith("effml_eval.experiments") and b.startswith("effml_eval.")
        if (a.split(".")[1] in second) != (b.split(".")[1] in second)
    ]
    assert between == []


# Walks


ANNOUNCED = [entry.module for entry in discover().values()]


@pytest.mark.parametrize("title", ["One batch of tokens", "One field of a configuration"])
def test_every_row_of_a_walk_is_in_the_sources(title):
    rows = table(section(ARCHITECTURE, title))
    assert Walk(SOURCES, ANNOUNCED).faults(rows) == []


@pytest.mark.parametrize(
    ("caller", "calls", "reason"),
    [
        ("loop.Loop._advance", "`steps.GradientStep.__call__`", "the body does not name it"),
        ("loop.Loop._advance", "`self.stride` → `steps.GradientStep.__call__`", "the body does not say self.stride"),
        ("loop.Loop._advance", "`self.step` → `effml_rl.sampler.Sampler`", "nobody hands over Sampler"),
        ("loop.Loop._advance", "`self.step` → `steps.GradientStep.stride`", "there is no steps.GradientStep.stride"),
        ("loop.Loop._stride", "`steps.GradientStep`", "there is no loop.Loop._stride"),
        ("loop.Loop.save", "`self.checkpoints.save` → `checkpoint.Checkpoints.save`", "no earlier row calls"),
        ("loop.Loop._train", "`self._evaluate` → `loop`", "loop is no function or class"),
    ],
)
def test_a_wrong_row_of_a_walk_is_found(caller, calls, reason):
    right = [("`loop.Loop._train`", "`self._advance` → `loop.Loop._advance`", "")]
    (fault,) = Walk(SOURCES).faults([*right, (f"`{caller}`", calls, "")])
    assert reason in fault


def test_the_walk_quotes_what_a_wrong_field_gets():
    experiment = find("optim.soap")
    with pytest.raises(ConfigError) as caught:
        experiment.configure("cpu", overrides=["model.d_modle=192"])
    assert f"effml: error: {caught.value}\n" in section(ARCHITECTURE, "One field of a configuration")
    config = load_config(experiment.presets["cpu"](), overrides=["model.d_model=192"])
    assert (config.model.head_dim, config.model.ff_dim) == (48, 512)


# Contributing


def test_sessions_and_files_that_contributors_are_told_of_exist():
    page = (DOCS.parent / "CONTRIBUTING.md").read_text()
    sessions = {
        node.name
        for node in ast.parse((DOCS.parent / "noxfile.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and "nox.session" in "".join(map(ast.unparse, node.decorator_list))
    }
    told = re.findall(r"nox -s ([^\n`#]+)", page)
    names = {re.sub(r"\W.*", "", word.strip('"')) for words in told for word in words.partition("--")[0].split()}
    assert {"tests", "lint", "release", "bench"} <= names
    assert names - sessions == set()
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (DOCS.parent / link).exists(), link
    for script in re.findall(r"python (\S+\.py)", page):
        assert (DOCS.parent / script).exists(), script


# Papers


def cited():
    """Return where each arXiv id stands in the sources."""
    found = {}
    for module in GRAPH.modules:
        for number in re.findall(r"\b\d{4}\.\d{5}\b", SOURCES.file(module).read_text()):
            if number not in EXAMPLES and 1 <= int(number[2:4]) <= 12:
                found.setdefault(number, []).append(module)
    return found


def rows_of_papers():
    """Yield (ids, modules, tests, experiments) of every row of both tables."""
    for title in ("Papers", "Also used"):
        for cells in table(section(PAPERS, title)):
            where, tests, experiments = (cells[1], cells[2], cells[3]) if title == "Papers" else (cells[2], "", "")
            named = [name for name in quoted(experiments) if re.fullmatch(r"\w+\.\w+", name)]
            yield re.findall(r"abs/(\d{4}\.\d{5})", cells[0]), quoted(where), re.findall(r"test_\w+\.py", tests), named


def test_every_paper_that_a_source_cites_is_in_the_index_and_stands_where_it_says():
    sources, told = cited(), {}
    for ids, modules, *_ in rows_of_papers():
        assert modules
        assert [m for m in modules if not SOURCES.file(m)] == []
        for number in ids:
            told.setdefault(number, []).extend(modules)
    assert sorted(sources) == sorted(told)
    for number, modules in told.items():
        inside = [m for m in sources[number] if f"{m}.".startswith(tuple(f"{module}." for module in modules))]
        assert inside, f"{number} is cited in {sources[number]}, not in {modules}"


def test_tests_and_experiments_of_the_index_exist():
    for _, modules, tests, experiments in rows_of_papers():
        folders = {SOURCES.roots[module.partition(".")[0]].parent / "tests" for module in modules}
        assert [test for test in tests if not any((folder / test).exists() for folder in folders)] == []
        assert [name for name in experiments if name not in discover()] == []


def test_every_experiment_stands_with_its_papers():
    rows = list(rows_of_papers())
    for name in discover():
        ids = {number for numbers, *_, experiments in rows if name in experiments for number in numbers}
        papers = {paper.arxiv for paper in find(name).papers}
        assert ids, f"{name} is not in the index"
        assert papers <= ids, f"{name} re-tests {papers - ids}"
