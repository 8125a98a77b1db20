"""Jobs of a cluster: by a cluster that is played here, and (slow) by Slurm itself, started for the test."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from effml_shared.cli import main
from effml_shared.errors import ConfigError, EffmlError
from effml_shared.runs import Run
from effml_shared.sweeps.directory import Sweep
from effml_shared.sweeps.jobs import Job
from effml_shared.sweeps.slurm_jobs import SlurmJobs, queued_jobs, slurm_parameters

pytest.importorskip("submitit", reason="effml-shared[sweep] is not installed")


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Put scripts in the place of Slurm's commands; `say(queue)` sets what squeue answers, None: it fails."""
    site = tmp_path / "bin"
    site.mkdir()
    answer = tmp_path / "queue"
    scripts = {
        "srun": "",
        "squeue": f'cat {answer} || {{ echo "squeue: error: no controller" >&2; exit 1; }}',
        "sbatch": f'cp "$1" {tmp_path}/submitted; cat {tmp_path}/accepted',
    }
    for name, body in scripts.items():
        (site / name).write_text(f"#!/bin/sh\n{body}\n")
        (site / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(site), prepend=os.pathsep)
    (tmp_path / "accepted").write_text("Submitted batch job 70\n")

    def say(queue):
        answer.unlink(missing_ok=True)
        if queue is not None:
            answer.write_text(queue)

    say("")
    return say


@pytest.fixture
def jobs(tmp_path, played):
    def make(ids=None, at_once=None, **parameters):
        job = lambda name: Job(str(tmp_path / name), ["run"], str(tmp_path / f"{name}.lock"))  # noqa: E731
        return SlurmJobs(tmp_path / "jobs", job, ids or {}, at_once, parameters, ask_every=0.0)

    return make


def test_the_queue_is_what_is_not_over(played):
    played("7_0 RUNNING\n7_1 PENDING\n7_2 COMPLETED\n8 COMPLETING\n9 TIMEOUT\n")
    assert queued_jobs() == {"7_0": "RUNNING", "7_1": "PENDING", "8": "COMPLETING"}


def test_a_cluster_that_does_not_answer_at_first_is_an_error_and_later_is_waited_for(played, jobs):
    played("7_0 RUNNING\n")
    found = jobs({"a": "7_0", "b": "7_1"})
    assert found.alive() == {"a": "running"}
    played(None)
    assert found.alive() == {"a": "running"}
    with pytest.raises(EffmlError, match=r"Slurm does not answer: squeue: error: no controller"):
        jobs({"a": "7_0"})
    played("7_0 COMPLETED\n")
    assert found.alive() == {}


def test_points_are_submitted_as_one_array(tmp_path, played, jobs):
    started = jobs({"z": "1_0"}, at_once=2, slurm_partition="gpu", gpus_per_node=1)
    assert started.start(["a", "b", "c"]) == {"z": "1_0", "a": "70_0", "b": "70_1", "c": "70_2"}
    script = (tmp_path / "submitted").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--gpus-per-node=1"):
        assert f"#SBATCH {line}\n" in script
    played("70_0 RUNNING\n70_1 PENDING\n70_2 PENDING\n71_0 RUNNING\n")
    assert started.alive() == {"a": "running", "b": "queued", "c": "queued"}


def test_what_slurm_refuses_is_one_line(tmp_path, played, jobs):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: x' >&2; exit 1\n")
    with pytest.raises(EffmlError, match=r"Slurm did not take the jobs: sbatch: error: invalid partition: x"):
        jobs().start(["a", "b"])


def test_parameters_are_read_as_submitit_knows_them(tmp_path, played):
    words = ["partition=gpu", "gpus_per_node=2", "mem_gb=8", "slurm_constraint=a100", "timeout_min=30"]
    assert slurm_parameters(words, tmp_path) == {
        "name": "effml",
        "timeout_min": 30,
        "slurm_partition": "gpu",
        "gpus_per_node": 2,
        "mem_gb": 8,
        "slurm_constraint": "a100",
    }
    assert slurm_parameters(["time=1-00:00:00"], tmp_path) == {"name": "effml", "slurm_time": "1-00:00:00"}
    assert list(tmp_path.glob("*.sh")) == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("partition", r"got 'partition', expected KEY=VALUE"),
        ("partition=", r"expected KEY=VALUE"),
        ("partiton=gpu", r"Unknown argument 'partiton' .* partition"),
        ("nodes=2", r"got nodes, expected another word: a point is one task"),
        ("array_parallelism=2", r"--at-once says how many"),
        ("timeout_min=soon", r"timeout_min"),
        ("comment=[1", r"--slurm comment: got '\[1', expected a YAML value"),
    ],
)
def test_parameters_that_are_wrong_are_one_line(tmp_path, played, word, message):
    with pytest.raises(ConfigError, match=message) as error:
        slurm_parameters([word], tmp_path)
    assert "\n" not in str(error.value)


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"srun"):
        slurm_parameters([], tmp_path)
    with pytest.raises(EffmlError, match=r"Slurm does not answer"):
        queued_jobs()


