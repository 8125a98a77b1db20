from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_eval.activations.hook_points import ModuleActivations, hidden_states
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

IDS = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def transformer(**fields: Any) -> Transformer:
    sizes = {"n_layers": 3, "d_model": 16, "n_heads": 2, "d_ff": 16, "vocab_size": 50}
    return Transformer(TransformerConfig(**{**sizes, **fields}))


class Stages(nn.Module):
    """Layers that keep count of how often they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head, self.idle = (nn.Linear(4, 4) for _ in range(4))
        self.dropout = nn.Dropout(0.5)
        self.calls: list[str] = []
        for name in ("first", "second", "head"):
            getattr(self, name).register_forward_hook(lambda *_, name=name: self.calls.append(name))

    def forward(self, x: Tensor, scale: float = 1.0, labels: Any = None) -> Tensor:
        assert labels is None
        return self.head(self.second(self.dropout(self.first(x)) * scale))


def test_the_states_of_a_transformer() -> None:
    model = transformer()
    expected = model(IDS, hidden_states=True).hidden_states
    names = ["model.layers.0:input", "model.layers.0", "model.layers.1:output", "model.norm"]
    found = hidden_states(model, {"input_ids": IDS, "labels": IDS, "no such": 1}, names)
    for name, state in zip(names, expected, strict=True):
        assert torch.equal(found[name], state)
    assert not any(state.requires_grad for state in found.values())
    rows = ModuleActivations(model, "model.layers.1")({"input_ids": IDS})
    assert torch.equal(rows, expected[2].flatten(0, 1))


def test_padding_is_left_out() -> None:
    model, mask = transformer(), torch.ones(3, 6, dtype=torch.int64)
    mask[0, :4] = 0
    whole = hidden_states(model, {"input_ids": IDS, "attention_mask": mask}, ["model.layers.1"])["model.layers.1"]
    rows = ModuleActivations(model, "model.layers.1")({"input_ids": IDS, "attention_mask": mask})
    assert torch.equal(rows, whole[mask.bool()])


def test_leaves_the_model_as_soon_as_it_can_and_as_it_was() -> None:
    model, x = Stages(), torch.randn(2, 4)
    model.train()
    found = hidden_states(model, x, ["first", "second:input", "first"])
    assert model.calls == ["first"]
    assert model.training
    assert model.dropout.training
    assert torch.equal(found["second:input"], found["first"])
    assert torch.equal(found["first"], model.first(x))
    model.calls.clear()
    with torch.enable_grad():
        model.eval()(x)
    assert model.calls == ["first", "second", "head"]
    assert all(len(module._forward_pre_hooks) == 0 for module in model.modules())
    assert torch.equal(hidden_states(model, {"x": x, "scale": 0.0}, [""])[""], model(x, 0.0))


def test_wrapped_models_and_double_precision() -> None:
    model = Stages().double()
    compiled: Any = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    found = ModuleActivations(compiled, "second")(x)
    assert found.dtype == torch.float64
    assert torch.equal(found, ModuleActivations(model, "second")(x))
    half = ModuleActivations(Stages().bfloat16(), "second")(x.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("kind", ["causal", "vision"])
def test_models_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "causal":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)
        model, batch, prefix = transformers.LlamaForCausalLM(config).eval(), {"input_ids": IDS}, "model.layers"
    else:
        config = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
        model, batch = transformers.CLIPVisionModel(config).eval(), {"pixel_values": torch.randn(2, 3, 8, 8)}
        prefix = next(name for name, _ in model.named_modules() if name.endswith("encoder.layers"))
    expected = model(**batch, output_hidden_states=True).hidden_states
    names = [f"{prefix}.0:input", f"{prefix}.0", f"{prefix}.1:input"]
    found = hidden_states(model, batch, names)
    for name, state in zip(names, (expected[0], expected[1], expected[1]), strict=True):
        assert torch.equal(found[name], state)
    again = model(**batch, output_hidden_states=True).hidden_states  # nothing is left behind
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    rows = ModuleActivations(model, f"{prefix}.1.mlp")(batch)
    assert rows.shape == (expected[0].shape[0] * expected[0].shape[1], 16)


def test_refuses() -> None:
    model, x = Stages(), torch.randn(2, 4)
    for name, match in (
        ("frist", r"hook_point: got 'frist' \(nearest: first\), expected one of the model's 6 modules"),
        ("first:outside", r"hook_point: got 'first:outside', expected nothing, ':input' or ':output'"),
    ):
        with pytest.raises(ConfigError, match=match):
            ModuleActivations(model, name)
    with pytest.raises(ConfigError, match=r"hook_point: got 'idle', which the model does not call"):
        hidden_states(model, x, ["first", "idle"])
    with pytest.raises(ConfigError, match=r"batch: got \['y'\], expected names of the arguments of Stages"):
        ModuleActivations(model, "first")({"y": x})
    with pytest.raises(
        ConfigError, match=r"hook_point: got torch.int64 of shape \(3, 6\) at 'model.embed_tokens:input'"
    ):
        ModuleActivations(transformer(), "model.embed_tokens:input")(IDS)
    with pytest.raises(NonFiniteError, match=r"first: got NaN or infinity among the activations"):
        ModuleActivations(model, "first")(x * torch.nan)
    assert not any(module._forward_pre_hooks for module in model.modules())
