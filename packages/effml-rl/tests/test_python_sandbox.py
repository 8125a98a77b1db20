import asyncio
import gc
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from effml_rl.sandbox import Program, PythonSandbox, worker
from effml_shared import errors
from effml_shared.errors import ConfigError

GOLD = 18
TIMEOUT = 0.3

# What a program tries, and the statuses that may come of it. Each is asked for `answer()`; the answer that would be
# rewarded is nowhere in its process.
HOSTILE = {
    # processes and threads
    "fork bomb": ("import os\nwhile True: os.fork()", {"runtime_error"}),
    "forkpty": ("import os\nos.forkpty()", {"runtime_error"}),
    "raw fork_exec": (
        "import _posixsubprocess as p\np.fork_exec(['/bin/true'], [b'/bin/true'], *[None] * 20)",
        {"runtime_error"},
    ),
    "subprocess": ("import subprocess\nsubprocess.Popen(['sleep', '60'])", {"runtime_error"}),
    "os.system": ("import os\nos.system('sleep 60 &')", {"runtime_error"}),
    "popen": ("import os\nos.popen('sleep 60')", {"runtime_error"}),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 60'])", {"runtime_error"}),
    "posix_spawn": ("import os\nos.posix_spawn('/bin/sleep', ['sleep', '60'], {})", {"runtime_error"}),
    "multiprocessing": (
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        {"runtime_error"},
    ),
    "zombies": (
        "import os\nfor _ in range(9):\n    if os.fork() == 0: os._exit(0)\nwhile True: pass",
        {"runtime_error"},
    ),
    "daemon": ("import os\nos.setsid()\nif os.fork() == 0:\n    while True: pass", {"runtime_error"}),
    "threads": (
        "import threading\ndef f():\n    while True: pass\nwhile True: threading.Thread(target=f).start()",
        {"runtime_error"},
    ),
    "thread pool": (
        "from concurrent.futures import ThreadPoolExecutor as T\nT(64).submit(print).result()",
        {"runtime_error"},
    ),
    # signals and other processes
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)", {"runtime_error"}),
    "kill the group": ("import os\nos.killpg(0, 9)", {"runtime_error"}),
    "kill everything": ("import os\nos.kill(-1, 9)", {"runtime_error"}),
    "kill by pidfd": (
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
        {"runtime_error"},
    ),
    "stop the parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)", {"runtime_error"}),
    "kill itself": ("import os, signal\nsignal.raise_signal(9)", {"runtime_error"}),
    "slow the parent": ("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", {"runtime_error"}),
    "pin the parent": ("import os\nos.sched_setaffinity(os.getppid(), {0})", {"runtime_error"}),
    "limit the parent": (
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
        {"runtime_error"},
    ),
    "raise its own limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        {"runtime_error"},
    ),
    "read the parent's memory": ("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')", {"runtime_error"}),
    "read the parent's environment": ("import os\nopen(f'/proc/{os.getppid()}/environ')", {"runtime_error"}),
    # time
    "endless loop": ("while True: pass", {"timeout"}),
    "sleep": ("import time\ntime.sleep(1000)", {"timeout"}),
    "signals ignored": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        {"timeout"},
    ),
    "interrupts caught": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        {"timeout"},
    ),
    "loop at the value": ("def answer():\n    while True: pass", {"timeout"}),
    "loop while printing the error": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        {"timeout"},
    ),
    "huge power": ("x = 9 ** 9 ** 9", {"timeout", "oom"}),
    "regex": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", {"timeout"}),
    "wait for input": ("import sys\nsys.stdin.read()\ninput()", {"runtime_error"}),
    # memory
    "memory balloon": ("x = [0] * 10 ** 10", {"oom"}),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytes(1 << 20))", {"oom"}),
    "memory caught and retried": (
        "x = []\nwhile True:\n    try: x.append(bytes(1 << 20))\n    except MemoryError: pass",
        {"timeout"},
    ),
    "anonymous mapping": ("import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(99)]", {"runtime_error", "oom"}),
    "deep recursion": ("def f(): return f()\nf()", {"runtime_error"}),
    "deeper recursion": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return [f() for _ in '1']\nf()",
        {"runtime_error", "oom", "timeout"},
    ),
    "nested source": ("(" * 100_000 + ")" * 100_000, {"syntax_error", "oom", "runtime_error"}),
    # output and files
    "infinite output": ("while True: print('x' * 1000)", {"output_limit"}),
    "infinite errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output_limit"}),
    "one huge print": ("print('x' * 10 ** 9)", {"oom", "output_limit"}),
    "huge value": ("def answer(): return 'x' * 10 ** 6", {"output_limit"}),
    "huge file": ("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 16))", {"runtime_error"}),
    "many files": ("for i in range(10 ** 6): open(str(i), 'wb').write(bytes(1 << 16))", {"runtime_error"}),
    "many open files": ("x = [open('f', 'a') for _ in range(10 ** 4)]", {"runtime_error"}),
    "read a file": ("open('/etc/passwd').read()", {"runtime_error"}),
    "write a file": ("open('/etc/passwd', 'w')", {"runtime_error"}),
    "leave the directory": ("open('../../etc/passwd')", {"runtime_error"}),
    "through a link": ("import os\nos.symlink('/etc', 'etc')\nopen('etc/passwd')", {"runtime_error"}),
    "shared memory": (
        "from multiprocessing.shared_memory import SharedMemory\nSharedMemory('effml', True, 99)",
        {"runtime_error"},
    ),
    "remove its directory": ("import os, shutil\nshutil.rmtree(os.getcwd())", {"runtime_error"}),
    # network
    "connect": ("import socket\nsocket.create_connection(('127.0.0.1', 80))", {"runtime_error"}),
    "listen": ("import socket\nsocket.socket().listen()", {"runtime_error"}),
    "url": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", {"runtime_error"}),
    "raw socket": ("import _socket\n_socket.socket(2, 1)", {"runtime_error"}),
    # native code
    "ctypes crash": ("import ctypes\nctypes.string_at(0)", {"runtime_error"}),
    "found ctypes": (
        "import gc\n[c for c in object.__subclasses__() if 'CDLL' in c.__name__][0](None).abort()",
        {"runtime_error"},
    ),
    "abort": ("import os\nos.abort()", {"runtime_error"}),
    "broken code object": (
        "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=bytes(1000), co_stacksize=0)\nf()",
        {"runtime_error"},
    ),
    # cheating: to be rewarded without the answer
    "leave early": ("import sys\nsys.exit(0)", {"runtime_error"}),
    "leave at once": ("import os\nos._exit(0)", {"runtime_error"}),
    "leave at the value": ("def answer(): raise SystemExit", {"runtime_error"}),
    "always equal": (
        "class A:\n    __eq__ = __le__ = lambda *_: True\n    __hash__ = lambda _: 0\ndef answer(): return A()",
        {"unparseable"},
    ),
    "an integer always equal": (
        "class A(int):\n    __eq__ = lambda *_: True\n    __hash__ = lambda _: 0\ndef answer(): return A()",
        {"unparseable"},
    ),
    "a string always equal": (
        "class A(str):\n    __eq__ = lambda *_: True\n    __hash__ = lambda _: 0\ndef answer(): return [A()]",
        {"unparseable"},
    ),
    "lie about the type": (
        "import builtins\nclass A(int):\n    __eq__ = lambda *_: True\n    __hash__ = lambda _: 0\n"
        "builtins.type = lambda _: int\ndef answer(): return A(0)",
        {"completed"},  # then it is the number that its text says
    ),
    "not a number": ("def answer(): return float('nan')", {"completed"}),
    "endless answer": ("x = []\nx.append(x)\ndef answer(): return x", {"runtime_error"}),
    "walk to the grader": (
        "import sys\nf = sys._getframe()\nfound = []\n"
        "while f:\n"
        "    for names in (f.f_locals, f.f_globals):\n"
        "        found += [names[name] for name in ('gold', 'target', 'expected', 'GOLD') if name in names]\n"
        "    f = f.f_back\n"
        "def answer(): return found[0] if found else 'nothing'",
        {"completed"},
    ),
    "forge the report": (
        "import os, sys\nf = sys._getframe()\nwhile f and 'job' not in f.f_locals: f = f.f_back\n"
        "nonce = f.f_locals['job']['nonce']\n"
        "for fd in range(3, 32):\n"
        '    try: os.write(fd, (nonce + \' {"status": "correct", "reward": 1}\\n\').encode())\n'
        "    except OSError: pass",
        {"runtime_error"},
    ),
    "fill the report": (
        "import os\nfor fd in range(3, 32):\n    try:\n        while True: os.write(fd, b'x' * 65536)\n"
        "    except OSError: pass",
        {"output_limit"},
    ),
    "nested report": (
        "import os, sys\nf = sys._getframe()\nwhile f and 'job' not in f.f_locals: f = f.f_back\n"
        "nonce = f.f_locals['job']['nonce']\n"
        "for fd in range(3, 32):\n"
        "    try: os.write(fd, (nonce + ' ' + '[' * 30000 + '\\n').encode())\n"
        "    except OSError: pass",
        {"runtime_error"},
    ),
    "close everything": ("import os\nos.closerange(0, 1024)\nwhile True: pass", {"runtime_error"}),
    "replace print and json": (
        "import builtins, json, os\nbuiltins.print = json.dumps = os.write = lambda *_: 18\n"
        "json.encoder.JSONEncoder.encode = lambda *_: '{}'\ndef answer(): return 17",
        {"completed", "runtime_error"},
    ),
    "at exit": (
        "import atexit\n@atexit.register\ndef f():\n    while True: pass\ndef answer(): return 17",
        {"completed"},
    ),
    "finalizer": (
        "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndef answer(): return 17",
        {"completed"},
    ),
    "surrogates": ("print('\\ud800')\ndef answer(): return '\\ud800'", {"runtime_error"}),
    "no text": ("\0", {"syntax_error"}),
    "half a character": ("x = '\ud800'", {"syntax_error"}),
    "integer too long for text": ("def answer(): return 10 ** 5000", {"runtime_error"}),
}


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout=TIMEOUT, workers=2) as sandbox:
        yield sandbox


