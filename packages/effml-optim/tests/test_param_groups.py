"""Routing: modules, names and shapes, tied and frozen parameters, plain and Hugging Face models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_optim import SOAP, Muon, Shampoo, parameter_roles, split_params
from effml_shared.errors import ConfigError
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.c_fc = nn.Linear(width, 4 * width)
        self.experts = nn.Parameter(torch.zeros(3, width, width))


class Decoder(nn.Module):
    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 8)
        self.pos_embed = nn.Parameter(torch.zeros(16, 8))
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.norm = nn.RMSNorm((2, 8))
        self.lm_head = nn.Linear(8, 50, bias=False)
        if tie:
            self.lm_head.weight = self.wte.weight


def names(groups: list[dict[str, Any]], role: str) -> list[str]:
    return [name for group in groups if group["role"] == role for name, _ in group["params"]]


def test_a_decoder_is_split_by_role() -> None:
    groups = split_params(Decoder())
    assert names(groups, "embed") == ["pos_embed", "wte.weight"]
    assert names(groups, "head") == ["lm_head.weight"]
    assert [n for n in names(groups, "matrix") if n.startswith("blocks.0")] == [
        "blocks.0.experts",
        "blocks.0.attention.in_proj_weight",
        "blocks.0.attention.out_proj.weight",
        "blocks.0.c_fc.weight",
    ]
    assert "norm.weight" in names(groups, "vector")  # a norm over two axes is no matrix
    assert {group["role"]: group["use_adamw"] for group in groups} == {
        "embed": True,
        "head": True,
        "vector": True,
        "matrix": False,
    }


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"module": m}), torch.compile])
def test_every_trainable_parameter_appears_once(wrap: Any) -> None:
    model = wrap(Decoder(tie=True))
    model.requires_grad_(True)
    frozen = next(p for n, p in model.named_parameters() if n.endswith("blocks.0.c_fc.weight"))
    frozen.requires_grad_(False)
    found = [id(param) for group in split_params(model) for _, param in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p is not frozen)
    assert sum(len(names(split_params(model), role)) for role in ("head",)) == 0  # tied: an embedding


def test_options_reach_their_group() -> None:
    groups = split_params(Decoder(), matrix={"lr": 0.1}, vector={"lr": 0.2}, head={"use_adamw": False})
    by_role = {group["role"]: group for group in groups}
    assert by_role["matrix"]["lr"] == 0.1
    assert (by_role["vector"]["lr"], by_role["vector"]["weight_decay"]) == (0.2, 0.0)
    assert by_role["head"]["use_adamw"] is False
    assert "lr" not in by_role["embed"]


def test_patterns_override_and_must_match() -> None:
    model = Decoder()
    roles = parameter_roles(model, {"*.experts": "vector", "blocks.*": "head"})
    assert roles["blocks.0.experts"] == "vector"
    assert roles["blocks.1.c_fc.weight"] == "head"
    with pytest.raises(ConfigError, match=r"'\*\.router', which matches no parameter"):
        parameter_roles(model, {"*.router": "vector"})
    with pytest.raises(ConfigError, match="got 'adam', expected one of embed"):
        parameter_roles(model, {"*": "adam"})


@pytest.mark.parametrize(
    ("model", "heads", "matrices"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), ["2.weight"], ["0.weight"]),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)), [], ["0.weight", "2.weight"]),
        (nn.Linear(4, 8), [], ["weight"]),
        (
            nn.ModuleDict({"trunk": nn.Linear(4, 8), "score": nn.Linear(8, 2), "aux": nn.Bilinear(2, 2, 2)}),
            ["score.weight"],
            ["trunk.weight", "aux.weight"],
        ),
    ],
)
def test_heads_of_plain_networks(model: nn.Module, heads: list[str], matrices: list[str]) -> None:
    groups = split_params(model)
    assert names(groups, "head") == heads
    assert names(groups, "matrix") == matrices


def test_thin_tensors_and_biases_are_vectors() -> None:
    shapes = {"scale": (1, 1, 8), "gate": (8, 1), "position_bias": (4, 4)}
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()})
    assert set(parameter_roles(model).values()) == {"vector"}


@pytest.mark.parametrize("kind", [SOAP, Shampoo, Muon])
def test_one_optimizer_trains_a_whole_model(kind: Any) -> None:
    model = Decoder(tie=True)
    optimizer = kind(split_params(model), lr=0.01)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for seed in range(2):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert all(not torch.equal(before[name], param) for name, param in model.named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "pos_embed"


@pytest.mark.parametrize("tie", [False, True])
def test_hugging_face_decoders(tie: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=tie))
    roles = parameter_roles(model)
    by_role = {role: [name for name in roles if roles[name] == role] for role in set(roles.values())}
    assert by_role["embed"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert by_role.get("head", []) == ([] if tie else ["lm_head.weight"])
    assert [name.split(".")[-2] for name in by_role["matrix"]] == ["c_attn", "c_proj", "c_fc", "c_proj"]


def test_hugging_face_encoders_with_a_classifier() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    roles = parameter_roles(transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes)))
    assert roles["classifier.weight"] == "head"
    assert roles["bert.pooler.dense.weight"] == "matrix"
    assert roles["bert.encoder.layer.0.output.dense.weight"] == "matrix"
    assert roles["bert.embeddings.LayerNorm.weight"] == "vector"
    assert roles["bert.embeddings.token_type_embeddings.weight"] == "embed"
