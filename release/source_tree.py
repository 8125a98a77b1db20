"""The workspace's sources, parsed and never imported: where modules stand, and what a name in them leads to."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Definition:
    """A name's definition: where it stands, and the node; None if it comes from outside the workspace."""

    module: str
    name: str
    node: ast.stmt | None

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Package:
    """One distribution of the workspace: its folder below the root, its name and version."""

    folder: Path
    name: str
    version: str

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")


def packages(root: Path = ROOT) -> list[Package]:
    """Return the packages of the workspace, the core first."""
    folders = [root / "shared", *sorted(root.glob("packages/effml-*"))]
    projects = [read_project(folder) for folder in folders]
    return [Package(folder, about["name"], about["version"]) for folder, about in zip(folders, projects, strict=True)]


def read_project(folder: Path) -> dict[str, Any]:
    """Return the table `project` of a folder's pyproject.toml; ends the program if it names no package."""
    file = folder / "pyproject.toml"
    try:
        project: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SystemExit(f"{file}: {error}") from None
    missing = [key for key in ("name", "version") if not isinstance(project.get(key), str)]
    if missing:
        raise SystemExit(f"{file}: expected project.{missing[0]}")
    return project


def find_package(name: str, root: Path = ROOT) -> Package:
    """Return a package by its name, such as quant or effml-quant; ends the program if there is none."""
    known = {package.name: package for package in packages(root)}
    full = f"effml-{name.replace('_', '-').removeprefix('effml-')}"
    if full not in known:
        raise SystemExit(f"package: got {name!r}, expected one of {', '.join(known)}")
    return known[full]


class Sources:
    """The parsed modules of the workspace."""

    def __init__(self, root: Path = ROOT) -> None:
        self.roots = {package.module: package.folder / "src" for package in packages(root)}
        self._parsed: dict[str, dict[str, ast.stmt]] = {}

    def file(self, module: str) -> Path | None:
        """Return where a module of the workspace stands, None if it is not one."""
        base = self.roots.get(module.partition(".")[0])
        if base is None:
            return None
        path = base.joinpath(*module.split("."))
        return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.exists()), None)

    def modules(self, package: str) -> list[str]:
        """Return every module of a package, itself first."""
        base = self.roots[package]
        files = (file.relative_to(base).with_suffix("") for file in (base / package).rglob("*.py"))
        return sorted(".".join(file.parts).removesuffix(".__init__") for file in files)

    def statements(self, module: str) -> dict[str, ast.stmt]:
        """Return what a module binds at its top level, `try` and `if` included, by name."""
        if module not in self._parsed:
            file = self.file(module)
            assert file is not None, module  # asked only about modules of the workspace
            self._parsed[module] = dict(bindings(ast.parse(file.read_text(encoding="utf-8"), str(file)).body))
        return self._parsed[module]

    def listed(self, module: str) -> list[str] | None:
        """Return a module's `__all__` without its version, None if it has none."""
        statement = self.statements(module).get("__all__")
        if not isinstance(statement, ast.Assign):
            return None
        return [name for name in ast.literal_eval(statement.value) if name != "__version__"]

    def find(self, module: str, name: str) -> Definition:
        """Follow imports within the workspace to a name's definition."""
        node = self.statements(module).get(name)
        if isinstance(node, ast.ImportFrom):
            source = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            bound = self.statements(str(node.module)).get(source) if self.file(str(node.module)) else None
            if bound not in (None, node):  # a package may import a submodule from itself
                return self.find(str(node.module), source)
            return Definition(str(node.module), source, None)  # a submodule, or from outside
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
        ):
            owner = self.find(module, node.value.value.id)  # `cast = native.cast`
            if owner.node is None and self.file(owner.path):
                return self.find(owner.path, node.value.attr)
        return Definition(module, name, node)

    def bases(self, of: Definition) -> list[Definition]:
        """Return a class and what it inherits from within its own package, in the order of look-up."""
        if not isinstance(of.node, ast.ClassDef):
            return []
        found = [of]
        for base in of.node.bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            if isinstance(base, ast.Name):
                parent = self.find(of.module, base.id)
                if parent.module.partition(".")[0] == of.module.partition(".")[0]:
                    found += [new for new in self.bases(parent) if new not in found]
        return found


def bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the names that a module's or a class's body binds, and the statements that do."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.If):
            yield from bindings(node.orelse)
            yield from bindings(node.body)
        elif isinstance(node, ast.Try):
            yield from bindings(node.body)
