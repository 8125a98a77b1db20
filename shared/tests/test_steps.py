import math

import pytest
import torch
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep, faster_precision
from effml_shared.tree import read_tree, write_tree
from torch import nn


def masked_squares(model, batch):
    """A sum over unmasked rows and their number: ragged, as token losses are."""
    error = (model(batch["x"]).squeeze(-1) - batch["y"]) ** 2
    return (error * batch["mask"]).sum(), batch["mask"].sum()


def make(dtype=torch.float64, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    return GradientStep(model, optimizer(model.parameters(), lr=0.01), masked_squares, **options)


def batch(rows=8, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator, dtype=dtype)
    mask = torch.tensor([1.0, 1.0, 0.0] * rows)[:rows].to(dtype)
    return {"x": x, "y": x.sum(1).sin(), "mask": mask}


def weights(step):
    return torch.cat([p.detach().reshape(-1).double() for p in step.model.parameters()])


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 8, 100])
def test_accumulation_is_one_big_batch(micro):
    whole, pieces = make(), make(micro_batch=micro)
    for seed in range(5):
        a, b = whole(batch(seed=seed), Plan(8)), pieces(batch(seed=seed), Plan(8))
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-12)
    torch.testing.assert_close(weights(whole), weights(pieces), rtol=1e-10, atol=1e-12)


def test_it_is_the_plain_torch_loop():
    step = make(clip_norm=0.5)
    reference = make()
    model, optimizer = reference.model, reference.optimizer
    for seed in range(4):
        loss_sum, count = masked_squares(model, batch(seed=seed))
        (loss_sum / count).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.3
        optimizer.step()
        optimizer.zero_grad()
        metrics = step(batch(seed=seed), Plan(8, lr_factor=0.3))
        assert metrics["loss"] == pytest.approx(float(loss_sum.detach() / count), rel=1e-12)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-12)
        assert metrics["tokens"] == float(count)
        assert metrics["lr"] == pytest.approx(0.003)
    torch.testing.assert_close(weights(step), weights(reference), rtol=1e-10, atol=1e-12)


def test_groups_keep_their_own_rates_and_tensor_rates_are_filled_in_place():
    model = nn.Linear(2, 1)
    rate = torch.tensor(0.1)
    groups = [{"params": [model.weight], "lr": rate}, {"params": [model.bias], "lr": 0.5}]
    step = GradientStep(model, torch.optim.SGD(groups), lambda m, x: (m(x).sum(), torch.tensor(len(x))))
    step(torch.ones(3, 2), Plan(3, lr_factor=0.5))
    assert float(rate) == pytest.approx(0.05)
    assert step.optimizer.param_groups[1]["lr"] == 0.25


def test_state_travels_through_a_file_and_the_next_update_is_the_same(tmp_path):
    step = make()
    for seed in range(3):
        step(batch(seed=seed), Plan(8))
    write_tree(tmp_path / "s", step.state_dict())
    other = make()
    other.load_state_dict(read_tree(tmp_path / "s"))
    for seed in range(3, 6):
        assert step(batch(seed=seed), Plan(8)) == other(batch(seed=seed), Plan(8))
    assert torch.equal(weights(step), weights(other))


def test_the_state_of_another_model_is_refused_in_one_line():
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        make().load_state_dict({"model": {"0.weight": torch.zeros(2, 2)}, "optimizer": {}, "precision": "float32"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("poison", ["x", "y"])
def test_nothing_is_updated_when_a_number_is_not_finite(poison):
    step = make()
    bad = batch()
    bad[poison][0] = math.nan if poison == "x" else math.inf
    before = weights(step)
    with pytest.raises(NonFiniteError, match=r"gradient of 0\.weight \(4 of 4 tensors\)"):
        step(bad, Plan(8))
    assert torch.equal(before, weights(step))
    assert all(p.grad is None for p in step.model.parameters())
    assert math.isfinite(step(batch(), Plan(8))["loss"])


def test_a_batch_without_terms_or_rows_updates_nothing_but_decay():
    step = make(optimizer=torch.optim.SGD)
    before = weights(step)
    nothing = batch()
    nothing["mask"].zero_()
    assert step(nothing, Plan(8))["loss"] == 0.0
    assert step(batch(rows=0), Plan(0))["loss"] == 0.0
    assert torch.equal(before, weights(step))


def test_frozen_models_and_detached_losses_are_named():
    step = make()
    other = nn.Linear(5, 1).double()
    step.loss = lambda model, batch: (other(batch["x"]).sum(), torch.tensor(1.0))
    with pytest.raises(ConfigError, match="no parameter received a gradient"):
        step(batch(), Plan(8))
    step.loss = masked_squares
    step.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter frozen"):
        step(batch(), Plan(8))


@pytest.mark.parametrize(
    ("option", "value"), [("micro_batch", 0), ("clip_norm", 0.0), ("clip_norm", -1.0), ("precision", "fp16")]
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ConfigError, match=option):
        make(**{option: value})


def test_a_plan_may_switch_precision_for_one_step():
    seen = []

    def loss(model, batch):
        output = model(batch["x"])
        seen.append(output.dtype)
        return (output.float() ** 2).sum(), torch.tensor(len(output))

    step = make(dtype=torch.float32, precision="float32")
    step.loss = loss
    step(batch(dtype=torch.float32), Plan(8, precision="bfloat16"))
    step(batch(dtype=torch.float32), Plan(8))
    step.evaluate([batch(dtype=torch.float32)])
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_evaluation_is_the_mean_over_terms_and_leaves_the_mode():
    step = make()
    batches = [batch(rows, seed=rows) for rows in (3, 8, 1)]
    sums = [masked_squares(step.model, b) for b in batches]
    want = sum(float(s.detach()) for s, _ in sums) / sum(float(c) for _, c in sums)
    step.model.eval()
    assert step.evaluate(batches)["loss"] == pytest.approx(want, rel=1e-12)
    assert not step.model.training


def test_compiled_is_eager():
    eager, fast = make(), make(compile=True)
    for seed in range(3):
        a, b = eager(batch(seed=seed), Plan(8)), fast(batch(seed=seed), Plan(8))
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
    torch.testing.assert_close(weights(eager), weights(fast), rtol=1e-10, atol=1e-12)
    assert set(fast.state_dict()["model"]) == set(eager.state_dict()["model"])


def test_without_a_compiler_it_says_so_and_runs(monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda name: None)
    step = make(compile=True)
    assert "no C++ compiler" in caplog.text
    assert math.isfinite(step(batch(), Plan(8))["loss"])


def test_measuring_precision_disturbs_nothing():
    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    model(torch.randn(2, 5)).sum().backward()
    gradients, random_state = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    assert faster_precision(model, masked_squares, batch(dtype=torch.float32), repeats=1) in ("float32", "bfloat16")
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
