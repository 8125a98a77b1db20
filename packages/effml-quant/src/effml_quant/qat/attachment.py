"""Let a model compute with cast weights while it keeps its own: the mechanism under every quantisation-aware baseline.

`attach` gives each chosen module a class of its own, a subclass of what it was, whose `forward` sees the cast weight in
place of `weight`. Nothing else changes: parameters, their names, hooks and `state_dict` are the model's, so optimizers,
DDP, `torch.compile` (no graph break) and checkpoints notice nothing. A weight is cast once per call of its module and
passed to backward as it was used in forward.

A weight that is read outside its module's `forward`, as `nn.MultiheadAttention` does with its output projection, would
escape: that one is refused, another cannot be seen from here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from effml_shared.errors import ConfigError
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from effml_quant.qtensor import QTensor
from effml_quant.quantizer import Quantizer
from effml_quant.selection import WeightFilter, select_modules

__all__ = ["Attached", "WeightMethod", "attach"]


class WeightMethod(Protocol):
    """What training sees in place of a weight, and what is deployed. Without state: that is the module's."""

    @property
    def quantizer(self) -> Quantizer:
        """What casts the weights."""

    def prepare(self, weight: nn.Parameter) -> Mapping[str, nn.Parameter]:
        """Return the parameters that the method learns beside a weight, by the name they get in its module."""

    def forward_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return what the module's forward pass computes with, differentiable."""

    def deployed_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return the weight on its grid, as it is used once training is over."""

    def quantized_weight(self, module: nn.Module, weight: nn.Parameter) -> QTensor:
        """Return that weight as codes and scales."""


class Attached:
    """A method at work in a model, until `restore`. Made by `attach`.

    Attributes:
        method: the one at work.
        modules: those whose weight is cast, by name, each weight once.
    """

    def __init__(self, model: nn.Module, method: WeightMethod, filter: WeightFilter | None) -> None:
        self.method = method
        self.modules = select_modules(model, filter)
        owners: dict[int, list[nn.Module]] = {id(module._parameters["weight"]): [] for module in self.modules.values()}
        for module in model.modules():
            owners.get(id(module._parameters.get("weight")), []).append(module)
        self._owners = list(owners.values())  # modules that share a weight all see it cast
        for name, module in self.modules.items():
            if isinstance(module, _CastForward):
                raise ConfigError(f"model: got {name} with a method attached, expected one after restore()")
            if isinstance(module, NonDynamicallyQuantizableLinear):
                raise ConfigError(
                    f"{name}: got a layer whose weight nn.MultiheadAttention reads, expected a filter without it"
                )
        self._learned: list[nn.Parameter] = []
        for modules in self._owners:
            learned = method.prepare(modules[0]._parameters["weight"])  # type: ignore[arg-type]
            self._learned += learned.values()
            for module in modules:
                for name, parameter in learned.items():
                    module.register_parameter(name, parameter)
                module._cast_method, module._cast_weight, module._cast_learned = method, None, tuple(learned)  # type: ignore[assignment]
                module.__class__ = _subclass(type(module))  # type: ignore[arg-type]

    def learned_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the method added to the model."""
        yield from self._learned

    def deployed(self) -> dict[str, Tensor]:
        """Return the weights on their grid, by parameter name, before `restore`: what `placed_weights` takes."""
        with torch.no_grad():
            return {name: self.method.deployed_weight(module, weight) for name, module, weight in self._named()}

    def quantized(self) -> dict[str, QTensor]:
        """Return the same as codes and scales: what `effml_quant.save_quantized` takes."""
        with torch.no_grad():
            return {name: self.method.quantized_weight(module, weight) for name, module, weight in self._named()}

    def _named(self) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
        for name, module in self.modules.items():
            yield f"{name}.weight" if name else "weight", module, module._parameters["weight"]  # type: ignore[misc]

    def restore(self) -> None:
        """Give the modules their own class back and drop what the method added; weights stay as trained.

        Raises:
            ConfigError: a module has changed its class again since (FSDP2 does that).
        """
        modules = [module for shared in self._owners for module in shared]
        if changed := [type(module).__name__ for module in modules if type(module).__mro__[1] is not _CastForward]:
            raise ConfigError(f"model: got a {changed[0]} with another class than attach() left, expected that one")
        for module in modules:
            for name in module._cast_learned:  # type: ignore[union-attr]
                del module._parameters[name]
            for name in ("_cast_method", "_cast_weight", "_cast_learned"):
                del module.__dict__[name]
            module.__class__ = type(module).__mro__[2]
        self._owners, self._learned = [], []


def attach(model: nn.Module, method: WeightMethod, filter: WeightFilter | None = None) -> Attached:
    """Let a method stand between a model's weights and its computations.

    Call it before wrapping the model in DDP, and before making the optimizer if the method learns something (LSQ).

    Args:
        method: `PTQ`, `STE`, `RAT`, `LSQ`, or another `WeightMethod`.
        filter: of modules; None: inner linear and convolution layers.

    Raises:
        ConfigError: there is no weight to cast, or one has a method attached already.

    >>> from effml_quant.qat import STE
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.7, 0.26]]))
    >>> attached = attach(layer, STE("int4"))
    >>> layer(torch.tensor([0.0, 1.0])).item()
    0.30000001192092896
    >>> attached.restore()
    >>> layer(torch.tensor([0.0, 1.0])).item()
    0.25999999046325684
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ConfigError("model: got one wrapped in DDP, expected it before: DDP looks for parameters only once")
    return Attached(model, method, filter)


class _CastForward:
    """Marks the subclasses made here; comes first in the order of bases, so that its `forward` is met first."""

    _parameters: dict[str, nn.Parameter]
    _cast_method: WeightMethod
    _cast_weight: Tensor | None
    _cast_learned: tuple[str, ...]

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"] if self._cast_weight is None else self._cast_weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight = self._cast_method.forward_weight(self, self._parameters["weight"])  # type: ignore[arg-type]
        object.__setattr__(self, "_cast_weight", weight)  # nn.Module would register a Parameter
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._cast_weight = None


@functools.cache
def _subclass(cls: type) -> type:
    """Return the subclass of a module class that casts; one for all its instances, which spares recompilations."""
    return type(cls.__name__, (_CastForward, cls), {})