CONFIGURATION = """
ClusterName=effml
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Start a cluster of one node of two cores on this machine, with a state directory and ports of its own."""
    programs = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in
                ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")}  # fmt: skip
    missing = [name for name, found in programs.items() if found is None]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not installed (Debian: slurm-wlm and munge)")
    if os.getuid() != 0:
        pytest.skip("slurmd starts jobs only as root")
    root, host = tmp_path / "slurm", socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (root / name).mkdir(parents=True)
    (root / "key").write_bytes(os.urandom(1024))
    (root / "key").chmod(0o400)
    conf = root / "slurm.conf"
    conf.write_text(CONFIGURATION.format(host=host, root=root, ports=free_ports(2)))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    munge = ["--foreground", "--force", f"--key-file={root}/key", f"--socket={root}/munge.socket"]
    munge += [f"--{name}-file={root}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = []
    try:
        for name, words in (("munged", munge), ("slurmctld", ["-D", "-c"]), ("slurmd", ["-D", "-N", host])):
            with (root / f"{name}.out").open("w") as out:
                daemons.append(subprocess.Popen([programs[name], *words], stdout=out, stderr=out))
            time.sleep(0.5)
        deadline = time.monotonic() + 60
        idle = ["sinfo", "--noheader", "--format=%T"]
        while subprocess.run(idle, capture_output=True, text=True).stdout.strip() != "idle":
            if time.monotonic() > deadline:
                pytest.fail("\n".join(path.read_text() for path in root.glob("*.log")))
            time.sleep(0.5)
        yield conf
        subprocess.run(["scancel", "--user=root"], check=True)
        time.sleep(1)
    finally:
        for daemon in daemons[::-1]:
            daemon.terminate()
            daemon.wait(timeout=30)


def until(condition):
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def steps(sweep, name):
    path = sweep / name / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_sweep_on_slurm(slurm, installed, tmp_path, capsys):
    """An array; left alone by Ctrl-C and found again; one job saved and requeued, one cancelled and submitted again."""
    out = tmp_path / "s"
    fixed = ["seeds=[0]", "steps=150", "pause=0.2"]
    words = ["sweep", "toy.installed", *fixed, "--executor", "slurm", "--slurm", "timeout_min=30", "--out", str(out)]
    words += ["--grid", "lr=0.1,0.2,0.3"]
    sweep = subprocess.Popen([sys.executable, "-m", "effml_shared.cli", *words], stderr=subprocess.PIPE, text=True)
    until(lambda: steps(out, "lr=0.1") and steps(out, "lr=0.2"))
    sweep.send_signal(signal.SIGINT)
    said = sweep.communicate()[1]
    assert sweep.returncode == 130
    assert said.startswith(f"effml: the jobs go on without this command; look again: effml resume {out}")

    ids = Sweep(out).jobs["ids"]
    array = {name: f"{said.split()[-1]}_{place}" for place, name in enumerate(["lr=0.1", "lr=0.2", "lr=0.3"])}
    assert ids == array
    assert queued_jobs().keys() == set(array.values())
    subprocess.run(["scancel", "--signal=USR2", ids["lr=0.1"]], check=True)  # Slurm's word before a time limit
    subprocess.run(["scancel", ids["lr=0.2"]], check=True)
    until(lambda: Run(out / "lr=0.1").summary["status"] == Run(out / "lr=0.2").summary["status"] == "interrupted")
    until(lambda: ids["lr=0.2"] not in queued_jobs())
    assert queued_jobs()[ids["lr=0.1"]] in ("PENDING", "COMPLETING", "REQUEUED")
    capsys.readouterr()

    assert main(["resume", str(out)]) == 0  # Slurm itself waits two minutes with what it requeues
    assert "3 points, 0 finished before" in capsys.readouterr().out
    again = Sweep(out).jobs["ids"]
    assert [again[name] == ids[name] for name in ids] == [True, False, True]
    for name in ids:
        assert steps(out, name) == list(range(1, 151))
        assert Run(out / name).summary["status"] == "finished"
    logs = "".join(path.read_text() for path in (out / "jobs").glob("*.out"))
    assert logs.count("run directory") == 5  # begun three times, resumed twice
