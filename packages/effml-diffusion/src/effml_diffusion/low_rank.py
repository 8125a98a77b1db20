"""Low-rank adapters (LoRA): a linear layer of someone else's model plus a product of two thin ones.

    y = W x + (alpha / rank) B A drop(x),    B = 0 at the start

The adapted model keeps its modules and their names: whoever owns the adapters adds their output by a forward hook, so
its own weights, checkpoints and, without the hooks, outputs stay what they were. Layers that are not called as modules
(fused kernels that read the weight) cannot be adapted so.

State: rank (in + out) numbers per layer. Cost: 2 rank (in + out) FLOPs per token and layer. Source: arXiv 2106.09685.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_diffusion.denoiser import output_head
from effml_diffusion.modulation import ZeroLinear

__all__ = ["LowRank", "LowRankConfig", "linear_layers"]


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """Which layers are adapted, and how; the default is what arXiv 2509.01025 gives LLaDA.

    >>> LowRankConfig(rank=8, targets="(")
    Traceback (most recent call last):
    effml_shared.errors.ConfigError: targets: got '(', expected a regular expression
    """

    rank: int = 128
    alpha: float | None = None  # factor of the product, divided by rank; None: rank
    dropout: float = 0.1  # probability of dropping, in training, each input of an adapter
    targets: str = "q_proj|k_proj|v_proj|query|key|value"  # regular expression for the last part of layers' names
    head: bool = True  # adapt the output head too, where it is a linear layer

    def __post_init__(self) -> None:
        check_count("rank", self.rank, 1)
        check_range("dropout", self.dropout, 0, 1)
        try:
            re.compile(self.targets)
        except re.error:
            raise ConfigError(f"targets: got {self.targets!r}, expected a regular expression") from None


class LowRank(nn.Module):
    """The adapter of a linear layer: x (..., in_features) -> (..., out_features) to be added to the layer's output.

    It works in the type of its own weights, which may be wider than x's.
    """

    def __init__(self, in_features: int, out_features: int, config: LowRankConfig) -> None:
        super().__init__()
        self.factor = 1.0 if config.alpha is None else config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(in_features, config.rank, bias=False)
        self.up = ZeroLinear(config.rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.up(self.down(self.dropout(x.to(self.down.weight.dtype))))


def linear_layers(model: nn.Module, config: LowRankConfig) -> dict[str, nn.Linear]:
    """Return the linear layers of a model that are to be adapted, by their names in it.

    Raises:
        ConfigError: none of the layers has such a name.

    >>> layers = {"q_proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}
    >>> list(linear_layers(nn.ModuleDict(layers), LowRankConfig(rank=1)))
    ['q_proj']
    """
    head = output_head(model) if config.head else None
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module is head or re.fullmatch(config.targets, name.rpartition(".")[2]))
    }
    if all(module is head for module in layers.values()):
        names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"targets: got {config.targets!r}, expected to match one of {', '.join(names) or 'no layers'}"
        )
    return layers
