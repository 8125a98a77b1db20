"""One server's life, seen from the trainer."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from effml_rl.sandbox import Program, PythonSandbox
from effml_rl.sandbox.worker import ServerLost, Worker


def processes_of(sandbox):
    return [worker._server.pid for worker in sandbox._pool._idle]


def test_a_lost_server_is_our_fault_and_replaced():
    with PythonSandbox(workers=1) as sandbox:
        sandbox.run(Program(""))
        (server,) = processes_of(sandbox)
        os.kill(server, signal.SIGKILL)
        first = sandbox.run(Program("x = 1", calls=("x",)))
        second = sandbox.run(Program("x = 1", calls=("x",)))
    assert first.status in ("sandbox_error", "completed")
    assert second.values == (1,)


def test_a_module_that_is_missing_is_named():
    with PythonSandbox(workers=1, setup="import no_such_module") as sandbox:
        execution = sandbox.run(Program(""))
    assert execution.status == "sandbox_error"
    assert "no_such_module" in execution.detail


def test_paths(tmp_path):
    (tmp_path / "mine.py").write_text("value = 18\n")
    with PythonSandbox(workers=1, paths=[str(tmp_path)]) as sandbox:
        assert sandbox.run(Program("import mine", calls=("mine.value",))).values == (18,)


def test_set_up_runs_once_and_leaves_modules_only():
    setup = "import types, sys\nsys.modules['mine'] = module = types.ModuleType('mine')\nmodule.value = 18"
    with PythonSandbox(workers=1, setup=setup) as sandbox:
        assert sandbox.run(Program("import mine\nmine.value += 0", calls=("mine.value",))).values == (18,)
        assert sandbox.run(Program("module")).status == "runtime_error"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_nothing_survives_a_trainer_that_is_killed(tmp_path, number):
    mark = f"effml_{os.getpid()}_{number}"
    script = f"""
        from effml_rl.sandbox import Program, PythonSandbox
        sandbox = PythonSandbox(timeout=60, workers=1, paths=[{str(tmp_path / mark)!r}])
        sandbox.run(Program(""))
        print("ready", flush=True)
        sandbox.run(Program("while True: pass"))
    """
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed trainer cannot remove its directory
    command = [sys.executable, "-c", textwrap.dedent(script)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    with trainer:
        assert trainer.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        trainer.send_signal(number)
    for _ in range(100):
        alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _mentions(path, mark)]
        if not alive:
            return
        time.sleep(0.05)
    pytest.fail(f"still there: {alive}")


def _mentions(path, mark):
    try:
        return mark.encode() in path.read_bytes()
    except OSError:
        return False


LIMITS = {"timeout": 1.0, "memory_bytes": 1 << 28, "output_bytes": 1 << 16}


def test_a_program_that_kills_nobody_but_ends_by_a_signal_says_which():
    worker = Worker([], "")
    try:
        execution = worker.run(Program("import signal\nsignal.raise_signal(signal.SIGTERM)"), **LIMITS)
    finally:
        worker.close()
    assert (execution.status, execution.detail) == ("runtime_error", "ended without an answer (signal SIGTERM)")


def test_a_server_that_ends_in_the_middle_is_reported():
    worker = Worker([], "")
    os.kill(worker._server.pid, signal.SIGKILL)
    worker._server.wait()
    assert not worker.alive()
    with pytest.raises(ServerLost, match=r"ended"):
        worker.run(Program(""), **LIMITS)
    worker.close()


@pytest.mark.parametrize("setup", ["import no_such_module", "1 / 0", "x ="])
def test_a_set_up_that_fails(setup):
    with pytest.raises(ServerLost, match=r"set-up failed: \w*Error"):
        Worker([], setup)


@pytest.mark.parametrize(
    "report",
    [
        "[]",
        "{}",
        "1",
        '{"status": []}',
        '{"status": "correct"}',
        '{"status": "completed", "values": {"dict": [[[], 1]]}}',
        '{"status": "oom", "detail": ' + "[" * 500 + "]" * 500 + "}",
        '{"status": "completed", "values": ' + "9" * 5000 + "}",
        "{" * 9000,
        '{"status": "timeout"}',
        '{"status": "sandbox_error"}',
        '{"status": "completed"}',
    ],
)
def test_a_forged_report_is_a_failed_program_and_never_an_error_here(report):
    code = f"""
        import os, sys
        frame = sys._getframe()
        while "job" not in frame.f_locals:
            frame = frame.f_back
        line = frame.f_locals["job"]["nonce"] + " " + {report!r} + "\\n"
        for descriptor in range(3, 32):
            try:
                os.write(descriptor, line.encode())
            except OSError:
                pass
    """
    with PythonSandbox(timeout=5.0, workers=1) as sandbox:
        execution = sandbox.run(Program(textwrap.dedent(code), calls=("1",)))
    assert execution.status in ("runtime_error", "oom")
    assert execution.values == ()
