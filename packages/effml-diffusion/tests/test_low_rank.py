from __future__ import annotations

import pytest
import torch
from effml_diffusion.low_rank import LowRank, LowRankConfig, linear_layers
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer, TransformerConfig
from torch import nn

CONFIG = LowRankConfig(rank=3, dropout=0.0)


def transformer(tied: bool = False) -> Transformer:
    return Transformer(TransformerConfig(n_layers=2, d_model=16, n_heads=2, d_ff=16, vocab_size=6, tied=tied))


def test_is_a_scaled_product_that_starts_at_zero() -> None:
    adapter = LowRank(4, 5, LowRankConfig(rank=3, alpha=6.0, dropout=0.0)).double()
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    assert not adapter(x).any()
    torch.nn.init.normal_(adapter.up.weight)
    torch.testing.assert_close(adapter(x), 2.0 * x @ (adapter.up.weight @ adapter.down.weight).T)
    assert [*map(tuple, (p.shape for p in adapter.parameters()))] == [(3, 4), (5, 3)]


def test_inputs_are_dropped_in_training_alone() -> None:
    adapter = LowRank(4, 5, LowRankConfig(rank=3, dropout=0.5))
    torch.nn.init.normal_(adapter.up.weight)
    x = torch.ones(1, 64, 4)
    assert len(adapter(x).unique(dim=1)[0]) > 1
    assert len(adapter.eval()(x).unique(dim=1)[0]) == 1


def test_wide_weights_work_on_a_narrow_input() -> None:
    adapter = LowRank(4, 5, CONFIG)
    torch.nn.init.normal_(adapter.up.weight)
    x = torch.randn(2, 4).bfloat16()
    assert torch.equal(adapter(x), adapter(x.float()))


def test_layers_are_found_by_the_last_part_of_their_names() -> None:
    model = transformer()
    projections = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkv"]
    assert list(linear_layers(model, CONFIG)) == [*projections, "lm_head"]
    assert list(linear_layers(model, LowRankConfig(head=False))) == projections
    assert list(linear_layers(model, LowRankConfig(head=False, targets=".*_proj"))) == [
        f"model.layers.{i}.{name}_proj"
        for i in range(2)
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    assert list(linear_layers(transformer(tied=True), CONFIG)) == projections  # a tied head is no module


def test_what_matches_nothing_is_refused() -> None:
    message = r"^targets: got 'att_proj', expected to match one of down_proj, gate_proj, k_proj, lm_head, o_proj"
    with pytest.raises(ConfigError, match=message):
        linear_layers(transformer(), LowRankConfig(targets="att_proj"))
    with pytest.raises(ConfigError, match=r"^targets: got .* expected to match one of no layers$"):
        linear_layers(nn.ModuleDict({"q_proj": nn.Bilinear(1, 1, 1)}), CONFIG)


def test_bad_fields_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^rank: got 0, expected an integer of at least 1$"):
        LowRankConfig(rank=0)
    with pytest.raises(ConfigError, match=r"^dropout: got 1\.0, expected a number in \[0, 1\)$"):
        LowRankConfig(dropout=1.0)
    with pytest.raises(ConfigError, match=r"^targets: got '\*', expected a regular expression$"):
        LowRankConfig(targets="*")
