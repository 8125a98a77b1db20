"""What goes into the sandbox and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from effml_shared.errors import ConfigError

__all__ = ["Execution", "ExecutionStatus", "Program"]

ExecutionStatus = Literal[
    "completed",  # it ran and every value asked for came back
    "unparseable",  # a value asked for is not plain data
    "timeout",
    "oom",
    "output_limit",
    "runtime_error",  # an exception, a refused operation, or an end without an answer
    "syntax_error",
    "sandbox_error",  # our fault, not the program's
]


@dataclass(frozen=True)
class Program:
    """Python source, and what to ask for once it has run.

    Attributes:
        code: source of a module; it runs as `__main__`.
        calls: expressions evaluated afterwards in the program's namespace, such as `"solve(3)"`. Expected values do
            not belong here: the program can read everything that is in its process.
        last_expression: ask for the value of the last statement instead, which must then be an expression.

    >>> Program("def solve(n):\\n    return n + 1", calls=("solve(3)",)).calls
    ('solve(3)',)
    """

    code: str
    calls: Sequence[str] = ()
    last_expression: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.code, str):
            raise ConfigError(f"code: got {self.code!r}, expected Python source")
        if isinstance(self.calls, str) or not all(isinstance(call, str) for call in self.calls):
            raise ConfigError(f"calls: got {self.calls!r}, expected a sequence of expressions")
        if self.calls and self.last_expression:
            raise ConfigError("last_expression: got True together with calls, expected one of the two")


@dataclass(frozen=True)
class Execution:
    """How one program ended.

    Attributes:
        values: one plain value per call when completed, else empty.
        stdout, stderr: what it wrote, up to the sandbox's limit.
        detail: one line on what went wrong.
        isolation: the kernel's guards that held, `"landlock+seccomp"` at best, `"rlimit"` when only resource limits
            and the audit hook did, empty when the program never started.
        seconds: wall time from the program's start.
    """

    status: ExecutionStatus
    values: tuple[Any, ...] = ()
    stdout: str = ""
    stderr: str = ""
    detail: str = ""
    isolation: str = ""
    seconds: float = 0.0
