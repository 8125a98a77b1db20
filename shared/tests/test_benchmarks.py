"""What benchmarks share: settings without paths, JSON and a table, turns, memory of a process of its own."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effml_shared import benchmarks
from effml_shared.benchmarks import high_water, in_fresh_process, in_turn, publish, seconds, settings


def options(**given):
    return argparse.Namespace(**given)


def test_settings_are_json_that_names_machine_versions_and_options(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    found = json.loads(json.dumps(settings(options(rounds=3, table=True), "numpy", "no-such-peer")))
    assert found["torch"] == found["versions"]["torch"] != ""
    assert found["threads"] == torch.get_num_threads()
    assert {"python", "torch", "effml-shared", "numpy"} <= set(found["versions"])
    assert "no-such-peer" not in found["versions"]
    assert found["wait_policy"] == "PASSIVE"
    assert found["rounds"] == 3
    assert found["cpu"]
    assert "table" not in found


def test_settings_leave_out_what_is_not_set(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    found = settings(options(only=None))
    assert "only" not in found
    assert "wait_policy" not in found


def test_settings_know_no_folder():
    found = settings(
        options(official=Path("/home/me/soap.py"), inputs=[Path("/home/me/a")], device=torch.device("cpu"))
    )
    assert (found["official"], found["inputs"], found["device"]) == ("soap.py", ["a"], "cpu")
    assert "/home/me" not in json.dumps(found)


@pytest.mark.parametrize(
    ("info", "model"),
    [
        ("model name\t: A\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: A\n", "family 26, model 2"),
        ("CPU implementer\t: 0x41\n", None),
    ],
)
def test_a_processor_is_named_by_its_numbers(info, model, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: info)
    assert benchmarks._cpu_model() == model


def test_rows_are_printed_as_they_come_and_then_as_a_table(capsys):
    def rows():
        yield {"case": "a", "seconds": 0.123456, "equal": None}
        assert len(capsys.readouterr().out.splitlines()) == 2  # settings and the row before
        yield {"case": "longer", "seconds": 123456.4}

    assert len(publish({"torch": "2"}, rows(), ("case", "seconds", "equal"), table=True)) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"case": "longer", "seconds": 123456.4}
    assert printed.err.splitlines() == ["case    seconds  equal", "a       0.1235", "longer  123,456"]


def test_no_table_is_printed_unasked(capsys):
    assert publish({}, [], ("case",), table=False) == []
    assert capsys.readouterr().err == ""


def test_contenders_take_turns_and_the_warm_up_is_not_timed():
    calls = []
    times = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert [len(of) for of in times.values()] == [2, 2]
    assert all(spent >= 0 for of in times.values() for spent in of)


def test_seconds_are_those_of_the_work():
    assert seconds(lambda: None) < 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="told by Linux alone")
def test_memory_of_a_fresh_process_is_its_own(tmp_path):
    # In a script, as benchmarks are: its functions must be found again in the fresh process.
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from effml_shared.benchmarks import high_water, in_fresh_process\n"
        "def added(mib):\n"
        "    before = high_water()\n"
        "    torch.ones(mib * 2**18)\n"
        "    return high_water() - before, torch.get_num_threads()\n"
        "if __name__ == '__main__':\n"
        "    large = torch.ones(2**27)\n"
        "    torch.set_num_threads(1)\n"
        "    print(*in_fresh_process(added, 64))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    added, threads = done.stdout.split()
    assert 60 < float(added) < 80
    assert threads == "1"


def test_an_error_in_a_fresh_process_comes_back():
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        in_fresh_process(math.sqrt, -1.0)


def test_memory_elsewhere_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    with pytest.raises(benchmarks.ConfigError, match="expected Linux"):
        high_water()
