"""A package's public names as lines of text: signatures, fields, methods, as the sources write them.

Public is what a package's or a subpackage's `__all__` lists, and what its public classes define or inherit within the
package. A package whose `__all__` lists nothing but its version (the core) is used module by module: there, every name
without an underscore that a module defines is public. What a class inherits from another package is that package's
promise: `...` stands for such fields of a dataclass.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from functools import cached_property

from source_tree import Definition, Package, Sources, bindings

# Special methods by which an object is used; the others (`__repr__`, `__eq__`, `__hash__`) are nobody's contract.
PROTOCOL = {f"__{name}__" for name in ("call", "len", "iter", "next", "getitem", "contains", "enter", "exit")}
LONGEST_VALUE = 100  # characters of a constant's value that are shown; longer ones are tables


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
            yield f"{path}.__init__({_fields(line, record is not None and self._has_foreign_parent(line))})"
        for parent in line:
            assert isinstance(parent.node, ast.ClassDef)
            for name, node in bindings(parent.node.body):
                if name in seen or (name.startswith("_") and name != "__init__" and name not in PROTOCOL):
                    continue
                seen.add(name)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{path}.{name}{_method(node)}"
                elif isinstance(node, ast.AnnAssign) and not (is_tuple or (record is not None and _in_init(node))):
                    yield f"{path}.{name}: {ast.unparse(node.annotation)}"
                elif isinstance(node, ast.Assign):
                    yield f"{path}.{name} = {ast.unparse(node.value)[:LONGEST_VALUE]}"

    def _has_foreign_parent(self, line: list[Definition]) -> bool:
        """Return whether a record inherits fields from a record of another package of the workspace."""
        for definition in line:
            assert isinstance(definition.node, ast.ClassDef)
            for base in definition.node.bases:
                parent = self.sources.find(definition.module, ast.unparse(base).partition("[")[0])
                foreign = parent.module.partition(".")[0] != self.package
                if foreign and _record_options(self.sources.bases(parent)) is not None:
                    return True
        return False


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


def _fields(line: list[Definition], foreign: bool) -> str:
    """Return a record's arguments, its ancestors' first, as in its `__init__`; `foreign`: some stand elsewhere."""
    positional: dict[str, str] = {}
    keyword: dict[str, str] = {}
    for definition in reversed(line):
        assert isinstance(definition.node, ast.ClassDef)
        by_keyword = bool((_record_options([definition]) or {}).get("kw_only"))
        for node in definition.node.body:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _in_init(node)):
                continue
            annotation = ast.unparse(node.annotation)
            if annotation.endswith("KW_ONLY"):
                by_keyword = True
                continue
            default, name = _default(node.value), node.target.id
            fields, others = (keyword, positional) if by_keyword else (positional, keyword)
            others.pop(name, None)
            fields[name] = f"{name}: {annotation}" if default is None else f"{name}: {annotation}={default}"
    return ", ".join([*["..."][: int(foreign)], *positional.values(), *["*"][: len(keyword)], *keyword.values()])


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
