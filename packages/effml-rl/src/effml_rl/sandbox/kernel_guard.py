"""Ask the Linux kernel to refuse what a sandboxed program must not do: Landlock for files, seccomp for system calls.

Neither needs privileges, both hold for root, cannot be undone and survive whatever the program does to its own
interpreter. Landlock leaves readable only the standard library and what the loader needs, and writable only the
working directory. The seccomp filter answers EPERM to starting processes or threads, to sockets, to signals and every
other call that reaches another process, to changing owners, modes or times of files, and to administration.

Namespaces (`unshare`) would do the same where they are allowed, which inside containers they mostly are not.

This file runs in the sandbox's own interpreter: it imports nothing but the standard library. Interfaces:
`Documentation/userspace-api/landlock.rst` and `seccomp_filter.rst` of the Linux sources.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence

__all__ = ["restrict"]

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_SIGKILL = 9

# name: (x86_64, aarch64); -1 where an architecture has no such call.
_REFUSED = {
    "fork": (57, -1),
    "vfork": (58, -1),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "fchown": (93, 55),
    "lchown": (94, -1),
    "fchownat": (260, 54),
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "link": (86, -1),
    "linkat": (265, 37),
    "symlink": (88, -1),
    "symlinkat": (266, 36),
    "mknod": (133, -1),
    "mknodat": (259, 33),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
}
_OWN_PROCESS_ONLY = {"tgkill": (234, 131), "prlimit64": (302, 261)}  # first argument: a process; 0 is oneself

# architecture: (column of the tables above, AUDIT_ARCH constant)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000  # system calls of the x32 ABI carry this bit

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8  # write, remove dir and file, make dir and regular file
_TRUNCATE = 1 << 14
_ACCESSES = {1: 13, 2: 14, 3: 15, 4: 15}  # Landlock ABI: how many kinds of access it knows; later ones know 16
_LOADER = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")


class _Instructions(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("program", ctypes.c_char_p))


def restrict(readable: Sequence[str], writable: str) -> tuple[str, ...]:
    """Restrict this process for ever; return the guards that now hold, of `("landlock", "seccomp")`.

    Args:
        readable: directories whose files may be read, besides those of the dynamic loader.
        writable: the one directory where files may also be made, written and removed.
    """
    if sys.platform != "linux":
        return ()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return ()
    guards = (("landlock", _landlock(libc, readable, writable)), ("seccomp", _seccomp(libc)))
    return tuple(name for name, holds in guards if holds)


def _landlock(libc: ctypes.CDLL, readable: Sequence[str], writable: str) -> bool:
    abi = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < 1:
        return False
    handled = (1 << _ACCESSES.get(abi, 16)) - 1
    attributes = struct.pack("=Q", handled)
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    try:
        rules = [(path, _READ_FILE | _READ_DIR) for path in (*readable, *_LOADER)]
        rules.append((writable, (_READ_FILE | _READ_DIR | _WRITE | _TRUNCATE) & handled))
        for path, access in rules:
            try:
                beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # not on this machine, so nothing to allow
            allowed = access if os.path.isdir(path) else access & _READ_FILE
            added = libc.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, beneath), ctypes.c_uint32(0))
            os.close(beneath)
            if added != 0:
                return False
        return bool(libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)) == 0)
    finally:
        os.close(ruleset)


def _seccomp(libc: ctypes.CDLL) -> bool:
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return False
    program = _filter(*architecture, own=os.getpid())
    instructions = _Instructions(len(program) // 8, program)
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(instructions), 0, 0) == 0)


def _filter(column: int, audit_arch: int, own: int) -> bytes:
    """Return the filter in classic BPF; `struct seccomp_data` holds number, architecture and arguments."""
    number, arch, argument = 0, 4, 16
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: ERRNO(EPERM)

    def load(offset: int) -> bytes:
        return struct.pack("=HBBI", 0x20, 0, 0, offset)

    def answer(value: int) -> bytes:
        return struct.pack("=HBBI", 0x06, 0, 0, value)

    def equal(value: int, skip: int, otherwise: int) -> bytes:
        return struct.pack("=HBBI", 0x15, skip, otherwise, value)

    def at_least(value: int, skip: int, otherwise: int) -> bytes:
        return struct.pack("=HBBI", 0x35, skip, otherwise, value)

    lines = [load(arch), equal(audit_arch, 1, 0), answer(kill)]
    lines += [load(number), at_least(_X32, 0, 1), answer(refuse)]
    for numbers in _OWN_PROCESS_ONLY.values():
        own_or_none = [load(argument), equal(own, 1, 0), equal(0, 0, 1), answer(allow), answer(refuse)]
        lines += [equal(numbers[column], 0, len(own_or_none)), *own_or_none]
    for numbers in _REFUSED.values():
        if numbers[column] >= 0:
            lines += [equal(numbers[column], 0, 1), answer(refuse)]
    return b"".join([*lines, answer(allow)])
