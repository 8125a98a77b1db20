"""Make a Recurrent Transformer of a trained Transformer, and change gradually from one to the other.

A recurrent layer makes its persistent pairs from (1 - mu) input + mu output. At mu = 0 it is the standard pre-norm
layer exactly, so a converted model first computes what its source did; training may then raise mu to 1, the Recurrent
Transformer of arXiv 2604.21215. The mixture is our own; the paper trains from scratch.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer
from torch import nn

from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.model import RecurrentTransformer

__all__ = ["convert_transformer", "set_write_mix"]


def convert_transformer(model: Transformer, *, write_mix: float = 1.0, **options: Any) -> RecurrentTransformer:
    """Return a Recurrent Transformer with copies of a causal pre-norm model's weights, on its device, in its type.

    options: further fields of `RecurrentTransformerConfig`, such as `recurrent_layers`.

    Raises:
        ConfigError: the model is bidirectional or norms after its layers, or an option is out of range.
    """
    config = RecurrentTransformerConfig(**{**asdict(model.config), **options, "write_mix": write_mix})
    weight = next(model.parameters())
    converted = RecurrentTransformer(config).to(device=weight.device, dtype=weight.dtype)
    converted.load_state_dict(model.state_dict())
    return converted.train(model.training)


def set_write_mix(model: nn.Module, write_mix: float) -> None:
    """Set mu, in [0, 1], in every recurrent layer of a model.

    Raises:
        ConfigError: mu is out of range, or there is no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, RecurrentTransformerLayer)]
    if not layers:
        raise ConfigError(f"model: got {type(model).__name__} without recurrent layers, expected at least one")
    if not 0 <= write_mix <= 1:
        raise ConfigError(f"write_mix: got {write_mix}, expected a number in [0, 1]")
    for layer in layers:
        layer.write_mix = write_mix
