import pytest
import torch
from effml_quant.experiments.lotion_text import LotionExperimentConfig, WindowMLP
from effml_shared.errors import ConfigError
from effml_shared.transformer import TransformerConfig


def test_each_byte_is_predicted_from_the_window_before_it_alone():
    model = WindowMLP(TransformerConfig(d_model=32), window=4, seed=0)
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))

    def loss(ids):
        losses = []
        model.last.register_forward_hook(lambda m, a, logits: losses.append(logits.log_softmax(-1)))
        model(ids, ids)
        return losses[-1]

    before = loss(ids)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    differs = (loss(changed) != before).any(-1)[0]
    assert differs.tolist() == [5 <= i < 9 for i in range(11)]
    out = model(ids)
    assert out.token_count == 11
    torch.testing.assert_close(out.loss_sum, -before[0].gather(1, ids[0, 1:, None]).sum())


def test_equal_seeds_make_equal_models():
    one, two, other = (WindowMLP(TransformerConfig(d_model=8), 2, seed) for seed in (1, 1, 2))
    assert torch.equal(one.first.weight, two.first.weight)
    assert not torch.equal(one.first.weight, other.first.weight)


@pytest.mark.parametrize(
    "field",
    [
        {"format": "int44"},
        {"scales": ["channel"]},
        {"scales": ["tensor", "row"]},
        {"methods": ["PTQ", "QAT"]},
        {"methods": ["PTQ", "QAT", "LOTION", "AWQ"]},
        {"widths": [8]},
        {"widths": [8, 2]},
        {"strength": -1.0},
        {"window": -1},
        {"draws": 0},
        {"calibration": -1},
        {"steps": 0},
    ],
)
def test_wrong_fields_are_named(field):
    with pytest.raises(ConfigError, match=f"^{next(iter(field))}: got"):
        LotionExperimentConfig(**field)
