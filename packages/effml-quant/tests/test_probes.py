import pytest
import torch
from effml_quant.instability.probes import Probe, undisturbed
from effml_shared.errors import ConfigError
from torch import nn


class Counted(Probe):
    def measure(self, *batches):
        return {"seen": float(sum(batches))}


def test_called_by_hand_it_measures_every_nth_time():
    probe = Counted(every=3)
    assert [probe(i) for i in range(7)] == [{"seen": 0.0}, {}, {}, {"seen": 3.0}, {}, {}, {"seen": 6.0}]
    assert Counted(batches=[1, 2])() == {"seen": 3.0}


def test_wrong_fields_are_named():
    with pytest.raises(ConfigError, match="every: got 0"):
        Counted(0)
    with pytest.raises(ConfigError, match="batches: got none"):
        Counted(batches=[])
    with pytest.raises(ConfigError, match="batch: got None"):
        Counted()()


def test_what_is_measured_disturbs_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.grad = torch.ones(2, 2)
    state = torch.get_rng_state()

    def fail():
        with undisturbed(model):
            model(torch.randn(4, 2)).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(model[0].weight.grad, torch.ones(2, 2))
    assert model[0].bias.grad is None
    assert torch.equal(model[1].running_mean, torch.zeros(2))
    assert torch.equal(torch.get_rng_state(), state)
