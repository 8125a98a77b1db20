"""Run Python that a model wrote, outside the trainer's process and within limits.

Each program gets a process of its own, forked from a warm interpreter that has loaded the standard library only: new
session, no standard input, scrubbed environment, an empty working directory that is removed afterwards, limits on
wall time, processor time, memory, files and output. It starts no process and no thread, opens no socket, and reads and
writes no file outside its directory and the standard library: an audit hook refuses that everywhere, and on Linux the
kernel does too (`kernel_guard`). Afterwards its whole process group is killed and reaped.

This is process isolation against programs that are wrong, greedy or cheating. It is not a security boundary against a
determined attacker: for that, run the trainer in a virtual machine. `Execution.isolation` says what held.

Limits: Linux in full; without `/proc` (macOS) memory is not limited. Programs can import the standard library and what
`paths` offers. Cost: a few milliseconds per program beyond the program itself, and one resident server per worker.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError

from effml_rl.sandbox.program import Execution, Program
from effml_rl.sandbox.worker import ServerLost, Worker

__all__ = ["PythonSandbox"]


class PythonSandbox:
    """A pool of sandbox servers; safe to use from any thread, an event loop, or a forked process.

    Args:
        timeout: wall time of one program in seconds, counted from its own start, not from when it was queued.
        memory_mb: memory one program may map beyond what the interpreter has mapped, MiB.
        workers: programs that run at the same time; None: one per processor of this machine.
        output_kb: what one program may write to each of stdout, stderr and its answer, KiB.
        paths: directories that programs may import from besides the standard library.
        setup: source of your own that each server runs once and without limits, such as `"import numpy"`: programs
            find the modules it imported loaded, and none of its names.

    Raises:
        ConfigError: an argument is out of range.

    >>> with PythonSandbox(workers=1) as sandbox:
    ...     sandbox.run(Program("def double(x):\\n    return 2 * x", calls=("double(21)",))).values
    (42,)
    """

    def __init__(
        self,
        timeout: float = 3.0,
        memory_mb: int = 256,
        workers: int | None = None,
        output_kb: int = 64,
        paths: Sequence[str] = (),
        setup: str = "",
    ) -> None:
        check_range("timeout", timeout, 1e-3, 1e6)
        check_count("memory_mb", memory_mb, 1)
        check_count("output_kb", output_kb, 1)
        if workers is not None:
            check_count("workers", workers, 1)
        self.timeout, self.memory_mb, self.output_kb = float(timeout), memory_mb, output_kb
        self.workers = workers or os.cpu_count() or 1
        self._paths, self._setup = [os.path.abspath(path) for path in paths], setup
        self._pool = _Pool(self.workers)
        weakref.finalize(self, self._pool.close)

    def run(self, program: Program) -> Execution:
        """Run one program and wait for it. Never raises for what the program does."""
        if self._pool.closed:
            raise ConfigError("sandbox: got a program after close(), expected an open sandbox")
        self._pool.own()
        with self._pool.places:
            try:
                worker = self._pool.take() or Worker(self._paths, self._setup)
            except (ServerLost, OSError) as error:
                return Execution("sandbox_error", detail=str(error))
            try:
                execution = worker.run(
                    program,
                    timeout=self.timeout,
                    memory_bytes=self.memory_mb << 20,
                    output_bytes=self.output_kb << 10,
                )
            except (ServerLost, OSError) as error:
                worker.close()
                return Execution("sandbox_error", detail=str(error))
            except BaseException:  # Ctrl-C in the middle of the protocol
                worker.close()
                raise
            self._pool.give(worker)
            return execution

    def run_many(self, programs: Sequence[Program]) -> list[Execution]:
        """Run programs side by side; results in their order.

        Raises:
            ConfigError: they are not programs.
        """
        if isinstance(programs, str) or not all(isinstance(program, Program) for program in programs):
            raise ConfigError(f"programs: got {programs!r:.60}, expected a list of `Program`")
        with ThreadPoolExecutor(max_workers=min(self.workers, max(len(programs), 1))) as threads:
            return list(threads.map(self.run, programs))

    def close(self) -> None:
        """End the servers; happens by itself when the sandbox is collected or the process ends."""
        self._pool.close()

    def __enter__(self) -> PythonSandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Pool:
    """Servers that wait for work, and the right to have one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.closed = False
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self.places = threading.BoundedSemaphore(self._size)

    def own(self) -> None:
        """In a forked process: leave the servers to the process that started them."""
        if self._process != os.getpid():
            inherited = self._idle
            self._reset()
            self._inherited = inherited  # kept, so that nobody waits for another process's children
            for worker in inherited:
                worker.forget()

    def take(self) -> Worker | None:
        """Return a server that waits, None if there is none; one that was killed meanwhile is buried."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                worker = self._idle.pop()
            if worker.alive():
                return worker
            worker.close()

    def give(self, worker: Worker) -> None:
        with self._lock:
            if not self.closed:
                self._idle.append(worker)
                return
        worker.close()

    def close(self) -> None:
        self.closed = True
        if self._process == os.getpid():
            while (worker := self.take()) is not None:
                worker.close()
