"""What every optimizer must do, as tests to inherit: `class TestMine(OptimizerKit)` with a `make` method."""

from __future__ import annotations

import io
import shutil
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter


class OptimizerKit:
    """Conformance tests of a `torch.optim.Optimizer`; parameters of `shapes`, gradients from a seed."""

    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((6, 5), (6, 5), (5, 3, 2), (4, 4))
    bad_arguments: ClassVar[tuple[tuple[str, Any], ...]] = (("lr", -1.0), ("weight_decay", -1.0))
    steps = 7  # enough to pass whatever happens only every few steps

    def make(self, params: Any, **overrides: Any) -> Any:
        """Return the optimizer, set to come twice as near to a minimum about 1 away per coordinate in 100 steps."""
        raise NotImplementedError

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[Parameter]:
        seed = torch.Generator().manual_seed(0)
        return [Parameter(torch.randn(shape, generator=seed).to(dtype)) for shape in self.shapes]

    def train(self, params: list[Parameter], optimizer: Any, start: int, stop: int, scale: float = 1.0) -> list[Tensor]:
        for step in range(start, stop):
            seed = torch.Generator().manual_seed(step)
            for param in params:
                param.grad = scale * torch.randn(param.shape, generator=seed).to(param.dtype)
            optimizer.step()
        return [param.detach().clone() for param in params]

    def trained(self, dtype: torch.dtype = torch.float32, scale: float = 1.0, **overrides: Any) -> list[Tensor]:
        return self.train(params := self.parameters(dtype), self.make(params, **overrides), 0, self.steps, scale)

    def test_decreases_a_quadratic(self) -> None:
        optimizer = self.make(params := self.parameters(), weight_decay=0.0)

        def closure() -> float:
            optimizer.zero_grad()
            (loss := torch.stack([(param**2).sum() for param in params]).sum()).backward()  # needs gradients enabled
            return float(loss.detach())

        first, *_, last = [optimizer.step(closure) for _ in range(100)]
        assert last < 0.25 * first

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_resumes_bit_identically_from_plain_tensors(self, dtype: torch.dtype) -> None:
        optimizer = self.make(params := self.parameters(dtype))
        for stop in range(self.steps):
            torch.save(optimizer.state_dict(), file := io.BytesIO())
            state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            values = [value for entry in state["state"].values() for value in entry.values()]
            assert {(type(v), v.dtype, v.is_contiguous()) for v in values} <= {(Tensor, torch.float32, True)}
            resumed = [Parameter(param.detach().clone()) for param in params]
            (other := self.make(resumed)).load_state_dict(state)
            ends = self.train(resumed, other, stop, self.steps)
            torch.testing.assert_close(ends, self.trained(dtype), rtol=0, atol=0)
            self.train(params, optimizer, stop, stop + 1)

    def test_group_options_override_defaults_and_groups_can_be_added(self) -> None:
        before, params = self.parameters()[:3], self.parameters()[:3]
        optimizer = self.make([{"params": params[:1], "lr": 0.0}, {"params": params[1:2]}], weight_decay=0.1)
        optimizer.add_param_group({"params": params[2:], "lr": 0.0})
        self.train(params, optimizer, 0, 3)
        assert [torch.equal(a, b) for a, b in zip(before, params, strict=True)] == [True, False, True]

    @pytest.mark.parametrize("eps", [0.0, 1e-8])
    def test_parameters_without_gradient_or_with_a_zero_one_stay(self, eps: float) -> None:
        optimizer = self.make(params := self.parameters(), weight_decay=0.0, eps=eps)
        self.train(params[1:], optimizer, 0, self.steps, scale=0.0)
        torch.testing.assert_close(params, self.parameters(), rtol=0, atol=0)
        assert not optimizer.state[params[0]]

    def test_rejects_sparse_gradients_in_one_line_before_changing_anything(self) -> None:
        optimizer = self.make(params := self.parameters())
        params[0].grad, params[-1].grad = torch.ones_like(params[0]), torch.ones_like(params[-1]).to_sparse()
        with pytest.raises((ValueError, RuntimeError), match=r"^[^\n]*sparse[^\n]*$"):
            optimizer.step()
        torch.testing.assert_close(params, self.parameters(), rtol=0, atol=0)

    @pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler was found")
    @pytest.mark.filterwarnings("ignore")  # compilers warn of many things that are none of ours
    def test_compiled_equals_eager(self) -> None:
        optimizer = self.make(params := self.parameters())
        optimizer.step = torch.compile(optimizer.step)
        torch.testing.assert_close(self.train(params, optimizer, 0, self.steps), self.trained(), rtol=1e-6, atol=1e-6)

    def test_batched_equals_one_by_one_and_maximizing_is_minimizing_the_negative(self) -> None:
        torch.testing.assert_close(self.trained(), self.trained(foreach=False), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(self.trained(maximize=True), self.trained(scale=-1.0), rtol=0, atol=0)

    def test_follows_a_scheduler_and_a_tensor_lr(self) -> None:
        optimizer = self.make(params := self.parameters())
        other = self.trained(lr=torch.tensor([optimizer.param_groups[0]["lr"]]))
        torch.testing.assert_close(other, self.trained(), rtol=1e-5, atol=1e-6)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
        before = self.train(params, optimizer, 0, 2)
        scheduler.step()
        torch.testing.assert_close(self.train(params, optimizer, 2, 4), before, rtol=0, atol=0)

    def test_names_bad_arguments(self) -> None:
        for name, value in self.bad_arguments:
            with pytest.raises(ValueError, match=name):
                self.make(self.parameters(), **{name: value})
