"""The critic of PPO: a trunk of its own and a linear head to one number per token, zero at first.

V_t is read at the hidden state whose logits emit token t, which is the state before that action. With the head at zero
V = 0, so that generalised advantages with lambda = 1 start as returns to go. Cost: a second model, its gradients and
its optimizer state.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from effml_shared import distributed
from effml_shared.errors import ConfigError
from effml_shared.generation import unwrap
from effml_shared.transformer import Transformer
from torch import Tensor, nn

from effml_rl.policy_config import PolicyConfig
from effml_rl.policy_passes import Rows, placeholder, sequences, trimmed
from effml_rl.value_loss import value_loss

__all__ = ["ValueModel", "ValueObjective", "explained_variance"]


class ValueModel(nn.Module):
    """Values of the tokens of completions.

    Args:
        trunk: a `Transformer` or a causal language model of Hugging Face, with or without peft adapters. It is trained
            with the head, so give it a model of its own; what turns its states into logits is left out.

    Raises:
        ConfigError: the trunk is neither.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        body: Any = trunk
        if hasattr(body, "get_base_model"):  # peft's: what it wraps has the adapters in it
            body = body.get_base_model()
        if isinstance(body, Transformer):
            body.lm_head = None  # only hidden states are read
            width = body.config.d_model
        elif hasattr(trunk, "base_model") and hasattr(getattr(trunk, "config", None), "hidden_size"):
            body, width = body.base_model, body.config.hidden_size
        else:
            got = type(trunk).__name__
            raise ConfigError(f"critic: got a {got}, expected a Transformer or a causal language model of transformers")
        first = next(body.parameters())
        self.trunk = body
        self.head = nn.Linear(width, 1, bias=False, device=first.device, dtype=first.dtype)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def of(cls, policy: nn.Module) -> ValueModel:
        """Return a critic that starts from a copy of the policy's trunk; beside adapters the trunk stays frozen.

        Raises:
            ConfigError: the policy is sharded and cannot be copied, or of another kind.
        """
        if distributed.mesh_of(policy) is not None:
            raise ConfigError("critic: got none for a sharded policy, expected a ValueModel(...) sharded like it")
        trunk = copy.deepcopy(unwrap(policy))
        return cls(trunk if hasattr(trunk, "peft_config") else trunk.requires_grad_(True))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prompt_len: int) -> Tensor:
        """Return the values (batch, T) of the tokens from index prompt_len on; ids and mask are (batch, P + T)."""
        input_ids, attention_mask = input_ids[:, :-1], attention_mask[:, :-1]  # the last token's state is not read
        options: dict[str, Any] = {}
        if not bool(attention_mask.all()):
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            options = {"attention_mask": attention_mask, "position_ids": positions}
        if isinstance(self.trunk, Transformer):
            hidden = self.trunk(input_ids, **options, logits_to_keep=1, hidden_states=True).hidden_states[-1]
        else:
            hidden = self.trunk(input_ids, **options, use_cache=False).last_hidden_state
        return self.head(hidden[:, prompt_len - 1 :]).squeeze(-1).float()


class ValueObjective:
    """A `Loss` of `GradientStep`: rows are those of the policy with `values` and `returns`, both (rows, T)."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config

    def __call__(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the sum, with its gradient, and the count of tokens."""
        if not len(rows["loss_mask"]):
            nothing = model(*sequences(placeholder(rows["loss_mask"].device)))
            return nothing.sum() * 0.0, nothing.new_zeros(())
        rows = trimmed(rows)
        values = model(*sequences(rows))
        return value_loss(values, rows["values"], rows["returns"], rows["loss_mask"], clip=self.config.value_clip)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over counted tokens (rows, T) of this rank; 0 if none vary."""
    returns, errors = returns[mask].double(), (returns - values)[mask].double()
    if len(returns) < 2 or not float(returns.var()):
        return 0.0
    return float(1 - torch.var(errors) / returns.var())
