"""The trainer's end of one sandbox server: send a program, watch its pipes and the clock, have it killed and reaped.

Works in any thread and under any event loop: no signal handlers, no alarms, no `preexec_fn`. What the program wrote
is bounded while it is read, and parsed as JSON only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from effml_rl.sandbox.program import Execution, ExecutionStatus, Program
from effml_rl.sandbox.values import NotPlain, decode

__all__ = ["ServerLost", "Worker"]

# The packages' own __init__ would load torch into the sandbox, so bare packages stand in for them.
_START = """
import sys, types
arguments = {arguments!r}
for name, path in arguments["packages"]:
    package = types.ModuleType(name)
    package.__path__ = [path]
    sys.modules[name] = package
from effml_rl.sandbox.server import serve
serve(arguments["paths"], arguments["setup"])
"""
_HERE = Path(__file__).resolve().parent
_PACKAGES = [("effml_rl", str(_HERE.parent)), ("effml_rl.sandbox", str(_HERE))]
_ENVIRONMENT = {
    "PATH": os.defpath,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a rewarded program can be replayed
    "OPENBLAS_NUM_THREADS": "1",  # a server that forks has one thread
    "OMP_NUM_THREADS": "1",
}
_START_SECONDS = 60.0  # of a server, or of one program up to its first statement, on a machine that is overloaded
_STATUSES = frozenset({"completed", "unparseable", "oom", "runtime_error", "syntax_error"})


class ServerLost(Exception):
    """The server did not start, has ended or does not answer."""


class Worker:
    """One server process; not thread-safe: one program at a time."""

    def __init__(self, paths: Sequence[str], setup: str) -> None:
        arguments = {"packages": _PACKAGES, "paths": list(paths), "setup": setup}
        ours, theirs = socket.socketpair()
        ours.settimeout(_START_SECONDS)
        self._control = ours
        with theirs:
            # Isolated (-I) but for the environment, which holds nothing that is not set here.
            self._server = subprocess.Popen(
                [sys.executable, "-s", "-P", "-S", "-B", "-c", _START.format(arguments=arguments)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        try:
            (length,) = struct.unpack("!I", self._receive(4))
            problem = self._receive(length).decode(errors="replace")
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        if problem:
            self.close()
            raise ServerLost(f"the sandbox's set-up failed: {problem}")

    def alive(self) -> bool:
        """Say whether the server is still there."""
        return self._server.poll() is None

    def close(self) -> None:
        """End the server, and with it whatever it runs."""
        self._control.close()  # a server that waits kills and reaps its child, then leaves
        try:
            self._server.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def forget(self) -> None:
        """Let go of a server that belongs to the process this one was forked from."""
        self._control.close()

    def run(self, program: Program, *, timeout: float, memory_bytes: int, output_bytes: int) -> Execution:
        """Run one program to its end or its limits.

        Raises:
            ServerLost: the server failed; close this worker.
        """
        nonce = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="effml-sandbox-", ignore_cleanup_errors=True) as directory:
            job = {
                "nonce": nonce,
                "directory": os.path.realpath(directory),
                "code": program.code,
                "calls": list(program.calls),
                "last_expression": program.last_expression,
                "cpu_seconds": math.ceil(timeout) + 1,
                "memory_bytes": memory_bytes,
            }
            with _Pipes(nonce.encode() + b" ", output_bytes) as pipes:
                self._send(json.dumps(job).encode(), pipes.write_ends)
                pipes.close_write_ends()
                self._receive(1)
                status, detail = pipes.watch(timeout)
                self._control.sendall(b"-")
                (ending,) = struct.unpack("!i", self._receive(4))
                return pipes.execution(status, detail, ending)

    def _send(self, job: bytes, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._control, [struct.pack("!I", len(job))], descriptors)
            self._control.sendall(job)
        except OSError as error:
            raise ServerLost(f"the sandbox's server has ended: {error}") from error

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            try:
                part = self._control.recv(length - len(parts))
            except OSError as error:
                raise ServerLost(f"the sandbox's server does not answer: {error}") from error
            if not part:
                raise ServerLost("the sandbox's server has ended")
            parts += part
        return bytes(parts)


class _Pipes:
    """The three pipes of one program, and what has been read from them."""

    def __init__(self, mark: bytes, limit: int) -> None:
        self._mark, self._limit = mark, limit
        self._ends: list[int] = []
        self.write_ends: list[int] = []
        self._read: dict[int, bytearray] = {}
        for _ in range(3):
            reading, writing = os.pipe()
            os.set_blocking(reading, False)
            self._ends.append(reading)
            self.write_ends.append(writing)
            self._read[reading] = bytearray()
        self._open = set(self._ends)
        self._isolation: str | None = None
        self._report: dict[str, Any] | None = None
        self._started = self._ended = 0.0

    def __enter__(self) -> _Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_write_ends()
        for end in self._ends:
            os.close(end)

    def close_write_ends(self) -> None:
        while self.write_ends:
            os.close(self.write_ends.pop())

    def watch(self, timeout: float) -> tuple[ExecutionStatus | None, str]:
        """Read until the program has reported, ended or overstepped; return the limit it broke, if any."""
        self._started = time.monotonic()
        deadline = self._started + _START_SECONDS
        with selectors.DefaultSelector() as selector:
            for end in self._ends:
                selector.register(end, selectors.EVENT_READ)
            while self._report is None and self._ends[2] in self._open:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._ended = time.monotonic()
                    if self._isolation is None:
                        return "sandbox_error", f"the program had not started after {_START_SECONDS:g} s"
                    return "timeout", f"more than {timeout:g} s"
                for key, _ in selector.select(left):
                    self._read_some(key.fd)
                    if key.fd not in self._open:
                        selector.unregister(key.fd)
                if any(len(data) > self._limit for data in self._read.values()):
                    self._ended = time.monotonic()
                    return "output_limit", f"more than {self._limit} bytes"
                started = self._isolation is not None
                self._parse()
                if self._isolation is not None and not started:
                    self._started = time.monotonic()
                    deadline = self._started + timeout
        self._ended = time.monotonic()
        return None, ""

    def execution(self, status: ExecutionStatus | None, detail: str, ending: int) -> Execution:
        """Say how the program ended, once it is dead. `ending`: its wait status."""
        for end in self._ends:
            while end in self._open and len(self._read[end]) <= self._limit:
                if not self._read_some(end):
                    break
        values: tuple[Any, ...] = ()
        if status is None and any(len(self._read[end]) > self._limit for end in self._ends):
            status, detail = "output_limit", f"more than {self._limit} bytes"
        if status is None:
            status, values, detail = self._verdict(ending)
        stdout, stderr = (bytes(self._read[end][: self._limit]).decode(errors="replace") for end in self._ends[:2])
        seconds = self._ended - self._started
        return Execution(status, values, stdout, stderr, detail, self._isolation or "", seconds)

    def _read_some(self, end: int) -> bool:
        """Read what is there; False where there is nothing."""
        try:
            data = os.read(end, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._open.discard(end)
        self._read[end] += data
        return bool(data)

    def _parse(self) -> None:
        """Find our own lines among what came out of the report pipe."""
        for line in bytes(self._read[self._ends[2]]).split(b"\n")[:-1]:
            if not line.startswith(self._mark):
                continue
            try:
                message = json.loads(line[len(self._mark) :])
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                message = {"status": "runtime_error", "detail": "a report that is none"}
            if self._isolation is None:
                self._isolation = str(message.get("isolation"))  # the server's own line: nothing else has run yet
            elif "isolation" not in message:
                self._report = message
                return

    def _verdict(self, ending: int) -> tuple[ExecutionStatus, tuple[Any, ...], str]:
        if self._isolation is None:
            return "sandbox_error", (), f"the program's process ended before its start ({_ending(ending)})"
        if self._report is None:
            if os.WIFSIGNALED(ending) and os.WTERMSIG(ending) == signal.SIGXCPU:
                return "timeout", (), "more processor time than wall time allows"
            return "runtime_error", (), f"ended without an answer ({_ending(ending)})"
        status, detail = self._report.get("status"), self._report.get("detail", "")
        if not isinstance(status, str) or status not in _STATUSES or not isinstance(detail, str):
            return "runtime_error", (), "a report that is none"
        if status == "completed":
            with contextlib.suppress(NotPlain, RecursionError):
                decoded = decode(self._report.get("values"))
                if isinstance(decoded, list):
                    return "completed", tuple(decoded), detail
            return "runtime_error", (), "a report that is none"
        return cast(ExecutionStatus, status), (), detail


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.WEXITSTATUS(status)}"
