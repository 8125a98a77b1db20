"""The policy that a KL term holds on to: a frozen model, or a peft model with its adapters switched off.

A frozen copy costs the memory of the weights once more; adapters that are switched off cost nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from effml_shared import distributed
from effml_shared.errors import ConfigError
from effml_shared.generation import unwrap
from torch import nn

__all__ = ["Reference"]


class Reference:
    """Give the reference model for a forward pass.

    Args:
        policy: the model that is trained.
        model: the reference; it is put into evaluation mode and frozen. None: the policy without its adapters if it is
            a model of peft, else a copy of the policy as it is now.

    Raises:
        ConfigError: the reference is the policy itself, or the policy is sharded and cannot be copied.
    """

    def __init__(self, policy: nn.Module, model: nn.Module | None = None) -> None:
        inner: Any = unwrap(policy)
        if model is not None and unwrap(model) is inner:
            raise ConfigError("ref_model: got the policy itself, expected another model, or None for a frozen copy")
        self._adapted: Any = inner if model is None and _has_adapters(inner) else None
        self.model: nn.Module = inner if model is None else model
        self.copied = model is None and self._adapted is None
        if self.copied:
            if distributed.mesh_of(policy) is not None:
                raise ConfigError("ref_model: got none for a sharded policy, expected a sharded model of its own")
            self.model = copy.deepcopy(inner)
        if self._adapted is None:
            self.model.eval().requires_grad_(False)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Yield the model; inside the block a policy with adapters is without them."""
        if self._adapted is None:
            yield self.model
        else:
            with self._adapted.disable_adapter():
                yield self._adapted

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of a copy that was made here; what the caller brought, the caller brings again."""
        return dict(self.model.state_dict()) if self.copied else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        if self.copied:
            self.model.load_state_dict(state)


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")
