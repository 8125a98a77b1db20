"""Put a precision scheme on a model, change it and take it away, without touching parameters, names or torch itself.

A covered module keeps its parameters, hooks, names and place; only its class gets another in front (`nn.Linear` turns
into `MXLinear`), which reads the module's `precision_scheme` at every call. A switch only sets that attribute, so
checkpoints stay plain and a compiled graph is specialised once per scheme. Apply before DDP, FSDP2 (`fully_shard`) or
`torch.compile`. Norms are covered from the first scheme with `norm_affine` on, and all other modules, which then watch
the functions that they call, from the first one with a format for these.

A module that reads the weights of its parts and does not call them may say so in an attribute `precision_refusal`, one
line or None: a scheme that would cover any of these parts is refused in its words, before anything is trained with it;
one that exempts all of them passes the module by.

Not covered, and listed in `ModelHandle.uncovered`: products with weights that are no linear layer (convolutions,
recurrent layers, `nn.MultiheadAttention`, experts in one tensor), layers with a forward pass of their own, and a tied
output head of `effml_shared`'s Transformer, which has no module of its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer
from torch import nn

from effml_quant.precision.linear import MXConv1D, MXLinear, check_weight
from effml_quant.precision.norms import MXNorm, has_gain, is_norm
from effml_quant.precision.operations import Watched, watches
from effml_quant.precision.scheme import PrecisionScheme
from effml_quant.selection import WeightFilter

__all__ = ["ModelHandle", "apply_scheme"]

_log = logging.getLogger(__name__)

_UNWATCHED = (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)
_FUNCTIONAL = (nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)


def apply_scheme(model: nn.Module, scheme: PrecisionScheme | None, filter: WeightFilter | None = None) -> ModelHandle:
    """Train and evaluate a model in a precision scheme from now on; a scheme applied before is replaced.

    Args:
        model: any module; it is changed in place.
        scheme: None: cover the model and change nothing yet.
        filter: `filter(name, module)` says which linear layers are covered. None: all, the output head included. The
            scheme's own `exempt` leaves more of them out. Names start inside of DDP and `torch.compile`.

    Raises:
        ConfigError: there is nothing to cover, a weight does not fit the scheme, or a module refuses one.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    >>> handle = apply_scheme(model, PrecisionScheme.recommended())
    >>> list(handle.layers), sorted(model.state_dict()) == ['0.bias', '0.weight', '2.bias', '2.weight']
    (['0', '2'], True)
    >>> with handle.using(None):
    ...     exact = model(torch.ones(1, 64))
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: got {type(model).__name__}, expected an nn.Module")
    for module in model.modules():
        _uncover(module)
    return ModelHandle(model, scheme, filter)


