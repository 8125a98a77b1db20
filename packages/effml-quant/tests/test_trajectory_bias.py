import math

import pytest
import torch
from effml_quant.instability.proxy import ProxyConfig, StudentTeacher, proxy_loss
from effml_quant.instability.trajectory_bias import GradientRecorder, TrajectoryMeter
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared.errors import CheckpointError
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep


def start(scheme):
    proxy = StudentTeacher(ProxyConfig(32, 1, seed=0))
    apply_scheme(proxy.student, scheme)
    optimizer = torch.optim.Adam(proxy.student.parameters(), 1e-2)
    return proxy, optimizer, GradientStep(proxy.student, optimizer, proxy_loss)


def go(proxy, step, steps, data=None):
    data = data or proxy.data()
    for _ in range(steps):
        step(data.next(16), Plan(16))
    return data


def test_two_runs_are_compared_step_by_step(tmp_path):
    proxy, optimizer, step = start(None)
    recorder = GradientRecorder(proxy.student, optimizer, tmp_path, every=2)
    go(proxy, step, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"gradient-{n:08d}.safetensors" for n in (0, 2, 4)]
    recorder.close()
    go(proxy, step, 1)
    assert recorder.updates == 5

    proxy, optimizer, step = start(None)
    same = TrajectoryMeter(proxy.student, optimizer, tmp_path, every=2)
    go(proxy, step, 5)
    assert {step: bias.rho for step, bias in same.readings.items()} == {0: 0.0, 2: 0.0, 4: 0.0}

    proxy, optimizer, step = start(PrecisionScheme.mx("mxfp4"))
    other = TrajectoryMeter(proxy.student, optimizer, tmp_path, every=2)
    go(proxy, step, 3)
    assert all(0.05 < bias.rho < 3 for bias in other.readings.values())
    again = TrajectoryMeter(proxy.student, torch.optim.SGD(proxy.student.parameters(), 1.0), tmp_path, every=2)
    again.load_state_dict(other.state_dict())
    assert (again.updates, again.readings) == (3, other.readings)
    assert math.isfinite(other.readings[2].cos)


def test_a_missing_gradient_is_named(tmp_path):
    proxy, optimizer, step = start(None)
    TrajectoryMeter(proxy.student, optimizer, tmp_path)
    with pytest.raises(CheckpointError, match=r"gradient-00000000.safetensors: got no gradient there"):
        go(proxy, step, 1)


def test_a_gradient_that_cannot_be_written_is_named(tmp_path):
    proxy, optimizer, step = start(None)
    (tmp_path / "file").write_text("")
    GradientRecorder(proxy.student, optimizer, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"^cannot write .*/file/gradient-00000000\.safetensors: "):
        go(proxy, step, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
