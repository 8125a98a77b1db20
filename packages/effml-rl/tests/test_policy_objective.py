"""The loss of a policy: exact gradients, whatever the micro-batches, padding, and rows that were left out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from effml_rl.aggregation import count_terms
from effml_rl.policy_config import PolicyConfig
from effml_rl.policy_objective import PolicyObjective
from effml_rl.policy_passes import policy_logps, select
from effml_rl.rollout_batch import completion_mask
from effml_shared.errors import ConfigError
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor

F64 = torch.float64
END = 2
KINDS: list[dict[str, Any]] = [
    {"loss": "ppo", "reduction": "token_mean", "kl_loss": 0.1, "entropy": 0.05, "mismatch": "truncate"},
    {"loss": "ppo", "reduction": "seq_mean_token_mean", "kl_loss": 0.1, "kl_kind": "k2"},
    {"loss": "ppo", "reduction": "seq_mean_token_sum", "mismatch": "mask", "mismatch_level": "sequence"},
    {"loss": "ppo", "reduction": "dr_grpo", "dual_clip": 3.0},
    {"loss": "gspo"},
    {"loss": "cispo"},
    {"loss": "sapo", "kl_loss": 0.1, "kl_kind": "k3+"},
]


def transformer(dtype: torch.dtype = F64, vocab: int = 11) -> Transformer:
    config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24, vocab_size=vocab)
    return Transformer(config, seed=3).to(dtype)


def rows(batch: int = 6, *, old: bool = True, tail: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    ids = torch.randint(3, 11, (batch, 6), generator=generator)
    for row in range(1, batch):  # the first is cut off
        ids[row, row % 5] = END
        ids[row, row % 5 + 1 :] = tail
    mask, _ = completion_mask(ids, END)
    prompt = torch.arange(3) >= (torch.arange(batch) % 3)[:, None]
    result = {
        "prompt_ids": torch.randint(3, 11, (batch, 3), generator=generator),
        "prompt_mask": prompt,
        "completion_ids": ids,
        "loss_mask": mask,
        "advantages": noise(batch, 1),
        "left_out": torch.zeros(batch, dtype=F64),
        "ref_logps": -2 + 0.3 * noise(batch, 6),
        "sampler_logps": -2.4 + 0.3 * noise(batch, 6),
    }
    return {**result, "old_logps": -2.4 + 0.3 * noise(batch, 6)} if old else result


def objective(**fields: Any) -> PolicyObjective:
    return PolicyObjective(PolicyConfig(**{"max_completion": 6, "epochs": 2, **fields}))


def gradient(loss: PolicyObjective, given: dict[str, Tensor], micro_batch: int | None = None) -> Tensor:
    """The gradient of one `GradientStep`, as the change of the weights under SGD with rate 1."""
    model = transformer()
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    GradientStep(model, torch.optim.SGD(model.parameters(), lr=1.0), loss, micro_batch=micro_batch)(given, Plan(1))
    return before - torch.cat([p.detach().flatten() for p in model.parameters()])


def test_on_policy_the_gradient_is_minus_advantage_grad_logp() -> None:
    given = rows(old=False)
    model = transformer()
    logps = policy_logps(model, given, temperature=1.0).logps
    mask = given["loss_mask"]
    by_hand = -(given["advantages"] * logps)[mask].sum() / mask.sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(by_hand, list(model.parameters()))])
    got = gradient(objective(epochs=1, reduction="token_mean"), given)
    torch.testing.assert_close(got, expected, atol=1e-15, rtol=1e-13)


def test_on_policy_the_ratio_is_exactly_one() -> None:
    loss, given = objective(epochs=1, reduction="token_mean"), rows(old=False)
    total, count = loss(transformer(torch.float32), given)
    mask = given["loss_mask"]
    expected = -(given["advantages"].expand_as(mask))[mask].sum()
    assert int(count) == int(mask.sum())
    torch.testing.assert_close(total.detach().double(), expected, atol=1e-12, rtol=0)


def test_all_sequences_weighted_by_probability_give_the_gradient_of_the_expected_reward() -> None:
    """Two tokens out of three, so nine completions; oracle of an exact policy gradient."""
    model = transformer(vocab=3)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=2)))
    reward = torch.tensor([0.0, 1, 3, 2, 5, 1, 0, 0, 4], dtype=F64)
    given = {
        "prompt_ids": torch.ones(9, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(9, 2, dtype=torch.bool),
        "completion_ids": sequences,
        "loss_mask": torch.ones(9, 2, dtype=torch.bool),
        "left_out": torch.zeros(9),
    }
    probability = policy_logps(model, given, temperature=1.0).logps.sum(1).exp()
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0, dtype=F64))
    parameters = list(model.parameters())
    expected = torch.autograd.grad((probability * reward).sum(), parameters, retain_graph=True)
    given["advantages"] = (probability.detach() * reward).unsqueeze(1)
    loss = objective(epochs=1, reduction="seq_mean_token_sum")
    total, _ = loss(model, given)
    for ours, exact in zip(torch.autograd.grad(-total, parameters), expected, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: f"{fields['loss']}-{fields.get('reduction')}")
def test_micro_batches_order_and_padding_change_nothing(fields: dict[str, Any]) -> None:
    given = rows()
    expected = gradient(objective(**fields), given)
    assert expected.abs().max() > 1e-4
    for micro_batch in (1, 2, 4):
        torch.testing.assert_close(gradient(objective(**fields), given, micro_batch), expected, atol=1e-12, rtol=0)
    shuffled = select(given, torch.tensor([3, 0, 5, 1, 4, 2]))
    torch.testing.assert_close(gradient(objective(**fields), shuffled, 2), expected, atol=1e-12, rtol=0)
    padded = {
        name: torch.nn.functional.pad(t, (4, 0) if name.startswith("prompt_") else (0, 3))
        if t.ndim == 2 and t.shape[1] > 1
        else t
        for name, t in given.items()
    }
    torch.testing.assert_close(gradient(objective(**fields), padded, 3), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("fields", [f for f in KINDS if "kl_loss" not in f], ids=lambda fields: fields["loss"])
def test_rows_without_advantage_may_be_left_out(fields: dict[str, Any]) -> None:
    given = rows()
    given["advantages"][[1, 2, 5]] = 0.0
    expected = gradient(objective(**fields), given)
    kept = select(given, torch.tensor([0, 3, 4]))
    others = given["loss_mask"][[1, 2, 5]]
    kept["left_out"][0] = count_terms(others, objective(**fields).config.token_reduction)
    torch.testing.assert_close(gradient(objective(**fields), kept, 2), expected, atol=1e-13, rtol=0)


def test_what_follows_the_end_changes_no_bit() -> None:
    results = [gradient(objective(**KINDS[0]), rows(tail=tail)) for tail in (7, 8)]
    assert results[0].equal(results[1])


def test_the_end_itself_is_learnt() -> None:
    given = rows(old=False)
    without = {**given, "loss_mask": given["loss_mask"] & (given["completion_ids"] != END)}
    loss = {"epochs": 1, "reduction": "token_mean"}
    assert not gradient(objective(**loss), given).allclose(gradient(objective(**loss), without))


def test_a_rank_without_rows_adds_nothing() -> None:
    loss, given = objective(**KINDS[0]), rows()
    model = transformer()
    total, count = loss(model, select(given, torch.zeros(0, dtype=torch.int64)))
    total.backward()
    assert (float(total.detach()), float(count)) == (0.0, 0.0)
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


def test_metrics_are_means_over_tokens() -> None:
    given, results = rows(), []
    for micro_batch in (None, 1, 4):
        loss = objective(**KINDS[0])
        gradient(loss, given, micro_batch)
        results.append(loss.metrics())
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-7)  # shares are means in float32
    names = {"entropy", "kl_k1", "kl_k3", "mismatch_ratio", "mismatch_weight", "ratio", "ratio_max", "old_kl"}
    assert set(results[0]) == names | {"clip_low", "clip_high"}
    mask = given["loss_mask"]
    raw = (given["old_logps"] - given["sampler_logps"])[mask].exp()
    assert results[0]["mismatch_ratio"] == pytest.approx(raw.mean().item())
    assert results[0]["mismatch_weight"] == pytest.approx(raw.clamp(max=2).mean().item())
    loss = objective(**KINDS[0])
    assert set(loss.metrics()) == set(results[0])  # a rank without rows must know the names
    assert set(objective(epochs=1, log_entropy=False).metrics()) == set()


def test_mismatch_without_the_samplers_numbers_is_named() -> None:
    given = rows()
    del given["sampler_logps"]
    with pytest.raises(ConfigError, match=r"mismatch: got rollouts without sampler_logps"):
        objective(**KINDS[0])(transformer(), given)
