"""The sandbox's own interpreter: fork one child per program, limit it, run it, kill its group, reap it.

A fork of a warm interpreter takes a few milliseconds where a new interpreter takes tens. The server never runs
anything but this file; its children inherit no secret, no descriptor but their own pipes, and an environment of three
variables. Its one thread does one thing at a time, as the other end of the socket on its standard input says:

    parent: length of the job (4 bytes) with three descriptors (stdout, stderr, report), then the job as JSON
    server: one byte, once the child exists
    parent: one byte, when the child is no longer wanted (at the end of the stream: and neither is the server)
    server: the child's wait status (4 bytes)

Each line that the child writes on its report pipe begins with the job's nonce: one when the limits hold and the
program starts, one when it ended. What the program writes there itself can at most claim a value.

This file runs in the sandbox's own interpreter: it imports nothing but the standard library and its like.
"""

from __future__ import annotations

import array
import ast
import contextlib
import importlib
import json
import os
import random
import resource
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from effml_rl.sandbox.audit_guard import install
from effml_rl.sandbox.kernel_guard import restrict
from effml_rl.sandbox.values import NotPlain, encode

__all__ = ["serve"]

_COMMON = (  # what solutions import most, loaded once
    *("bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"),
    *("math", "operator", "re", "statistics", "string", "typing"),
)
_FILE_BYTES, _OPEN_FILES, _FILES_WRITTEN = 1 << 20, 32, 64


def serve(paths: list[str], setup: str) -> NoReturn:
    """Run the jobs of the socket on standard input until it closes.

    Args:
        paths: directories that programs may import from besides the standard library.
        setup: source to run once, before the first job.
    """
    control = socket.socket(fileno=0)
    sys.path += paths
    problem = b""
    try:
        for name in _COMMON:
            importlib.import_module(name)
        exec(setup, {"__name__": "setup"})
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".encode(errors="replace")[:1000]
    control.sendall(struct.pack("!I", len(problem)) + problem)
    readable = [os.path.realpath(path) for path in sys.path if os.path.isdir(path)]
    while not problem and _serve_one(control, sorted({*sys.path, *readable})):
        pass
    os._exit(0)  # at once: what was imported has nothing to save


def _serve_one(control: socket.socket, readable: list[str]) -> bool:
    header, descriptors = _receive_descriptors(control)
    if len(header) < 4:
        return False
    job = json.loads(_receive(control, struct.unpack("!I", header)[0]))
    child = os.fork()
    if child == 0:
        control.detach()
        _run(job, readable, *descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        control.sendall(b"+")
        wanted = control.recv(1) != b""
    except OSError:
        wanted = False
    for kill in (os.killpg, os.kill):  # the group once the child leads one, and the child in any case
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if wanted:
        control.sendall(struct.pack("!i", status))
    return wanted


def _receive_descriptors(control: socket.socket) -> tuple[bytes, list[int]]:
    descriptors = array.array("i")
    header, ancillary, _, _ = control.recvmsg(4, socket.CMSG_LEN(3 * descriptors.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data)
    return header, list(descriptors)


def _receive(control: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = control.recv(length - len(parts))
        if not part:
            raise EOFError("the parent left in the middle of a job")
        parts += part
    return bytes(parts)


def _run(job: dict[str, Any], readable: list[str], stdout: int, stderr: int, report: int) -> NoReturn:
    """Become the program's process: nothing above this frame is ever returned to."""
    try:
        os.setsid()
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
            os.dup2(source, target)
        os.closerange(3, report)
        os.closerange(report + 1, 256)
        os.chdir(job["directory"])
        _limit(job["cpu_seconds"], job["memory_bytes"])
        say, refuse = _reporter(report, job["nonce"].encode())
        guards = restrict(readable, job["directory"])
        for name in ("ctypes", "_ctypes", "effml_rl.sandbox.kernel_guard"):
            sys.modules.pop(name, None)
        random.seed(0)
        sys.argv = ["program"]
        os.environ["TMPDIR"] = job["directory"]
        install(readable, job["directory"], _FILES_WRITTEN, refuse)
        say({"isolation": "+".join(guards) or "rlimit"})
        say(_outcome(job))
    finally:
        os._exit(1)


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_CORE: 0,
    }
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm", "rb") as pages:
        # A limit below what is mapped already would make every allocation fail, and every program wrong.
        mapped = int(pages.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = mapped + memory_bytes
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _reporter(report: int, nonce: bytes) -> tuple[Callable[[dict[str, Any]], None], Callable[[str], None]]:
    """Return how to write a report, and how to report a refused operation and end."""
    write, leave, encoded, dumps, length = os.write, os._exit, str.encode, json.dumps, len
    refusal = nonce + b' {"status": "runtime_error", "detail": "refused: '

    def say(message: dict[str, Any]) -> None:
        line = nonce + b" " + encoded(dumps(message)) + b"\n"
        while length(line) > 0:
            line = line[write(report, line) :]

    def refuse(operation: str) -> None:
        try:
            write(report, refusal + encoded(operation, "ascii", "replace") + b'"}\n')
        finally:
            leave(1)

    return say, refuse


def _outcome(job: dict[str, Any]) -> dict[str, Any]:
    """Compile and run the program, ask for the values, and say how it went."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        tree = ast.parse(job["code"], "<program>")
        calls = [compile(call, "<call>", "eval") for call in job["calls"]]
        if job["last_expression"]:
            last = tree.body.pop() if tree.body else None
            if not isinstance(last, ast.Expr):
                raise SyntaxError("the last statement is not an expression")
            calls = [compile(ast.Expression(last.value), "<program>", "eval")]
        program = compile(tree, "<program>", "exec")
    except MemoryError:
        return {"status": "oom", "detail": "MemoryError while compiling"}
    except Exception as error:
        return {"status": "syntax_error", "detail": f"{type(error).__name__}: {error}"[:500]}
    out_of_memory = {"status": "oom", "detail": "MemoryError"}
    try:
        try:
            exec(program, main.__dict__)
        except SystemExit as error:
            if calls or error.code not in (None, 0):
                return {"status": "runtime_error", "detail": f"SystemExit: {error.code!s:.100}"}
        values = [encode(eval(call, main.__dict__)) for call in calls]
        json.dumps(values)  # an integer may be too long for text
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        return {"status": "completed", "values": values}
    except MemoryError:
        return out_of_memory
    except NotPlain as error:
        return {"status": "unparseable", "detail": str(error)}
    except BaseException as error:
        return {"status": "runtime_error", "detail": f"{type(error).__name__}: {error}"[:500]}
