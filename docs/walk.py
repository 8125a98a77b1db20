"""Walks through the code, as docs/architecture.md tells them, followed in the sources without running anything.

A row says which function calls which, by name or as `known as` → `name`: the caller was handed it. Names that do not
begin with a package are of the core. Of every row must be true:

- what it names exists, and the caller was called by an earlier row;
- without an arrow, the caller's body names the called thing, through an import or a definition of its module;
- with one, the body has the expression before the arrow; and somebody who has been met so far can have handed over what
  stands behind it: a class or function that a module of the walk names, a method of the caller's own class or of one
  that was made on the way, or what the module of an entry point announces.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from import_graph import CORE, Sources


class Missing(LookupError):
    """Nothing in the sources has this name."""


@dataclass(frozen=True)
class Place:
    """Something in the sources: its module, and its node after the classes and functions around it."""

    module: str
    chain: tuple[ast.stmt, ...]

    @property
    def node(self) -> ast.stmt:
        return self.chain[-1]

    @property
    def name(self) -> str:
        return str(getattr(self.node, "name", ""))

    @cached_property
    def owner(self) -> ast.stmt:
        """The class of a method, else the thing itself."""
        return self.chain[-2] if len(self.chain) > 1 and isinstance(self.chain[-2], ast.ClassDef) else self.node


class Walk:
    """Follow rows of (caller, calls) through the sources; `announced` are the modules of entry points."""

    def __init__(self, sources: Sources, announced: Iterable[str] = ()) -> None:
        self.sources, self.announced = sources, set(announced)
        self.met: list[Place] = []

    def faults(self, rows: Iterable[Sequence[str]]) -> list[str]:
        """Return what is not so, one line per row; a row without a caller has that of the row before."""
        faults, caller = [], ""
        for first, calls, *_ in rows:
            caller = first.strip("`") or caller
            try:
                reason = self._follow(caller, *re.findall(r"`([^`]+)`", calls))
            except Missing as missing:
                reason = str(missing)
            if reason:
                faults.append(f"{caller}, {calls}: {reason}")
        return faults

    def _follow(self, caller: str, *words: str) -> str:
        *known_as, name = words
        source, target = self.place(caller), self.place(name)
        begun = (source.node, source.owner) if source.name == "__init__" else (source.node,)
        if self.met and not any(place.node in begun for place in self.met):
            return f"no earlier row calls {caller}"
        self.met += [source] * (not self.met)
        reason = self._handed(source, known_as[0], target) if known_as else self._named(source, target)
        self.met.append(target)
        return reason

    def _named(self, source: Place, target: Place) -> str:
        return "" if target.node in self._names(source) else "the body does not name it"

    def _handed(self, source: Place, known_as: str, target: Place) -> str:
        if known_as not in {ast.unparse(node) for node in ast.walk(source.node) if isinstance(node, ast.expr)}:
            return f"the body does not say {known_as}"
        owner = str(getattr(target.owner, "name", ""))
        modules = {place.module for place in [*self.met, source]} | self.announced
        if (
            (known_as == f"self.{target.name}" and target.owner in self._ancestors(source))
            or any(target.owner in self._ancestors(place) for place in self.met if len(place.chain) == 1)
            or any(owner in self._identifiers(module, without=owner) for module in modules if owner)
            or (target.module in self.announced and not owner)
        ):
            return ""
        return f"nobody hands over {owner}"

    def place(self, dotted: str) -> Place:
        """Find what a name means."""
        path = dotted.split(".") if dotted.startswith("effml_") else [CORE, *dotted.split(".")]
        size = max((n for n in range(1, len(path) + 1) if self.sources.file(".".join(path[:n]))), default=0)
        if not 0 < size < len(path):
            raise Missing(f"{dotted} is no function or class")
        found = self.sources.find(".".join(path[:size]), path[size])
        if found.node is None or isinstance(found.node, ast.Import | ast.ImportFrom):
            raise Missing(f"there is no {dotted}")
        chain = [found.node]
        for name in path[size + 1 :]:
            body = getattr(chain[-1], "body", [])
            inner = next((node for node in body if getattr(node, "name", None) == name), None)
            if inner is None:
                raise Missing(f"there is no {dotted}")
            chain.append(inner)
        return Place(found.module, tuple(chain))

    def _names(self, source: Place) -> Iterator[ast.stmt]:
        """Yield the definitions that a body names; it may import them itself."""
        bound = self.sources.statements(source.module)
        inside = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(source.node)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(source.node):
            if not isinstance(node, ast.Name | ast.Attribute):
                continue
            head, *rest = ast.unparse(node).split(".")
            start = inside.get(head) or (self.sources.find(source.module, head).path if head in bound else "")
            if start and self.sources.file(start.partition(".")[0]):
                try:
                    yield self.place(".".join([start, *rest])).node
                except Missing:
                    continue  # a module, or an attribute that no class or module defines

    def _identifiers(self, module: str, without: str) -> set[str]:
        """Return every name that a module mentions, outside one definition."""
        file = self.sources.file(module)
        assert file is not None  # something was found in it
        names: set[str] = set()
        waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
        while waiting:
            node = waiting.pop()
            if getattr(node, "name", None) != without:
                names |= {str(getattr(node, key)) for key in ("id", "attr") if hasattr(node, key)}
                waiting += ast.iter_child_nodes(node)
        return names

    def _ancestors(self, of: Place) -> list[ast.stmt | None]:
        """Return the class that something is in or is, and what that inherits from."""
        if not isinstance(of.chain[0], ast.ClassDef):
            return []
        return [base.node for base in self.sources.bases(self.sources.find(of.module, of.chain[0].name))]
