"""What each package promises: its public names and their signatures, one per line, in docs/api/effml-X.txt.

    python release/public_api.py            compare every file with the sources; one line per package that differs
    python release/public_api.py --write    write the files anew

Sources are read, not imported: annotations and defaults stand as they are written, so that neither the Python, the
torch nor the optional libraries of a machine change a line. Public is what a package's or a subpackage's `__all__`
lists, and what its public classes define or inherit within the package. A package whose `__all__` lists nothing but its
version (the core) is used module by module: there, every name without an underscore that a module defines is public.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Special methods by which an object is used; the others (`__repr__`, `__eq__`, `__hash__`) are nobody's contract.
PROTOCOL = {f"__{name}__" for name in ("call", "len", "iter", "next", "getitem", "contains", "enter", "exit")}
LONGEST_VALUE = 100  # characters of a constant's value that are shown; longer ones are tables


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
    projects = [tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in folders]
    return [Package(folder, about["name"], about["version"]) for folder, about in zip(folders, projects, strict=True)]


def snapshot_file(package: Package, root: Path = ROOT) -> Path:
    return root / "docs" / "api" / f"{package.name}.txt"


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
            self._parsed[module] = dict(_bindings(ast.parse(file.read_text(), str(file)).body))
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


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
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
            yield from _bindings(node.orelse)
            yield from _bindings(node.body)
        elif isinstance(node, ast.Try):
            yield from _bindings(node.body)


class _Surface:
    """The lines of one package: what each public name is called with."""

    def __init__(self, sources: Sources, package: str) -> None:
        self.sources, self.package = sources, package

    @cached_property
    def names(self) -> list[tuple[str, Definition]]:
        """Public paths and their definitions, the shortest path of each definition first."""
        sources, public = self.sources, []
        by_module = not sources.listed(self.package)
        for module in sources.modules(self.package):
            if any(part.startswith("_") or part == "experiments" for part in module.split(".")[1:]):
                continue
            is_package = str(sources.file(module)).endswith("__init__.py")
            listed = sources.listed(module) if is_package or by_module else None
            if listed is None and by_module:
                listed = [
                    name
                    for name, node in sources.statements(module).items()
                    if not name.startswith("_") and not isinstance(node, ast.Import | ast.ImportFrom)
                ]
            public += [(f"{module}.{name}", sources.find(module, name)) for name in listed or []]
        return sorted(public, key=lambda item: (item[0].count("."), item[0]))

    def lines(self) -> list[str]:
        first: dict[str, str] = {}
        lines = []
        for path, definition in self.names:
            own = definition.module.partition(".")[0] == self.package
            if definition.path in first or not own:
                lines.append(f"{path} = {first.get(definition.path, definition.path)}")
                continue
            first[definition.path] = path
            lines += self._define(path, definition)
        return sorted(lines, key=lambda line: (key_of(line).casefold(), line))

    def _define(self, path: str, definition: Definition) -> Iterator[str]:
        node = definition.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}{_signature(node)}"
        elif isinstance(node, ast.ClassDef):
            yield from self._define_class(path, definition)
        elif isinstance(node, ast.AnnAssign):
            yield f"{path}: {ast.unparse(node.annotation)}"
        elif isinstance(node, ast.Assign):
            value = ast.unparse(node.value)
            yield f"{path} = {value}" if len(value) <= LONGEST_VALUE else f"{path} = ..."
        else:
            yield path  # a module, or bound in a way that shows nothing

    def _define_class(self, path: str, definition: Definition) -> Iterator[str]:
        assert isinstance(definition.node, ast.ClassDef)
        line = self.sources.bases(definition)
        names = [ast.unparse(base) for base in definition.node.bases]
        record = _record_options(line)
        kind = "class" if record is None else " ".join([*(key for key in ("frozen",) if record.get(key)), "dataclass"])
        yield f"{path}: {kind}{'(' + ', '.join(names) + ')' if names else ''}"
        is_tuple = any(name in ("NamedTuple", "TypedDict") for name in names)
        seen: set[str] = set()
        if is_tuple or (record is not None and record.get("init", True)):
            seen.add("__init__")
            yield f"{path}.__init__({', '.join(_fields(line, bool(record and record.get('kw_only'))))})"
        for parent in line:
            assert isinstance(parent.node, ast.ClassDef)
            for name, node in _bindings(parent.node.body):
                if name in seen or (name.startswith("_") and name != "__init__" and name not in PROTOCOL):
                    continue
                seen.add(name)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{path}.{name}{_method(node)}"
                elif isinstance(node, ast.AnnAssign) and not (is_tuple or (record is not None and _in_init(node))):
                    yield f"{path}.{name}: {ast.unparse(node.annotation)}"
                elif isinstance(node, ast.Assign):
                    yield f"{path}.{name} = {ast.unparse(node.value)[:LONGEST_VALUE]}"


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> dict[str, ast.expr]:
    calls = {(d.func if isinstance(d, ast.Call) else d): d for d in node.decorator_list}
    return {ast.unparse(name).rpartition(".")[2]: whole for name, whole in calls.items()}


def _record_options(line: list[Definition]) -> dict[str, bool] | None:
    """Return the options of a dataclass, its parents' where it is one only by inheritance; None if it is none."""
    for definition in line:
        assert isinstance(definition.node, ast.ClassDef)
        decorator = _decorators(definition.node).get("dataclass")
        if decorator is not None:
            words = decorator.keywords if isinstance(decorator, ast.Call) else []
            return {str(word.arg): bool(ast.literal_eval(word.value)) for word in words}
    return None


