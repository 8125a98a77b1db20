"""Refuse, inside the interpreter, what a sandboxed program must not do: a CPython audit hook (PEP 578).

It holds on every operating system and gives the refusal a name. It is not a wall by itself (native code walks around
it); `kernel_guard` is the wall where there is a Linux kernel.

A refused operation ends the program at once instead of raising: an exception could be caught and tried again, and its
traceback would lead to the hook's own frame. For the same reason the hook reads no global and no builtin name while it
runs, so nothing that the program replaces is ever asked.

This file runs in the sandbox's own interpreter: it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["install"]

_REFUSED_FAMILIES = (
    "ctypes.",
    "fcntl.",
    "ftplib.",
    "http.",
    "imaplib.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "pty.",
    "resource.",
    "signal.",
    "smtplib.",
    "socket.",
    "sqlite3.",
    "subprocess.",
    "syslog.",
    "urllib.",
)
_REFUSED = frozenset(
    {
        "_thread.start_new_thread",
        "_thread.start_joinable_thread",
        "gc.get_objects",
        "gc.get_referents",
        "gc.get_referrers",
        "os.chdir",
        "os.chflags",
        "os.chmod",
        "os.chown",
        "os.kill",
        "os.killpg",
        "os.link",
        "os.lockf",
        "os.removexattr",
        "os.setxattr",
        "os.symlink",
        "os.system",
        "os.truncate",
        "os.utime",
        "sys._current_exceptions",
        "sys._current_frames",
        "sys.addaudithook",
    }
)
# What starts processes, leaves named objects in shared memory or calls native code without an audit event.
_REFUSED_MODULES = frozenset(
    {"_ctypes", "_multiprocessing", "_posixshmem", "_posixsubprocess", "_testcapi", "_xxsubinterpreters", "ctypes"}
)
_CHANGES_A_DIRECTORY = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}  # event: where its dir_fd stands
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(readable: Sequence[str], writable: str, max_writes: int, on_refusal: Callable[[str], None]) -> None:
    """Refuse from now on; `on_refusal` gets the operation's name and must end the process.

    Args:
        readable: directories whose files may be read.
        writable: the directory in which files may also be made and removed.
        max_writes: how many files and directories may be opened for writing, made or removed in all.
    """
    families, refused, modules, changes, writes_mask = (
        _REFUSED_FAMILIES,
        _REFUSED,
        _REFUSED_MODULES,
        _CHANGES_A_DIRECTORY,
        _WRITES,
    )
    roots = tuple(path + os.sep for path in (*readable, writable))
    exact = frozenset((*readable, writable))
    home, root, separator = writable, writable + os.sep, os.sep
    kind, text, raw, number, none = type, str, bytes, int, type(None)
    starts, split, decode = str.startswith, str.split, bytes.decode
    left = [max_writes]

    def inside(path: Any, write: bool) -> bool:
        if kind(path) is number or (kind(path) is none and not write):  # an open file, or the working directory
            return True
        if kind(path) is raw:
            path = decode(path, "utf-8", "surrogateescape")
        if kind(path) is not text or ".." in split(path, separator):
            return False
        if not starts(path, separator):
            return True
        return path == home or starts(path, root) if write else path in exact or starts(path, roots)

    def spend() -> bool:
        left[0] -= 1
        return left[0] >= 0

    def allowed(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, mode, flags = arguments
            if kind(path) is number:
                return True
            write = flags & writes_mask != 0
            # `os.open` (no mode) may be relative to a directory's descriptor, so it stays in the working directory.
            return inside(path, write or mode is None) and (not write or spend())
        if event == "import":
            return arguments[0] not in modules
        if event == "os.listdir" or event == "os.scandir":
            return inside(arguments[0], False)
        if event in changes:
            return arguments[changes[event]] == -1 and inside(arguments[0], True) and spend()
        if event == "os.rename":
            return arguments[2] == -1 == arguments[3] and inside(arguments[0], True) and inside(arguments[1], True)
        return event not in refused and not starts(event, families)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not allowed(event, arguments):
            on_refusal(event if event != "import" else "import " + arguments[0])

    sys.addaudithook(hook)
