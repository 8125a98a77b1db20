"""The critic: zero at first, read at the state before each token, trained apart from the policy."""

from __future__ import annotations

import pytest
import torch
from effml_rl.policy_config import ppo
from effml_rl.policy_passes import sequences
from effml_rl.value_model import ValueModel, ValueObjective, explained_variance
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn


def transformer() -> Transformer:
    return Transformer(TransformerConfig(n_layers=2, d_model=16, n_heads=2, d_ff=24, vocab_size=11), seed=3)


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (3, 8), generator=generator)
    counted = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    return {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.arange(3) >= torch.tensor([0, 2, 1])[:, None],
        "completion_ids": ids[:, 3:],
        "loss_mask": counted,
        "values": torch.randn(3, 5, generator=generator),
        "returns": torch.randn(3, 5, generator=generator),
    }


def test_it_is_zero_at_first_and_shares_nothing_with_the_policy() -> None:
    policy = transformer().requires_grad_(False)
    critic = ValueModel.of(policy)
    assert critic(*sequences(rows())).eq(0).all()
    assert policy.lm_head is not None
    assert all(p.requires_grad for p in critic.parameters())
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in policy.parameters()}


def test_a_value_is_read_before_its_token() -> None:
    critic, given = ValueModel.of(transformer()), rows()
    nn.init.normal_(critic.head.weight)
    before = critic(*sequences(given))
    given["completion_ids"] = given["completion_ids"].clone()
    given["completion_ids"][0, 2] = (given["completion_ids"][0, 2] + 1) % 11
    after = critic(*sequences(given))
    assert before[0, :3].equal(after[0, :3])
    assert not before[0, 3:].isclose(after[0, 3:]).any()
    alone = {name: tensor[1:2, 2:] if name.startswith("prompt_") else tensor[1:2] for name, tensor in given.items()}
    torch.testing.assert_close(critic(*sequences(alone)), before[1:2], atol=1e-5, rtol=0)


def test_every_parameter_learns() -> None:
    critic = ValueModel.of(transformer())
    nn.init.normal_(critic.head.weight)
    total, count = ValueObjective(ppo())(critic, rows())
    assert int(count) == 10
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())


def test_no_rows_and_no_tokens() -> None:
    critic, loss = ValueModel.of(transformer()), ValueObjective(ppo())
    empty = {name: tensor[:0] for name, tensor in rows().items()}
    total, count = loss(critic, empty)
    assert (float(total.detach()), float(count)) == (0.0, 0.0)
    masked = {**rows(), "loss_mask": torch.zeros(3, 5, dtype=torch.bool)}
    total, count = loss(critic, masked)
    assert (float(total.detach()), float(count)) == (0.0, 0.0)


def test_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=11
    )
    critic = ValueModel.of(transformers.LlamaForCausalLM(config))
    assert critic(*sequences(rows())).shape == (3, 5)
    total, _ = ValueObjective(ppo())(critic, rows())
    total.backward()
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_beside_adapters_the_trunk_stays_frozen() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=11
    )
    policy = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj"]))
    critic = ValueModel.of(policy)
    nn.init.normal_(critic.head.weight)
    total, _ = ValueObjective(ppo())(critic, rows())
    total.backward()
    trained = {name for name, parameter in critic.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in critic.named_parameters() if "lora_" in name or name == "head.weight"}
    assert len(trained) == 3


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"critic: got a Linear, expected a Transformer or a causal language model"):
        ValueModel(nn.Linear(3, 3))


def test_explained_variance() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, torch.nan]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 4), 2.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(1, 4), mask) == 0.0
