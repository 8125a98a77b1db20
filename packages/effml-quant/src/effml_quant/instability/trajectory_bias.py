"""The other gradient bias: between two runs, each at its own weights.

    rho_t = |g~(w~_t) - g(w_t)| / |g(w_t)|,    w_t from an exact run, w~_t from one in low precision, one batch for both

It holds the bias of the gradient *and* how far the runs have drifted apart, which soon is the larger part: a rho of
`gradient_bias` is the one that statements on stability speak of. This one is what the authors of arXiv 2506.20752 log
(they log its square). The exact run leaves its gradients on disk; the other reads them, so either may be resumed.
Both see the gradient as the optimizer gets it: accumulated, scaled and clipped.
State: the number of updates. Cost: one copy of the gradients to or from disk at every n-th update.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from effml_shared.checks import check_count
from effml_shared.errors import CheckpointError
from effml_shared.files import replacing
from effml_shared.loop import Hook
from effml_shared.tree import read_tree, write_tree
from torch import Tensor, nn

from effml_quant.instability.gradient_bias import GradientBias, Groups, compare_gradients, total

__all__ = ["GradientRecorder", "TrajectoryMeter"]


class _BeforeUpdate(Hook):
    """Watch every n-th gradient just before an optimizer uses it. A `Loop` keeps the count in its checkpoints."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, directory: str | Path, *, every: int = 5
    ) -> None:
        check_count("every", every, 1)
        self.model, self.directory, self.every, self.updates = model, Path(directory), every, 0
        self._handle = optimizer.register_step_pre_hook(lambda *_: self._count())

    def _count(self) -> None:
        if self.updates % self.every == 0:
            named = self.model.named_parameters()
            self._see({name: None if p.grad is None else p.grad for name, p in named if p.requires_grad})
        self.updates += 1

    @property
    def path(self) -> Path:
        """Where the gradient of the update to come belongs."""
        return self.directory / f"gradient-{self.updates:08d}.safetensors"

    def _see(self, gradient: dict[str, Tensor | None]) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return how many updates there were."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.updates = state["updates"]

    def close(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()


class GradientRecorder(_BeforeUpdate):
    """Write the gradient of every n-th update of the exact run to a directory.

    Args:
        model, optimizer: of the run.
        directory: for one safetensors file each.
        every: updates between two.
    """

    def _see(self, gradient: dict[str, Tensor | None]) -> None:
        with replacing(self.path) as partial:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_tree(partial, gradient)


class TrajectoryMeter(_BeforeUpdate):
    """Compare the gradients of a run with what a `GradientRecorder` with the same `every` left.

    Attributes:
        readings: by number of updates before, the bias over all parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: str | Path,
        *,
        every: int = 5,
        groups: Groups = "module",
    ) -> None:
        super().__init__(model, optimizer, directory, every=every)
        self.groups = groups
        self.readings: dict[int, GradientBias] = {}

    def _see(self, gradient: dict[str, Tensor | None]) -> None:
        if not self.path.exists():
            raise CheckpointError(f"{self.path}: got no gradient there, expected one from a GradientRecorder")
        device = next(self.model.parameters()).device
        stored = read_tree(self.path)
        exact = {name: None if grad is None else grad.to(device) for name, grad in stored.items()}
        self.readings[self.updates] = total(compare_gradients(exact, gradient, self.groups))

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the readings."""
        return {**super().state_dict(), "readings": {step: list(bias) for step, bias in self.readings.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        super().load_state_dict(state)
        self.readings = {step: GradientBias(*values) for step, values in state["readings"].items()}
