from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from effml_arch.activation_ledger import activation_ledger
from effml_arch.recurrent import RecurrentTransformer, RecurrentTransformerConfig
from effml_shared.errors import ConfigError
from effml_shared.layers import TransformerConfig
from effml_shared.transformer import Transformer
from torch import Tensor

SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_ff": 160, "vocab_size": 128}


def layers_alone(model: Transformer, x: Tensor) -> Tensor:
    """Run the layers of a model, in a context of its own making."""
    context = model._context(x, None, None, None, None)
    for layer in model.model["layers"]:  # type: ignore[attr-defined]
        x = layer(x, context)
    return x


def kept(config: TransformerConfig, seq_len: int, dtype: torch.dtype) -> int:
    """Return the bytes of the storages that autograd saves of a forward pass of the layers, parameters aside."""
    make = RecurrentTransformer if isinstance(config, RecurrentTransformerConfig) else Transformer
    model = make(config).to(dtype)  # type: ignore[arg-type]
    x = torch.randn(2, seq_len, config.d_model).to(dtype).requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layers_alone(model, x)
    found = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in saved)}
    for parameter in model.parameters():
        found.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(found.values())


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_what_autograd_keeps(recurrent: bool, dtype: torch.dtype) -> None:
    kinds = product(("swiglu", "gelu", "relu"), ("none", "full", "head"), (4, 2))
    for i, (mlp, qk_norm, kv_heads) in enumerate(kinds):
        varied = {"norm": ("rms", "layer")[i % 2], "position": ("rope", "alibi", "none")[i // 2 % 3]}
        fields = {**SHAPE, **varied, "mlp": mlp, "qk_norm": qk_norm, "n_kv_heads": kv_heads}
        config = RecurrentTransformerConfig(**fields) if recurrent else TransformerConfig(**fields)
        assert kept(config, 37, dtype) == pytest.approx(activation_ledger(config, 37, 2, dtype).total, rel=2e-3), fields


def test_of_a_stack_of_both_kinds_of_layers() -> None:
    config = RecurrentTransformerConfig(**SHAPE, position="alibi", recurrent_layers=(1,))
    assert kept(config, 33, torch.bfloat16) == pytest.approx(activation_ledger(config, 33, 2).total, rel=2e-3)


def test_grows_with_the_length_and_not_its_square() -> None:
    config = RecurrentTransformerConfig(**SHAPE, position="alibi")
    once, twice = (kept(config, n, torch.float32) for n in (128, 256))
    assert twice == 2 * once
    assert activation_ledger(config, 256, 2).total == 2 * activation_ledger(config, 128, 2).total
    bias = activation_ledger(TransformerConfig(**SHAPE, position="alibi"), 256, 2, torch.float32).bias
    assert bias == 4 * 4 * 256**2


def test_bad_numbers() -> None:
    with pytest.raises(ConfigError, match=r"seq_len: got 0"):
        activation_ledger(TransformerConfig(), 0)
    with pytest.raises(ConfigError, match=r"batch: got 1.5"):
        activation_ledger(TransformerConfig(), 8, 1.5)  # type: ignore[arg-type]
