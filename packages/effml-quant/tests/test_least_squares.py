import statistics

import pytest
import torch
from effml_quant import Quantizer
from effml_quant.experiments.least_squares import Problem, Quadratic, RowMethod, Rows, TwoLayers, train_rows
from effml_quant.qat import RAT, STE, cast_weights, evaluate
from effml_shared.runs import Run

INT4 = Quantizer("int4", granularity="channel")
RATES = (0.01, 0.03, 0.1)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", {"experiment": "quant.lotion", "preset": "smoke"}, "")


def train(run, how, seeds, steps=1500, rates=RATES, name="quadratic/x", draws=4):
    return train_rows(
        run, name, lambda: Quadratic(seeds, 300, 1.1), how, INT4, learning_rates=rates, steps=steps, draws=draws
    )


def best(found, key="rtn"):
    """Return each seed's loss at its best learning rate."""
    rates = [min(range(len(found["rtn"])), key=lambda i: found["rtn"][i][s]) for s in range(len(found["rtn"][0]))]
    return [found[key][i][seed] for seed, i in enumerate(rates)]


@pytest.mark.parametrize("problem", [Quadratic(3, 7, 1.1), TwoLayers(3, 5, 1.1, 4)], ids=["quadratic", "two layers"])
def test_the_curvature_is_the_gauss_newton_diagonal(problem):
    """Gauss-Newton of 1/2 sum_i h_i (f_i - w*_i)^2: the sum over outputs i of h_i (df_i / dw)^2."""
    for rows, g in problem.curvatures():
        for seed in range(3):

            def output(w, rows=rows, seed=seed):
                weight = rows.weight.detach().clone()
                weight[seed] = w
                full = torch.func.functional_call(Prediction(problem), {name_of(problem, rows): weight}, ())
                return full[seed]

            jacobian = torch.autograd.functional.jacobian(output, rows.weight.detach()[seed])
            h = problem.curvature if isinstance(problem, Quadratic) else problem.spectrum
            torch.testing.assert_close(g[seed], (h[:, None] * jacobian.square()).sum(0))


class Prediction(torch.nn.Module):
    """What a problem compares with its target."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def forward(self):
        p = self.problem
        return p.rows() if isinstance(p, Quadratic) else (p.second()[:, None] @ p.first().unflatten(1, (4, -1)))[:, 0]


def name_of(problem, rows):
    return next(f"problem.{name}.weight" for name, module in problem.named_modules() if module is rows)


def test_the_loss_of_two_layers_is_the_published_example():
    problem = TwoLayers(1, 2, 1.0, 2)
    with torch.no_grad():
        problem.first.weight.copy_(torch.tensor([[0.70, -0.25, 0.15, 0.40]]))
        problem.second.weight.copy_(torch.tensor([[0.35, -0.14]]))
    problem.target, problem.spectrum = torch.tensor([[1.0, -1.0]]).double(), torch.tensor([1.0, 0.5]).double()
    assert problem.losses().item() == pytest.approx(0.4844860625, rel=1e-7)


def test_seeds_and_learning_rates_do_not_touch_each_other(run):
    together = train(run, RowMethod(STE(INT4)), 3, steps=40)
    alone = train(run, RowMethod(STE(INT4)), 2, steps=40, rates=(0.03,), name="quadratic/y")
    assert together["rtn"][1][:2] == pytest.approx(alone["rtn"][0], rel=1e-12)
    assert together["full"][1][:2] == pytest.approx(alone["full"][0], rel=1e-12)


def test_a_detached_penalty_and_randomised_rounding_run_and_leave_rows_alone(run):
    for name, how in {"a": RowMethod(RAT(INT4)), "b": RowMethod(strength=1.0, through_scale=False)}.items():
        found = train(run, how, 2, steps=10, name=f"quadratic/{name}")
        assert all(len(found[key]) == 3 and len(found[key][0]) == 2 for key in ("rtn", "rr", "full"))


def test_evaluation_serves_rows():
    problem = Quadratic(2, 30, 1.1)
    weights = cast_weights(problem, INT4, filter=lambda name, module: isinstance(module, Rows))
    loss = evaluate(problem, lambda p: p.losses().sum(), INT4, filter=lambda name, module: isinstance(module, Rows))
    expected = 0.5 * (problem.curvature * (weights["rows.weight"] - problem.target).square()).sum()
    assert loss == pytest.approx(expected.item())
    assert isinstance(problem, Problem)


@pytest.mark.slow
def test_lotion_beats_every_baseline_on_the_quadratic_on_every_seed(run):
    methods = {
        "PTQ": RowMethod(),
        "QAT": RowMethod(STE(INT4)),
        "RAT": RowMethod(RAT(INT4)),
        "1": RowMethod(strength=1.0),
    }
    methods["0.3"] = RowMethod(strength=0.3)
    found = {name: train(run, how, 10, name=f"quadratic/{name}", draws=200) for name, how in methods.items()}
    rtn = {name: best(result) for name, result in found.items()}
    assert rtn["PTQ"][:3] == pytest.approx([0.0605, 0.0563, 0.0465], abs=1e-4)
    assert rtn["0.3"][:3] == pytest.approx([0.0229, 0.0243, 0.0236], abs=2e-4)
    assert rtn["QAT"][:3] == pytest.approx([0.0859, 0.0687, 0.0535], rel=0.06)
    assert rtn["1"][:3] == pytest.approx([0.0225, 0.0241, 0.0222], rel=0.06)
    to_qat, to_ptq, to_weaker = (
        [ours / theirs for ours, theirs in zip(rtn["1"], rtn[name], strict=True)] for name in ("QAT", "PTQ", "0.3")
    )
    assert max(to_qat) < 0.8
    assert max(to_ptq) <= 1.01
    assert statistics.median(to_qat) <= 0.6
    assert statistics.median(to_ptq) <= 0.75
    assert statistics.median(to_weaker) == pytest.approx(1.0, abs=0.1)
    for a, b in zip(rtn["1"], best(found["1"], "rr"), strict=True):
        assert b == pytest.approx(a, rel=0.01)  # on the grid
    assert all(1.65 < b / a < 2.5 for a, b in zip(rtn["PTQ"], best(found["PTQ"], "rr"), strict=True))


def test_the_quadratic_at_reduced_size(run):
    found = {
        name: train(run, how, 3, steps=300, name=f"quadratic/{name}", rates=(0.1,))
        for name, how in {"PTQ": RowMethod(), "QAT": RowMethod(STE(INT4)), "LOTION": RowMethod(strength=1.0)}.items()
    }
    for ptq, qat, ours in zip(*(found[name]["rtn"][0] for name in ("PTQ", "QAT", "LOTION")), strict=True):
        assert ours < 0.8 * qat
        assert ours < ptq
