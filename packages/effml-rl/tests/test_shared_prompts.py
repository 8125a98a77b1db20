"""Prompts that are read once: the same log-probabilities and gradients as those that are read with every completion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_rl.policy_passes import policy_logps, select, sequences
from effml_rl.shared_prompts import shared_prompt_logps, worth_sharing
from effml_rl.token_logps import token_logps
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

F64 = torch.float64


def transformer(**fields: Any) -> nn.Module:
    config = TransformerConfig(**{"n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "vocab_size": 11, **fields})
    return Transformer(config, seed=3).to(F64)


def llama(**fields: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=11, **fields)).to(F64)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=32)
    return transformers.GPT2LMHeadModel(config).to(F64).eval()


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def rows(padded: bool = True, completion: int = 5) -> dict[str, Tensor]:
    """Seven completions of three prompts, neither in order nor equally many."""
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([4, 0, 4, 2, 4, 0, 4])
    prompts = torch.randint(0, 11, (5, 6), generator=generator)
    real = torch.arange(6) >= (torch.tensor([2, 0, 4, 0, 0]) if padded else torch.zeros(5, dtype=torch.int64))[:, None]
    return {
        "prompt_ids": prompts[group],
        "prompt_mask": real[group],
        "completion_ids": torch.randint(0, 11, (7, completion), generator=generator),
        "loss_mask": torch.arange(completion) < torch.tensor([5, 1, 2, 5, 3, 4, 5])[:, None],
        "group": group,
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
@pytest.mark.parametrize("make", [transformer, llama, lora, gpt2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("completion", [1, 5])
@pytest.mark.parametrize("entropy", ["gradient", "value"])
def test_values_and_gradients_are_the_same(make: Any, padded: bool, completion: int, entropy: str) -> None:
    model, given = make(), rows(padded, completion)
    assert worth_sharing(model, given)
    mask, weights = given["loss_mask"], torch.randn(2, 7, completion, dtype=F64)
    results = []
    for found in (
        shared_prompt_logps(model, given, temperature=0.7, chunk=4, entropy=entropy),
        token_logps(model, *sequences(given), temperature=0.7, entropy=entropy),
    ):
        total = (weights[0] * found.logps)[mask].sum()
        if entropy == "gradient":
            total = total + (weights[1] * found.entropy)[mask].sum()
        gradients = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad])
        results.append([found.logps[mask].detach(), found.entropy[mask].detach(), *gradients])
    tolerance = 1e-12 if make in (transformer, gpt2) else 1e-6  # Llama's rotary tables are float32
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_fewer_tokens_are_read() -> None:
    model, given = transformer(), rows()
    read: list[int] = []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    policy_logps(model, given, temperature=1.0)
    assert read == [3 * 6, 7 * 4]
    few = select(given, torch.tensor([0, 1, 3]))  # of three prompts
    assert not worth_sharing(model, few)
    policy_logps(model, few, temperature=1.0)
    assert read[2:] == [3 * 10]


def test_models_that_cannot_are_left_alone() -> None:
    assert worth_sharing(transformer(position="alibi"), rows())

    class Other(Transformer):
        pass

    config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=11)
    assert not worth_sharing(Other(config), rows())
    assert not worth_sharing(nn.Linear(2, 2), rows())
    model: Any = llama()
    assert worth_sharing(model, rows())
    next(
        module for module in model.modules() if hasattr(module, "gradient_checkpointing")
    ).gradient_checkpointing = True
    assert not worth_sharing(model, rows())


@pytest.mark.parametrize("fields", [{"position": "alibi"}, {"n_kv_heads": 1, "qk_norm": "head"}, {"position": "none"}])
def test_variants_of_the_transformer(fields: dict[str, Any]) -> None:
    model, given = transformer(**fields), rows()
    shared = shared_prompt_logps(model, given).logps
    plain = token_logps(model, *sequences(given))
    torch.testing.assert_close(shared[given["loss_mask"]], plain.logps[given["loss_mask"]], atol=1e-12, rtol=0)