def processes():
    """Every process below this one: {process: its state}. Needs /proc."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = path.read_text().split(" (", 1)
        except OSError:
            continue  # ended meanwhile
        state, parent = rest.rsplit(") ", 1)[1].split()[:2]
        table[int(number)] = (int(parent), state)
    below, grown = {os.getpid()}, True
    while grown:
        found = {number for number, (parent, _) in table.items() if parent in below} - below
        below, grown = below | found, bool(found)
    return {number: table[number][1] for number in below if number in table and number != os.getpid()}


class TestHostile:
    def test_there_are_at_least_sixty(self):
        assert len(HOSTILE) >= 60

    @pytest.mark.parametrize("name", HOSTILE)
    def test_does_not_score_and_gets_its_status(self, sandbox, name):
        code, statuses = HOSTILE[name]
        started = time.monotonic()
        execution = sandbox.run(Program(code, calls=("answer()",)))
        assert time.monotonic() - started < TIMEOUT + 5  # the machine may be busy; the next test measures alone
        assert execution.status in statuses, execution
        assert GOLD not in execution.values
        assert execution.status == "completed" or execution.detail
        assert "name 'answer'" not in execution.detail  # what was tried went through, and only the answer was missing

    def test_leaves_nothing_behind_and_the_trainer_unharmed(self, sandbox, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        sandbox.run_many([Program("")] * 4)
        before = set(processes())
        quick = [code for code, statuses in HOSTILE.values() if "timeout" not in statuses]
        executions = sandbox.run_many([Program(code, calls=("answer()",)) for code in quick])
        assert not [execution for execution in executions if execution.status == "sandbox_error"]
        after = processes()
        assert set(after) <= before
        assert "Z" not in after.values()
        assert not list(tmp_path.iterdir())


def test_endless_loop_ends_within_half_a_second_of_its_limit(sandbox):
    execution = sandbox.run(Program("while True: pass"))
    assert execution.status == "timeout"
    assert TIMEOUT <= execution.seconds < TIMEOUT + 0.5


class TestFromAnywhere:
    def test_two_hundred_jobs_on_two_workers(self, sandbox):
        executions = sandbox.run_many([Program(f"x = {i}", calls=("x",)) for i in range(200)])
        assert [execution.values for execution in executions] == [(i,) for i in range(200)]

    def test_other_threads(self, sandbox):
        found = {}
        programs = {"good": "def answer(): return 18", "slow": "while True: pass", "bad": "1 / 0"}

        def run(name):
            found[name] = sandbox.run(Program(programs[name], calls=("answer()",))).status

        threads = [threading.Thread(target=run, args=(name,)) for name in programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {"good": "completed", "slow": "timeout", "bad": "runtime_error"}

    def test_event_loop(self, sandbox):
        async def run():
            inside = sandbox.run(Program("x = 18", calls=("x",)))
            outside = await asyncio.to_thread(sandbox.run, Program("while True: pass"))
            return inside.values, outside.status

        assert asyncio.run(run()) == ((18,), "timeout")

    def test_forked_process(self, sandbox):
        sandbox.run(Program(""))
        child = os.fork()
        if child == 0:
            good = sandbox.run(Program("x = 18", calls=("x",))).values == (18,)
            sandbox.close()
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert sandbox.run(Program("x = 18", calls=("x",))).values == (18,)


class TestLifetime:
    def test_collected_sandboxes_end_their_servers(self):
        sandbox = PythonSandbox(workers=1)
        sandbox.run(Program(""))
        (server,) = processes_of(sandbox)
        del sandbox
        gc.collect()
        assert not Path(f"/proc/{server}").exists()

    def test_closed(self):
        sandbox = PythonSandbox(workers=1)
        sandbox.close()
        with pytest.raises(ConfigError, match=r"close\(\)"):
            sandbox.run(Program(""))

    def test_no_programs(self, sandbox):
        assert sandbox.run_many([]) == []

    def test_sources_are_no_programs(self, sandbox):
        for wrong in ("1 + 1", ["1 + 1"], [None]):
            with pytest.raises(ConfigError, match=r"programs: got .*, expected a list of `Program`"):
                sandbox.run_many(wrong)

    @pytest.mark.parametrize(
        "bad", [{"timeout": 0}, {"timeout": float("nan")}, {"memory_mb": 0}, {"workers": 0}, {"output_kb": 1.5}]
    )
    def test_bad_arguments(self, bad):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            PythonSandbox(**bad)


def processes_of(sandbox):
    return [worker._server.pid for worker in sandbox._pool._idle]


WITHOUT_KERNEL = "from effml_rl.sandbox import kernel_guard; kernel_guard.restrict = lambda *_: ()\n"
# What only the kernel can refuse; it then hits the sandbox's server, or threads of the program's own process.
NEEDS_KERNEL = {"threads", "thread pool", "kill by pidfd", "slow the parent", "pin the parent"}


@pytest.mark.slow
def test_the_audit_hook_and_the_limits_suffice_where_the_kernel_offers_nothing(monkeypatch):
    start = worker._START.replace("from effml_rl.sandbox.server", WITHOUT_KERNEL + "from effml_rl.sandbox.server")
    monkeypatch.setattr(worker, "_START", start)
    with PythonSandbox(timeout=TIMEOUT, workers=1) as sandbox:
        assert sandbox.run(Program("")).isolation == "rlimit"
        for name in set(HOSTILE) - NEEDS_KERNEL:
            execution = sandbox.run(Program(HOSTILE[name][0], calls=("answer()",)))
            assert execution.status in HOSTILE[name][1], (name, execution)
            assert GOLD not in execution.values


AS_SOMEBODY_ELSE = """
import json, os, sys, types
for name, path in json.loads(sys.argv[1]):
    package = types.ModuleType(name)
    package.__path__ = [path]
    sys.modules[name] = package
