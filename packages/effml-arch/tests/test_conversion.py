from __future__ import annotations

import pytest
import torch
from effml_arch.recurrent.conversion import convert_transformer, set_write_mix
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(n_layers=2, d_model=16, n_heads=2, d_ff=24, vocab_size=20, qk_norm="head")
IDS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))


def test_without_mixture_a_converted_model_is_its_source() -> None:
    source = Transformer(CONFIG).double()
    model = convert_transformer(source, write_mix=0.0)
    results = []
    for each in (source, model):
        loss = each(IDS, labels=IDS).loss_sum
        assert loss is not None
        results.append((loss, torch.autograd.grad(loss, list(each.parameters()))))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_the_mixture_can_be_raised() -> None:
    source = Transformer(CONFIG).double()
    model = convert_transformer(source, write_mix=0.0)
    before = model(IDS).logits
    set_write_mix(model, 1.0)
    torch.testing.assert_close(model(IDS).logits, convert_transformer(source)(IDS).logits, rtol=0, atol=0)
    assert not torch.allclose(model(IDS).logits[..., :20], before[..., :20])


def test_bad_requests_are_refused() -> None:
    source = Transformer(CONFIG)
    with pytest.raises(ConfigError, match=r"without recurrent layers"):
        set_write_mix(source, 1.0)
    for mix in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"write_mix: got"):
            set_write_mix(convert_transformer(source), mix)
        with pytest.raises(ConfigError, match=r"write_mix: got"):
            convert_transformer(source, write_mix=mix)
    with pytest.raises(ConfigError, match=r"causal: got False"):
        convert_transformer(source, causal=False)