def _in_init(node: ast.AnnAssign) -> bool:
    if ast.unparse(node.annotation).startswith(("ClassVar", "typing.ClassVar")):
        return False
    words = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(word.arg == "init" and ast.unparse(word.value) == "False" for word in words)


def _fields(line: list[Definition], kw_only: bool) -> list[str]:
    """Return a record's arguments, its ancestors' first, as in its `__init__`."""
    fields: dict[str, str] = {}
    for definition in reversed(line):
        assert isinstance(definition.node, ast.ClassDef)
        for node in definition.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _in_init(node):
                default = _default(node.value)
                shown = f"{node.target.id}: {ast.unparse(node.annotation)}"
                fields[node.target.id] = shown if default is None else f"{shown}={default}"
    return ["*", *fields.values()] if kw_only and fields else list(fields.values())


def _default(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
        for word in value.keywords:
            if word.arg == "default":
                return ast.unparse(word.value)
            if word.arg == "default_factory":
                made = word.value
                return ast.unparse(made.body) if isinstance(made, ast.Lambda) else f"{ast.unparse(made)}()"
        return None
    return None if value is None else ast.unparse(value)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returned}"


def _method(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    decorators = _decorators(node)
    if "property" in decorators or "cached_property" in decorators:
        return f": property{_signature(node).partition(')')[2]}"
    if "staticmethod" in decorators:
        return f"{_signature(node)}, static"
    plain = copy.deepcopy(node)  # without self
    (plain.args.posonlyargs or plain.args.args).pop(0)
    return f"{_signature(plain)}{', of the class' if 'classmethod' in decorators else ''}"


def key_of(line: str) -> str:
    """Return the public path that a line is about.

    >>> key_of("effml_optim.SOAP.step(closure: object = None)")
    'effml_optim.SOAP.step'
    """
    return re.split(r"[( :=,]", line, maxsplit=1)[0]


def public_lines(package: Package, sources: Sources) -> list[str]:
    """Return the public names of a package with their signatures, sorted."""
    return _Surface(sources, package.module).lines()


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
    stored = file.read_text() if file.exists() else ""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("packages", nargs="*", help="such as effml-optim; all if none is named")
    parser.add_argument("--write", action="store_true", help="write docs/api anew; a released version's is left alone")
    parser.add_argument("--root", type=Path, default=ROOT, help="the workspace (default: this one)")
    options = parser.parse_args()
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
            file.write_text(snapshot(package, sources))
            print(f"wrote {file.relative_to(options.root)}")
    print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
