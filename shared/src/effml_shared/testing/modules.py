"""What every module of effml must do, as pytest methods to inherit.

A test class derives from `ModuleKit` and supplies `make()` and `inputs()`; the `test_*` methods then run on them.
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class ModuleKit:
    """Conformance tests of one module on the CPU."""

    def make(self) -> nn.Module:
        """Return the module, equal at every call, built with plain constructors so that a device context moves it."""
        raise NotImplementedError

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of one call, by name, equal at every call."""
        raise NotImplementedError

    def outputs(self, module: nn.Module, inputs: dict[str, Any] | None = None) -> list[Tensor]:
        """Return the finite floating tensors of one call, flattened."""
        leaves = tree_leaves(module(**(self.inputs() if inputs is None else inputs)))
        floating = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return [leaf[leaf != -torch.inf] for leaf in floating]  # logits of ids that must not be drawn are -inf

    def loss(self, module: nn.Module, inputs: dict[str, Any] | None = None) -> Tensor:
        """Return a scalar that depends on every output."""
        return torch.stack([out.square().mean() for out in self.outputs(module, inputs)]).sum()

    def assert_same(self, module: nn.Module, other: nn.Module) -> None:
        for out, expected in zip(self.outputs(module), self.outputs(other), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0)

    def test_is_deterministic(self) -> None:
        self.assert_same(self.make(), self.make())

    def test_state_dict_survives_safetensors(self) -> None:
        module, other = self.make(), self.make()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(load(save(module.state_dict())))
        self.assert_same(other, module)

    def test_is_built_on_meta(self) -> None:
        with torch.device("meta"):
            module = self.make()
        assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        module.to_empty(device="cpu").load_state_dict(self.make().state_dict())
        self.assert_same(module, self.make())

    def test_deepcopy_is_independent(self) -> None:
        module, expected = self.make(), self.make()
        with torch.no_grad():
            for parameter in copy.deepcopy(module).parameters():
                parameter.zero_()
        self.assert_same(copy.deepcopy(module), expected)

    def test_gradient_is_the_slope(self) -> None:
        module = self.make().double()
        inputs = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, self.inputs())
        stream, step = torch.Generator().manual_seed(0), 1e-5
        parameters: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(self.loss(module, inputs), parameters, allow_unused=True)
        along = [torch.randn(p.shape, generator=stream, dtype=p.dtype) for p in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True) if g is not None)
        ends, here = {}, 0
        for steps in (1, 2, -2, -1):
            with torch.no_grad():
                torch._foreach_add_(parameters, along, alpha=step * (steps - here))
                ends[steps], here = float(self.loss(module, inputs)), steps
        near, far = (ends[1] - ends[-1]) / (2 * step), (ends[2] - ends[-2]) / (4 * step)
        assert (4 * near - far) / 3 == pytest.approx(slope, rel=1e-6, abs=1e-9)  # the cubic term cancels

    def test_autocast_trains(self) -> None:
        module = self.make()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(module)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)

    def test_compiled_equals_eager(self) -> None:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("torch.compile needs a C++ compiler: none of c++, g++, clang++ found")
        module = self.make()
        compiled: Any = torch.compile(module)
        for out, expected in zip(self.outputs(compiled), self.outputs(module), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
