"""The optimizer kit passes what is right and catches what is wrong: a kit that cannot fail would prove nothing."""

import pytest
import torch
from effml_shared.testing.optimizers import OptimizerKit


class OfTorch(OptimizerKit):
    __test__ = False  # only the chosen methods below: torch's AdamW does not promise all that the kit asks

    def make(self, params, **overrides):
        return torch.optim.AdamW(params, **{"lr": 0.05, **overrides})


class Forgetful(torch.optim.SGD):
    """Loses its momentum in a checkpoint."""

    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class OfForgetful(OfTorch):
    def make(self, params, **overrides):
        overrides.pop("eps", None)
        return Forgetful(params, **{"lr": 0.05, "momentum": 0.9, **overrides})


class Stubborn(torch.optim.SGD):
    """Ignores the options of its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.05
        return super().step(closure)


class OfStubborn(OfForgetful):
    def make(self, params, **overrides):
        return Stubborn(params, **{"lr": 0.05, **overrides})


def test_torchs_adamw_passes_what_it_promises():
    kit = OfTorch()
    kit.test_decreases_a_quadratic()
    kit.test_resumes_bit_identically_from_plain_tensors(torch.float32)
    kit.test_group_options_override_defaults_and_groups_can_be_added()
    kit.test_parameters_without_gradient_or_with_a_zero_one_stay(1e-8)
    kit.test_rejects_sparse_gradients_in_one_line_before_changing_anything()


@pytest.mark.parametrize(
    ("kit", "method", "arguments"),
    [
        (OfTorch, "test_resumes_bit_identically_from_plain_tensors", [torch.bfloat16]),  # state in the parameter's type
        (OfTorch, "test_parameters_without_gradient_or_with_a_zero_one_stay", [0.0]),  # 0 / 0
        (OfTorch, "test_names_bad_arguments", []),  # "Invalid learning rate" does not name the argument
        (OfForgetful, "test_resumes_bit_identically_from_plain_tensors", [torch.float32]),
        (OfStubborn, "test_group_options_override_defaults_and_groups_can_be_added", []),
        (OfStubborn, "test_follows_a_scheduler_and_a_tensor_lr", []),
    ],
)
def test_it_catches(kit, method, arguments):
    with pytest.raises(AssertionError):
        getattr(kit(), method)(*arguments)