class ModelHandle:
    """A model's precision scheme, to be read, changed and taken away.

    Attributes:
        model: as given.
        layers: the linear layers by name, those included that a scheme exempts.
        norms: the norms by name.
        uncovered: by name, what computes products with weights and stays in its own precision, and why.
    """

    def __init__(self, model: nn.Module, scheme: PrecisionScheme | None, filter: WeightFilter | None = None) -> None:
        self.model = model
        root = _unwrapped(model)
        self.layers: Mapping[str, nn.Module]
        self.norms: Mapping[str, nn.Module]
        self.uncovered: Mapping[str, str]
        layers, norms, others, uncovered = {}, {}, {}, _unreached(root)
        for name, module in root.named_modules():
            reason = uncovered.get(name) or _why_not(module)
            if reason is not None:
                uncovered[name] = reason
            elif _is_linear(module) and (filter is None or filter(name, module)):
                layers[name] = module
            elif is_norm(module):
                norms[name] = module
            if name not in norms and not _is_linear(module) and not isinstance(module, _UNWATCHED):
                others[name] = module
        if not layers:
            raise ConfigError("model: got one without linear layers to cover, expected nn.Linear or another filter")
        self.layers, self.norms, self.uncovered = map(MappingProxyType, (layers, norms, uncovered))
        self._others = others
        self._refusing = {name: m for name, m in root.named_modules() if hasattr(m, "precision_refusal")}
        self._scheme: PrecisionScheme | None = None
        self.set(scheme)
        if uncovered:
            some = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(uncovered.items())[:4])
            _log.warning("precision: %d modules keep their own precision (%s)", len(uncovered), some)

    @property
    def scheme(self) -> PrecisionScheme | None:
        """The scheme in force."""
        return self._scheme

    def set(self, scheme: PrecisionScheme | None) -> None:
        """Change the scheme from the next call of the model on; None: the model as it was.

        Raises:
            ConfigError: see `check`; nothing has changed then.
        """
        if scheme is not None:
            self.check(scheme)
            bare = [name for name, norm in self.norms.items() if not has_gain(norm)]
            if scheme.norm_affine is not None and bare:
                _log.warning("norm_affine: %s has no gain to encode (%d such norms)", bare[0], len(bare))
        for name, layer in self.layers.items():
            _assign(layer, MXLinear if isinstance(layer, nn.Linear) else MXConv1D, _for(scheme, name))
        norm_scheme = None if scheme is None or scheme.norm_affine is None else scheme
        for name, norm in self.norms.items():
            _assign(norm, MXNorm, _for(norm_scheme, name))
        for module in self._others.values():
            _assign(module, Watched, scheme if watches(scheme) else None)
        self._scheme = scheme

    def check(self, scheme: Any) -> None:
        """Refuse now what `set` would refuse later, in the middle of a run.

        Raises:
            ConfigError: it is no scheme, does not fit a weight, or a module cannot have it on its parts.
        """
        if not isinstance(scheme, PrecisionScheme):
            raise ConfigError(f"scheme: got {type(scheme).__name__}, expected a PrecisionScheme or None")
        for name, layer in self.layers.items():
            if _for(scheme, name) is not None:
                try:
                    check_weight(layer.weight, scheme)  # type: ignore[arg-type]
                except ConfigError as error:
                    raise ConfigError(f"{name}.{error}") from None
        parts = [*self.layers, *(self.norms if scheme.norm_affine is not None else ())]
        covered = [name for name in parts if _for(scheme, name) is not None]
        for name, module in self._refusing.items():
            reason = module.precision_refusal
            if reason is not None and any(f"{part}.".startswith(name and f"{name}.") for part in covered):
                raise ConfigError(f"{name}.{reason}".removeprefix("."))

    @contextmanager
    def using(self, scheme: PrecisionScheme | None) -> Iterator[None]:
        """Use another scheme inside a `with` block. A backward pass has the scheme of its forward pass."""
        before = self._scheme
        self.set(scheme)
        try:
            yield
        finally:
            self.set(before)

    def restore(self) -> None:
        """Give every module its own class back. `set` covers the model again."""
        self._scheme = None
        for module in (*self.layers.values(), *self.norms.values(), *self._others.values()):
            _uncover(module)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module, inside of what `torch.compile` and DDP made: names of its parts start there."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _for(scheme: PrecisionScheme | None, name: str) -> PrecisionScheme | None:
    return None if scheme is None or scheme.exempts(name) else scheme


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _why_not(module: nn.Module) -> str | None:
    """Return why a module's products cannot be covered; None: they can, or it has none of its own."""
    if isinstance(module, _FUNCTIONAL):
        return f"{type(module).__name__} is no linear layer"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if isinstance(module, nn.TransformerEncoderLayer):
        return "its fast path in evaluation calls none of its layers"
    if _is_linear(module):
        if "forward" in module.__dict__:
            return "its forward pass was replaced (by accelerate's hooks?)"
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} has a forward pass of its own"
    elif any(p is not None and p.ndim == 3 for p in module._parameters.values()):
        return "its weights are stacks of matrices (experts?)"
    return None


def _unreached(model: nn.Module) -> dict[str, str]:
    """Return the linear layers whose weights somebody else multiplies with."""
    found = {}
    for name, module in model.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            found[f"{dot}out_proj"] = "called as a function by nn.MultiheadAttention"
        if isinstance(module, Transformer) and module.lm_head is None:
            found[f"{dot}model.embed_tokens"] = "the tied head multiplies with its weight"
    return found


def _assign(module: nn.Module, front: type[nn.Module], scheme: PrecisionScheme | None) -> None:
    """Set a module's scheme, covering it first if this is the first one that it has."""
    if not isinstance(module, front):
        if scheme is None:
            return
        module.__class__ = _covered_class(front, type(module))  # type: ignore[arg-type]
    module.precision_scheme = scheme  # type: ignore[assignment]


def _uncover(module: nn.Module) -> None:
    plain = type(module).__dict__.get("plain_class")
    if plain is not None:
        module.__class__ = plain
    module.__dict__.pop("precision_scheme", None)


@functools.cache
def _covered_class(front: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """Return the class `plain` with `front` before it."""
    if front is MXLinear and plain is nn.Linear:
        return MXLinear
    body: dict[str, Any] = {"plain_class": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    if front is Watched:  # it goes by its own name: others look it up by that
        body |= {"__qualname__": plain.__qualname__, "forward": Watched.around(plain.forward)}
        return type(plain.__name__, (front, plain), body)
    return type(f"MX{plain.__name__}", (front, plain), body)
