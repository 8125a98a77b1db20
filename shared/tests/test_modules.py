"""The module kit passes what is right and catches what is wrong."""

import pytest
import torch
from effml_shared.testing.modules import ModuleKit
from torch import nn


class OfLinear(ModuleKit):
    __test__ = False

    def make(self):
        torch.manual_seed(0)
        return nn.Linear(4, 3)

    def inputs(self):
        return {"input": torch.ones(2, 4)}


class Noisy(nn.Linear):
    def forward(self, input):
        return super().forward(input) + torch.rand(())


class Hidden(nn.Linear):
    """Keeps a weight that no state_dict has."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.secret = [torch.randn(())]

    def forward(self, input):
        return super().forward(input) * self.secret[0]


class OfNoisy(OfLinear):
    def make(self):
        torch.manual_seed(0)
        return Noisy(4, 3)


class OfHidden(OfLinear):
    def make(self):
        return Hidden(4, 3)


def test_a_linear_layer_passes():
    kit = OfLinear()
    kit.test_is_deterministic()
    kit.test_state_dict_survives_safetensors()
    kit.test_is_built_on_meta()


@pytest.mark.parametrize(
    ("kit", "method"), [(OfNoisy, "test_is_deterministic"), (OfHidden, "test_state_dict_survives_safetensors")]
)
def test_it_catches(kit, method):
    with pytest.raises(AssertionError):
        getattr(kit(), method)()
