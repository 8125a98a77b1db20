import pytest
import torch
from effml_quant.instability.gain_lint import lint_gains
from effml_shared.errors import ConfigError
from torch import nn


def test_the_lint_recommends_what_collapses_and_only_that():
    model = nn.Sequential(nn.LayerNorm(64), nn.LayerNorm(64), nn.LayerNorm(64))
    nn.init.uniform_(model[0].weight, 0.88, 0.99)
    nn.init.uniform_(model[1].weight, 0.3, 1.6)
    lint = lint_gains(model, ["mxfp8_e4m3", "mxfp4"])
    assert lint.exempt("mxfp8_e4m3") == ["0.weight"]  # the third holds ones, which are exact
    assert lint.exempt("mxfp8_e4m3", "rceil") == []
    assert "0.weight" in lint.exempt("mxfp4")
    finding = lint.findings[0]
    gain = model[0].weight.detach().double()
    assert finding.bias == pytest.approx(float((0.875 / gain - 1).mean()))
    assert finding.error == pytest.approx(float((0.875 / gain - 1).square().mean().sqrt()))
    assert [(row["format"], row["scale rule"]) for row in lint.table()] == [
        (fmt, rule) for fmt in ("mxfp8_e4m3", "mxfp4") for rule in ("floor", "rceil")
    ]
    assert lint.table()[0]["to exempt"] == 1
    assert lint_gains(model.state_dict() | {"norm.weight": torch.zeros(4)}, ["mxfp4"]).findings[0].bias == 0
    with pytest.raises(ConfigError, match="did you mean"):
        lint_gains(model, ["mxfp9"])
    with pytest.raises(ConfigError, match="gains of norms"):
        lint_gains(nn.Linear(2, 2))
