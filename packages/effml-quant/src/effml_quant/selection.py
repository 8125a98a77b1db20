"""Which weights of a model are quantised, when nothing else is said: one answer for every method."""

from __future__ import annotations

from collections.abc import Callable

from effml_shared.errors import ConfigError
from torch import nn

__all__ = ["WeightFilter", "is_inner_weight", "select_modules", "select_weights"]

WeightFilter = Callable[[str, nn.Module], bool]
"""`filter(module_name, module)` says whether that module's `weight` is quantised."""

_HEADS = ("lm_head", "head", "embed_out", "classifier", "score")


def is_inner_weight(name: str, module: nn.Module) -> bool:
    """Say yes to linear and convolution layers, and no to output heads by their usual names.

    Embeddings, norms and biases are no such layers; a head tied to an embedding is left out by `select_weights`.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) and name.rpartition(".")[2] not in _HEADS


def select_modules(model: nn.Module, filter: WeightFilter | None = None) -> dict[str, nn.Module]:
    """Return the modules whose `weight` is quantised, by name, each weight once.

    Raises:
        ConfigError: there is none, or one has a weight that is not floating.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    chosen: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not (filter or is_inner_weight)(name, module):
            continue
        if filter is None and id(weight) in embedded:
            continue
        if not weight.is_floating_point():
            raise ConfigError(f"{name}.weight: got {weight.dtype}, expected a floating dtype")
        if id(weight) not in seen:
            seen.add(id(weight))
            chosen[name] = module
    if not chosen:
        raise ConfigError("model: got one without weights to quantise, expected nn.Linear layers or another filter")
    return chosen


def select_weights(model: nn.Module, filter: WeightFilter | None = None) -> dict[str, nn.Parameter]:
    """Return the weights to quantise by parameter name."""
    chosen = select_modules(model, filter)
    return {f"{name}.weight" if name else "weight": module.weight for name, module in chosen.items()}  # type: ignore[misc]
