"""Each guard of the kernel by itself, in an interpreter that has nothing else: no limits, no audit hook."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
from effml_rl.sandbox import kernel_guard

# One interpreter forks a child per operation, restricts the child, and says what each did: `fine`, the name of its
# error, or the signal that ended it.
RUN = """
import json, os, signal, socket, sys, threading
sys.path.insert(0, {source!r})
from kernel_guard import restrict
parent = os.getpid()
outcomes = {{}}
for number, body in enumerate(json.load(sys.stdin)):
    writable = os.path.join({directory!r}, str(number))
    os.mkdir(writable)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "fine"
        try:
            guards = restrict([p for p in sys.path if os.path.isdir(p)], writable)
            os.chdir(writable)
            exec(body)
        except BaseException as error:
            outcome = type(error).__name__
        os.write(writing, json.dumps([guards, outcome]).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    outcomes[body] = json.loads(said) if said else [[], f"signal {{os.WTERMSIG(status)}}"]
print(json.dumps(outcomes))
"""

SECCOMP = [
    "os.fork()",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "os.execv('/bin/true', ['true'])",
    "threading.Thread(target=print).start()",
    "os.kill(parent, 0)",
    "os.kill(os.getpid(), 0)",
    "os.killpg(0, 0)",
    "os.pidfd_open(parent)",
    "socket.socket()",
    "socket.socketpair()",
    "os.setsid()",
    "os.sched_setaffinity(parent, {0})",
    "os.setpriority(os.PRIO_PROCESS, parent, 19)",
    "import resource; resource.prlimit(parent, resource.RLIMIT_CORE)",
    "os.memfd_create('x')",
    "open('a', 'w').close(); os.chmod('a', 0o777)",
    "open('a', 'w').close(); os.symlink('a', 'b')",
    "open('a', 'w').close(); os.link('a', 'b')",
    "open('a', 'w').close(); os.utime('a')",
    "os.mkfifo('pipe')",
]
LANDLOCK = [
    "open('/etc/passwd')",
    "open(f'/proc/{parent}/mem', 'rb')",
    "open(f'/proc/{parent}/environ', 'rb')",
    "os.listdir('/')",
    "open('/dev/shm/effml-test', 'w')",
    "os.mkdir('/dev/shm/effml-test')",
    "open(os.__file__, 'r+')",
    "os.remove(os.__file__)",
    "os.rename('/etc/hostname', 'mine')",
    "open('../outside', 'w')",
]
HONEST = [
    "open('a', 'w').write('x'); assert open('a').read() == 'x'; os.remove('a')",
    "os.mkdir('d'); open('d/a', 'w').close(); os.rename('d/a', 'd/b'); os.remove('d/b'); os.rmdir('d')",
    "import decimal, hashlib, json, random; random.random(); hashlib.sha256(b'x').hexdigest()",
    "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "os.pipe(); os.getppid(); import time; time.sleep(0)",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    source = RUN.format(source=str(Path(kernel_guard.__file__).parent), directory=str(tmp_path_factory.mktemp("work")))
    done = subprocess.run(
        [sys.executable, "-S", "-B", "-c", source],
        input=json.dumps(["pass", *SECCOMP, *LANDLOCK, *HONEST, "os.abort()"]),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def needs(outcomes, guard):
    if guard not in outcomes["pass"][0]:
        pytest.skip(f"this kernel does not offer {guard}")


@pytest.mark.parametrize("body", SECCOMP)
def test_seccomp_refuses(outcomes, body):
    needs(outcomes, "seccomp")
    assert outcomes[body][1] in ("PermissionError", "RuntimeError")  # "can't start new thread"


@pytest.mark.parametrize("body", LANDLOCK)
def test_landlock_refuses(outcomes, body):
    needs(outcomes, "landlock")
    assert outcomes[body][1] == "PermissionError"


@pytest.mark.parametrize("body", HONEST)
def test_what_honest_programs_need_stays(outcomes, body):
    assert outcomes[body][1] == "fine"


def test_abort_still_ends_a_process_by_its_signal(outcomes):
    assert outcomes["os.abort()"][1] == "signal 6"


def test_every_call_has_one_number_per_architecture():
    for column in (0, 1):
        tables = (kernel_guard._REFUSED, kernel_guard._OWN_PROCESS_ONLY)
        numbers = [numbers[column] for table in tables for numbers in table.values() if numbers[column] >= 0]
        assert len(set(numbers)) == len(numbers)
        program = kernel_guard._filter(column, 0xC000003E, own=1)
        assert len(program) % 8 == 0
        assert len(program) // 8 < 4096  # BPF_MAXINSNS


def test_without_linux_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_guard.sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert kernel_guard.restrict([], str(tmp_path)) == ()
