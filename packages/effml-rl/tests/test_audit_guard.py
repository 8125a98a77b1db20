"""The audit hook by itself, in an interpreter that has nothing else: it must hold where the kernel offers nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from effml_rl.sandbox import audit_guard

# One interpreter forks a child per body, guards the child, and says for each what was refused or printed, and the exit
# code: 7 where the guard ended it.
RUN = """
import json, os, signal, socket, sys, threading
sys.path.insert(0, {source!r})
from audit_guard import install
parent = os.getpid()
outcomes = {{}}
for number, body in enumerate(json.load(sys.stdin)):
    os.makedirs(os.path.join({directory!r}, str(number), "work"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.chdir(os.path.join({directory!r}, str(number), "work"))
        work = os.getcwd()
        def refuse(operation, write=os.write, leave=os._exit):
            write(1, operation.encode())
            leave(7)
        flush, leave = sys.stdout.flush, os._exit
        install([p for p in sys.path if os.path.isdir(p)], work, 4, refuse)
        code = 0
        try:
            exec(body)
        except BaseException as error:
            print("raised", type(error).__name__)
            code = 1
        flush()
        leave(code)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    outcomes[body] = [said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
print(json.dumps(outcomes))
"""
REFUSED = {
    "os.fork()": "os.fork",
    "os.execv('/bin/true', ['true'])": "os.exec",
    "os.posix_spawn('/bin/true', ['true'], {})": "os.posix_spawn",
    "os.system('true')": "os.system",
    "import subprocess; subprocess.run(['true'])": "import _posixsubprocess",
    "os.kill(parent, 0)": "os.kill",
    "os.killpg(0, 0)": "os.killpg",
    "signal.pthread_kill(threading.get_ident(), 0)": "signal.pthread_kill",
    "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))": "resource.setrlimit",
    "socket.socket()": "socket.__new__",
    "socket.getaddrinfo('localhost', 80)": "socket.getaddrinfo",
    "import ctypes": "import ctypes",
    "import _ctypes": "import _ctypes",
    "import gc; gc.get_objects()": "gc.get_objects",
    "sys._current_frames()": "sys._current_frames",
    "sys.addaudithook(print)": "sys.addaudithook",
    "open('/etc/passwd')": "open",
    "open(b'/etc/passwd')": "open",
    "open('../x')": "open",
    "open(work + '/../x', 'w')": "open",
    "open(os.__file__, 'a')": "open",
    "os.open(os.path.dirname(os.__file__), os.O_RDONLY)": "open",
    "import pathlib; pathlib.Path('/etc/passwd').read_text()": "open",
    "class P(str):\n    startswith = lambda *_: True\nopen(P('/etc/passwd'))": "open",
    "os.listdir('/')": "os.listdir",
    "list(os.scandir('/etc'))": "os.scandir",
    "os.mkdir('/tmp/effml-never')": "os.mkdir",
    "os.remove('/tmp/effml-never')": "os.remove",
    "os.rename('/tmp/effml-never', 'x')": "os.rename",
    "os.chdir('/')": "os.chdir",
    "os.chmod('.', 0o777)": "os.chmod",
    "os.symlink('/etc', 'etc')": "os.symlink",
    "[open(str(i), 'w') for i in range(5)]": "open",
    "import sqlite3; sqlite3.connect('x')": "sqlite3.connect",
}
if sys.version_info >= (3, 12):  # 3.11 has no audit event for threads
    started = "_thread.start_joinable_thread" if sys.version_info >= (3, 13) else "_thread.start_new_thread"
    REFUSED["threading.Thread(target=print).start()"] = started
HONEST = [
    "open('a', 'w').write('x'); print(open(work + '/a').read())",
    "import pathlib; pathlib.Path('b').write_text('x'); print(os.listdir())",
    "os.mkdir('d'); os.rename('d', 'e'); os.rmdir('e'); print(1)",
    "import decimal, statistics, random, json; print(1)",
    "import collections, dataclasses, enum; collections.namedtuple('P', 'x')(1); print(1)",
    "from functools import lru_cache; print(lru_cache(abs)(1))",
    "import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    print(traceback.format_exc())",
    "open(os.__file__).read(); print(1)",
]
ATTACKS = [
    "builtins.type = builtins.str = builtins.len = lambda *_: str",
    "os.write = os._exit = lambda *_: None",
    "for f in (sys._getframe(), sys._getframe().f_back):\n    f and f.f_globals.update(_REFUSED=(), refuse=print)",
    "sys.settrace(lambda *_: None); sys.setprofile(lambda *_: None)",
    "import audit_guard; audit_guard._REFUSED_FAMILIES = (); audit_guard._REFUSED = frozenset()",
    "sys.modules.clear()",
]


def stubborn(body):
    return f"try:\n    exec({body!r})\nexcept BaseException:\n    pass\nprint('alive')"


def after(attack):
    return f"import builtins\nkill, say = os.kill, os.write\n{attack}\nkill(parent, 0)\nsay(1, b'alive')"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    source = RUN.format(source=str(Path(audit_guard.__file__).parent), directory=str(tmp_path_factory.mktemp("work")))
    done = subprocess.run(
        [sys.executable, "-S", "-B", "-c", source],
        input=json.dumps([*map(stubborn, REFUSED), *HONEST, *map(after, ATTACKS)]),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(("body", "operation"), REFUSED.items())
def test_refuses_and_ends_the_program(outcomes, body, operation):
    assert outcomes[stubborn(body)] == [operation, 7]


@pytest.mark.parametrize("body", HONEST)
def test_honest_programs_do_not_notice(outcomes, body):
    said, code = outcomes[body]
    assert code == 0, said
    assert said


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_the_program_replaces_weakens_the_hook(outcomes, attack):
    assert outcomes[after(attack)] == ["os.kill", 7]
