from __future__ import annotations

import pytest
import torch
from effml_quant.selection import is_inner_weight, select_modules, select_weights
from effml_shared.errors import ConfigError
from torch import nn


class Tiny(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.output = nn.Linear(4, 10, bias=False)
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tied:
            self.output.weight = self.embed.weight


def test_inner_linear_layers_and_nothing_else():
    assert list(select_weights(Tiny())) == ["up.weight", "down.weight", "output.weight"]


def test_a_head_tied_to_the_embedding_is_left_out():
    assert list(select_weights(Tiny(tied=True))) == ["up.weight", "down.weight"]


def test_a_filter_replaces_the_rule():
    chosen = select_weights(Tiny(tied=True), lambda name, module: isinstance(module, nn.Embedding) or name == "output")
    assert list(chosen) == ["embed.weight"]  # the tied weight once
    model = Tiny()
    assert select_modules(model, lambda name, _: name == "norm") == {"norm": model.norm}


def test_convolutions_and_a_bare_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 1))
    assert list(select_weights(model)) == ["0.weight", "2.weight"]
    layer = nn.Linear(3, 3)
    assert select_weights(layer) == {"weight": layer.weight}


def test_a_weight_shared_by_two_layers_comes_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(select_weights(model)) == ["0.weight"]


@pytest.mark.parametrize("name", ["lm_head", "model.lm_head", "score", "a.b.classifier"])
def test_output_heads_by_name(name):
    assert not is_inner_weight(name, nn.Linear(2, 2))
    assert is_inner_weight(name + ".proj", nn.Linear(2, 2))


def test_errors():
    with pytest.raises(ConfigError, match=r"model: got one without weights to quantise"):
        select_weights(nn.LayerNorm(3))
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ConfigError, match=r"proj.weight: got torch.int64, expected a floating dtype"):
        select_weights(nn.ModuleDict({"proj": layer}))
