"""Build small C files for this machine at first use, and keep the libraries in the user's cache directory.

`$XDG_CACHE_HOME/effml`, else `~/.cache/effml`. A build takes a second or less. Without a compiler, or where it
fails, callers get None, the log says so once, and the plain versions serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["library"]

_log = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@functools.cache
def library(source: Path, defines: tuple[str, ...] = (), *, fused: bool = False) -> ctypes.CDLL | None:
    """Build or find the library of a C file that includes no file of its own; None: plain versions must serve.

    Args:
        defines: macros, each `NAME` or `NAME=value`.
        fused: a x + y may be rounded once instead of twice: faster, yet not bit by bit what torch computes.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    contraction = f"-ffp-contract={'fast' if fused else 'off'}"
    command = [compiler, *_FLAGS, contraction, *(f"-D{define}" for define in defines), str(source), "-lm"]
    try:
        parts = [source.read_bytes(), _machine(), *map(str.encode, command)]
        name = f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
        path = _cache_directory() / name
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                built = Path(scratch) / name
                subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True, timeout=120)
                built.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).splitlines()[0]
        _log.warning("%s could not be built, so the plain version serves: %s", source.name, reason)
        return None


@functools.cache
def _compiler() -> str | None:
    names = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        _log.warning("no C compiler found (cc, gcc, clang), so plain versions serve on the CPU, several times slower")
    return found


@functools.cache
def _machine() -> bytes:
    """Return what tells one processor's instructions from another's: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n")
        flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    except OSError:
        flags = platform.version().encode()
    return platform.machine().encode() + platform.system().encode() + flags


@functools.cache
def _cache_directory() -> Path:
    """Return a directory that only this user can write, so that nobody else's code is loaded from it."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(home) / "effml"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError) as error:
        _log.info("no cache directory, so libraries are built anew in every process: %s", error)
    return Path(tempfile.mkdtemp(prefix="effml-"))
