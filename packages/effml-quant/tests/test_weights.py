from __future__ import annotations

import copy
import math

import pytest
import torch
from effml_quant import Quantizer, fake_quantize
from effml_quant.qtensor import quantize
from effml_quant.weights import measure, quantize_weights_, what_if
from effml_shared.errors import ConfigError, NonFiniteError
from torch import nn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 40)
        self.up, self.down = nn.Linear(40, 64), nn.Linear(64, 40)
        self.lm_head = nn.Linear(40, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(self.up(self.embed(ids)).relu()))


def test_weights_are_rounded_in_place_and_nothing_else_is():
    model = Tiny()
    before = copy.deepcopy(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    reports = quantize_weights_(model, "mxfp4", scale_rule="rceil")
    assert [report.name for report in reports] == ["up.weight", "down.weight"]
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for name, old in before.named_parameters():
        new = model.get_parameter(name)
        chosen = name in ("up.weight", "down.weight")
        assert torch.equal(new, fake_quantize(old, "mxfp4", scale_rule="rceil") if chosen else old)
        assert new.requires_grad
    model(torch.tensor([1, 2])).sum().backward()


def test_a_report_by_hand():
    x = torch.tensor([7.9, -6.5, 6.0, 4.0, 0.24, -0.1, 0.0, 1.0])
    report = measure(x, "mxfp4", name="x")
    q = fake_quantize(x, "mxfp4")
    assert q.tolist() == [6, -6, 6, 4, 0, 0, 0, 1]
    assert report.relative_error == pytest.approx(float((q - x).norm() / x.norm()))
    assert report.sqnr_db == pytest.approx(10 * math.log10(float(x.square().sum() / (q - x).square().sum())))
    assert (report.name, report.format, report.scale_rule) == ("x", "mxfp4", "floor")
    assert (report.clamped, report.last_code, report.underflow) == (2 / 8, 3 / 8, 2 / 8)
    assert (report.nbytes, report.bits_per_element) == (5, 5.0)


def test_published_shares_of_normal_data():
    torch.manual_seed(0)
    report = measure(torch.randn(4096, 128), "mxfp4")
    assert report.relative_error == pytest.approx(0.11490, abs=6e-6)
    assert report.clamped == pytest.approx(0.02351, abs=6e-6)
    assert report.last_code == pytest.approx(0.05144, abs=6e-6)
    assert report.bits_per_element == 4.25


def test_a_short_block_is_not_filled_with_zeros_that_count():
    report = measure(torch.ones(3, 33) * 6, "mxfp4")
    assert report.last_code == 1
    assert (report.relative_error, report.sqnr_db) == (0, math.inf)


def test_reports_of_integers_and_of_no_scale():
    x = normal(8, 40)
    assert measure(x, "int4", recipe="asymmetric").nbytes == quantize(x, "int4", recipe="asymmetric").nbytes
    assert measure(x, "int8").scale_rule is None
    wide = measure(x, "bfloat16")
    assert (wide.nbytes, wide.bits_per_element, wide.clamped, wide.underflow) == (640, 16, 0, 0)
    assert 0 < wide.relative_error < 2**-8
    zeros = measure(torch.zeros(2, 32), "mxfp4")
    assert (zeros.relative_error, zeros.sqnr_db, zeros.underflow) == (0, math.inf, 0)
    empty = measure(torch.empty(0, 32), "mxfp4")
    assert (empty.relative_error, empty.nbytes, empty.clamped) == (0, 0, 0)
    assert math.isnan(measure(torch.tensor([math.nan, 1.0]), "mxfp4").relative_error)


def test_stochastic_rounding_follows_its_generator():
    models = [Tiny() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        generator = torch.Generator().manual_seed(seed)
        quantize_weights_(model, "mxfp4", rounding="stochastic", scale_rule="rceil", generator=generator)
    assert torch.equal(models[0].up.weight, models[1].up.weight)
    assert not torch.equal(models[0].up.weight, models[2].up.weight)


def test_a_filter_and_a_quantizer():
    model = Tiny()
    reports = quantize_weights_(model, Quantizer("int8", granularity="channel"), lambda name, _: name == "lm_head")
    assert [report.name for report in reports] == ["lm_head.weight"]
    assert reports[0].nbytes == 16 * 40 + 16 * 4


def test_a_failure_changes_nothing():
    model = nn.Sequential(nn.Conv1d(3, 3, 3), nn.Linear(40, 40))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ConfigError, match=r"1.weight: axis: got a tensor of shape \(40, 40\), expected one that has axis 2"
    ):
        quantize_weights_(model, "mxfp4", axis=2)
    with torch.no_grad():
        model[1].weight[0, 0] = before["1.weight"][0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"1.weight: x: got 1 of 1600"):
        quantize_weights_(model, "mxfp4", nonfinite="raise")
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"model: got one without weights to quantise"):
        quantize_weights_(nn.LayerNorm(3), "mxfp4")
    with pytest.raises(ConfigError, match=r"format: got 'mxfp5'"):
        quantize_weights_(model, "mxfp5")


def test_what_if_of_a_tensor():
    x = normal(256, 128)
    rows = what_if(x)
    assert len(rows) == 6 * 3 + 3
    by_name = {(row.format, row.scale_rule): row for row in rows}
    assert by_name["mxfp4", "floor"] == measure(x, "mxfp4")
    errors = [by_name[name, "floor"].relative_error for name in ("mxint8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4")]
    assert errors == sorted(errors)
    assert by_name["nvfp4", None].relative_error < by_name["mxfp4", "even"].relative_error
    assert by_name["mxfp4", "rceil"].clamped == 0


def test_what_if_of_a_model_counts_its_weights_as_one():
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    (row,) = what_if(model, ["mxfp4"], ["floor"])
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    parts = quantize_weights_(model, "mxfp4")
    sizes = [64 * 40, 40 * 64]
    assert row.clamped == pytest.approx(sum(p.clamped * n for p, n in zip(parts, sizes, strict=True)) / sum(sizes))
    assert row.nbytes == sum(p.nbytes for p in parts)
    noise = sum((p.relative_error * before[p.name].norm()) ** 2 for p in parts)
    signal = sum(before[p.name].norm() ** 2 for p in parts)
    assert row.relative_error == pytest.approx(float((noise / signal).sqrt()), rel=1e-5)


def test_what_if_keeps_other_fields_and_refuses_unknown_ones():
    (row,) = what_if(normal(4, 64), ["int4"], block_size=16)
    assert row.nbytes == 4 * 32 + 16 * 4
    with pytest.raises(ConfigError, match=r"scale_rule: got 'best'"):
        what_if(normal(4, 64), ["mxfp4"], ["best"])