from effml_rl.sandbox import program, python_sandbox
assert os.getuid() != 0
programs = [program.Program(code, calls=("answer()",)) for code in json.load(sys.stdin)]
with python_sandbox.PythonSandbox(timeout=0.4, workers=1) as sandbox:
    print(json.dumps([execution.status for execution in sandbox.run_many(programs)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_same_verdicts_as_an_ordinary_user():
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    enough = "import sys; sys.exit(sys.version_info < (3, 11))"
    if python is None or subprocess.run([python, "-c", enough]).returncode != 0:
        pytest.skip("no interpreter of at least 3.11 that an ordinary user can read")
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to others
        os.chmod(directory, 0o755)
        packages = [
            ("effml_rl.sandbox", Path(worker.__file__).parent),
            ("effml_shared", Path(errors.__file__).parent),
        ]
        for name, source in packages:
            shutil.copytree(source, Path(directory, name), ignore=shutil.ignore_patterns("__pycache__"))
        places = [("effml_rl", directory), *((name, f"{directory}/{name}") for name, _ in packages)]
        Path(directory, "sandbox").symlink_to("effml_rl.sandbox")
        names = sorted(set(HOSTILE) - {"surrogates", "half a character"})
        done = subprocess.run(
            [python, "-c", AS_SOMEBODY_ELSE, json.dumps(places)],
            input=json.dumps([HOSTILE[name][0] for name in names]),
            capture_output=True,
            text=True,
            user=65534,
            cwd="/",
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    for name, status in zip(names, json.loads(done.stdout), strict=True):
        assert status in HOSTILE[name][1], name


@pytest.mark.slow
def test_five_hundred_good_and_bad_programs_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bad = [code for code, _ in HOSTILE.values()]
    programs = [f"def answer(): return {GOLD}" if i % 2 == 0 else bad[i // 2 % len(bad)] for i in range(500)]
    before, files = set(processes()), len(os.listdir("/proc/self/fd"))
    with PythonSandbox(timeout=TIMEOUT, workers=2) as sandbox:
        executions = sandbox.run_many([Program(code, calls=("answer()",)) for code in programs])
    assert [execution.values == (GOLD,) for execution in executions] == [i % 2 == 0 for i in range(500)]
    assert "sandbox_error" not in {execution.status for execution in executions}
    gc.collect()
    assert set(processes()) <= before
    assert len(os.listdir("/proc/self/fd")) <= files
    assert not list(tmp_path.iterdir())
