"""Who imports whom, read from the sources: files of every package, the floors of the core, what is taken from each.

Every `import` counts, wherever it stands: inside functions and under `TYPE_CHECKING` too, as for import-linter.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "release"))
from source_tree import ROOT, Sources

CORE = "effml_shared"


class ImportGraph:
    """The modules of the workspace and the imports among them."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root, self.sources = root, Sources(root)

    @cached_property
    def floors(self) -> list[list[str]]:
        """The floors of the core as import-linter holds them, the lowest first."""
        contracts = tomllib.loads((self.root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
        return [[name.strip() for name in layer.split("|")] for layer in reversed(layers)]

    @cached_property
    def packages(self) -> list[str]:
        """Every package but the core."""
        return [name for name in self.sources.roots if name != CORE]

    @cached_property
    def modules(self) -> list[str]:
        return [module for package in self.sources.roots for module in self.sources.modules(package)]

    @cached_property
    def imports(self) -> list[tuple[str, str]]:
        """Every (importing module, imported module) within the workspace, once."""
        return sorted({(module, other) for module in self.modules for other in self._imported(module)})

    def _imported(self, module: str) -> Iterator[str]:
        file = self.sources.file(module)
        assert file is not None  # the sources listed it
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if self.sources.file(name) else node.module for name in inner]
            yield from (name for name in names if self.sources.file(name))

    def files(self, package: str, *, experiments: bool) -> list[str]:
        """Return the modules of a package's library, or those of its experiments."""
        return [m for m in self.sources.modules(package) if is_experiment(m) is experiments]

    def floor_of(self, module: str) -> int:
        """Return the floor of a module of the core; -1 of the core itself, which holds only its version."""
        name = [*module.split("."), ""][1]
        return next((number for number, names in enumerate(self.floors) if name in names), -1)

    def taken(self, package: str, *, experiments: bool) -> dict[int, int]:
        """Return how many files of a package import from each floor of the core."""
        files = set(self.files(package, experiments=experiments))
        pairs = {(a, self.floor_of(b)) for a, b in self.imports if a in files and package_of(b) == CORE}
        return {floor: sum(f == floor for _, f in pairs) for floor in range(len(self.floors))}

    def crossings(self) -> dict[str, int]:
        """Return how many imports break each wall."""
        walls = dict.fromkeys(
            (
                "from a package to another",
                "from the core to a package",
                "from a library to its experiments",
                "from a floor to one above it",
            ),
            0,
        )
        between, outward, back, upward = walls
        for a, b in self.imports:
            source, target = package_of(a), package_of(b)
            walls[between] += CORE not in (source, target) and source != target
            walls[outward] += source == CORE != target
            walls[back] += is_experiment(b) and not is_experiment(a)
            floors = self.floor_of(a), self.floor_of(b)
            walls[upward] += source == target == CORE and floors[1] > floors[0] >= 0
        return walls


def package_of(module: str) -> str:
    return module.partition(".")[0]


def is_experiment(module: str) -> bool:
    return module.split(".")[1:2] == ["experiments"] and package_of(module) != CORE
