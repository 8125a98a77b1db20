"""SOAP against printed trajectories, invariants, torch's Adam and a naive implementation written differently."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from effml_optim import SOAP
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.testing.optimizers import OptimizerKit
from torch import Tensor, nn
from torch.nn import Parameter

F64 = torch.float64


def wave(k: int, m: int, n: int) -> Tensor:
    """Gradient of call k, 1-based: smooth, dense, of rank at most 4, and different at every call."""
    i, j = torch.arange(1, m + 1, dtype=F64)[:, None], torch.arange(1, n + 1, dtype=F64)
    return torch.sin(1.3 * k * i + 0.7 * j * j) + 0.5 * torch.cos(0.9 * k * j - 1.1 * i)


def gaussian(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ramp(m: int, n: int) -> Parameter:
    return Parameter(0.1 * (3 * torch.arange(m, dtype=F64)[:, None] + torch.arange(n, dtype=F64)))


def run(params: list[Parameter], optimizer: torch.optim.Optimizer, gradients: list[list[Any]]) -> list[Tensor]:
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return [param.detach().clone() for param in params]


class NaiveSOAP:
    """One tensor, the slow way: momentum in original coordinates, sorted bases, sorted second moments."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        wd: float = 0.0,
        shampoo_beta: float | None = None,
        f: int = 3,
        axes: tuple[int, ...] | None = None,
        factorized: bool = False,
        square: bool = False,
        eigh: bool = False,
        normalize: bool = False,
        correct_bias: bool = True,
        torch_eps: bool = False,
    ) -> None:
        self.weight, self.lr, self.betas, self.eps, self.wd, self.f = weight.clone(), lr, betas, eps, wd, f
        self.shampoo_beta = betas[1] if shampoo_beta is None else shampoo_beta
        self.axes = tuple(range(weight.ndim)) if axes is None else axes
        self.factorized, self.square, self.eigh, self.normalize = factorized, square, eigh, normalize
        self.correct_bias, self.torch_eps = correct_bias, torch_eps
        self.factors = {axis: torch.zeros(weight.shape[axis], weight.shape[axis], dtype=F64) for axis in self.axes}
        self.bases: dict[int, Tensor] = {}
        self.m, self.v, self.t = torch.zeros_like(weight), torch.zeros_like(weight), 0
        self.rows, self.cols = weight.new_zeros(weight.shape[0]), weight.new_zeros(weight.shape[-1])

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        for axis, q in self.bases.items():
            x = torch.tensordot(x, q, dims=([axis], [1 if back else 0])).movedim(-1, axis)
        return x

    def average_factors(self, g: Tensor) -> None:
        for axis in self.axes:
            u = g.movedim(axis, 0).reshape(g.shape[axis], -1)
            self.factors[axis] = self.shampoo_beta * self.factors[axis] + (1 - self.shampoo_beta) * u @ u.T

    def step(self, g: Tensor) -> None:
        if not self.bases and self.t == 0:
            self.average_factors(g)
            self.bases = {axis: torch.linalg.eigh(a).eigenvectors.flip(-1) for axis, a in self.factors.items()}
            self.t = 1
            return
        t, (b1, b2) = self.t, self.betas
        self.t += 1
        rotated = self.turn(g)
        self.m = b1 * self.m + (1 - b1) * g
        if self.factorized:
            self.rows = b2 * self.rows + (1 - b2) * rotated.square().sum(1)
            self.cols = b2 * self.cols + (1 - b2) * rotated.square().sum(0)
            v = torch.outer(self.rows, self.cols) / self.rows.sum()
        else:
            v = self.v = b2 * self.v + (1 - b2) * rotated * rotated
        c1, c2 = (1 - b1**t, math.sqrt(1 - b2**t)) if self.correct_bias else (1.0, 1.0)
        n = self.turn(self.turn(self.m) / (v.sqrt() + self.eps * (c2 if self.torch_eps else 1)), back=True)
        if self.normalize:
            n = n / (1e-30 + n.square().mean().sqrt())
        self.weight = self.weight - self.lr * c2 / c1 * n
        self.weight = self.weight - self.lr * self.wd * self.weight
        self.average_factors(g)
        if t % self.f == 0:
            for axis in self.axes:
                self.refresh(axis)

    def refresh(self, axis: int) -> None:
        a, q = self.factors[axis], self.bases[axis]
        order = torch.diag(q.T @ a @ q).argsort(descending=True, stable=True)
        q = q[:, order]
        self.v = self.v.index_select(axis, order)
        if axis == 0:
            self.rows = self.rows[order]
        elif self.factorized:
            self.cols = self.cols[order]
        fresh = torch.linalg.eigh(a).eigenvectors.flip(-1) if self.eigh else torch.linalg.qr(a @ q).Q
        if self.square:
            t2 = (q.T @ fresh).square()
            self.v = torch.tensordot(self.v, t2, dims=([axis], [0])).movedim(-1, axis)
            if axis == 0:
                self.rows = t2.T @ self.rows
            elif self.factorized:
                self.cols = t2.T @ self.cols
        self.bases[axis] = fresh


BOOK: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.0, "precondition_frequency": 2}


@pytest.mark.parametrize(
    ("options", "shape", "calls", "expected"),
    [
        (BOOK, (3, 3), 2, ".03036162 .21414503 .26272973 .32384033 .23594977 .67425872 .56964994 .69260825 .68471191"),
        (BOOK, (3, 3), 4, ".16877006 .28196373 .33331751 .24776516 .25708324 .73625596 .44476378 .68882622 .68618095"),
        (BOOK, (3, 3), 8, ".2709473 .3277617 .32699507 .22483909 .2317967 .7653363 .3379702 .68337988 .67666694"),
        (
            {"lr": 0.1, "betas": (0.95, 0.95), "weight_decay": 0.1, "precondition_frequency": 1},
            (3, 3),
            6,
            ".19375463 .3310042 .32073394 .14653013 .23705806 .73544568 .34277933 .65166566 .6353842",
        ),
        (BOOK, (2, 3), 6, ".01544791 .36626648 .20467941 .13259066 .32301239 .66885992"),
        (
            {**BOOK, "factorized": True},
            (3, 3),
            8,
            ".2340918 .4165282 .2924598 .1600303 .29014 .7586047 .2766253 .6130753 .7298908",
        ),
    ],
)
def test_printed_trajectories(options: dict[str, Any], shape: tuple[int, int], calls: int, expected: str) -> None:
    weight = ramp(*shape)
    (end,) = run([weight], SOAP([weight], **options), [[wave(k, *shape)] for k in range(1, calls + 1)])
    numbers = torch.tensor([float(x) for x in expected.split()], dtype=F64).reshape(shape)
    torch.testing.assert_close(end, numbers, rtol=0, atol=5e-7)


NAIVE_CASES: list[tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = [
    ((5, 5), {}, {}),
    ((5, 5), {"basis_update": "cholqr"}, {}),
    ((5, 5), {"basis_update": "eigh"}, {"eigh": True}),
    ((5, 4), {"weight_decay": 0.1, "shampoo_beta": 0.8}, {"wd": 0.1, "shampoo_beta": 0.8}),
    ((5, 5), {"second_moment_transport": "square"}, {"square": True}),
    ((5, 5), {"factorized": True}, {"factorized": True}),
    ((5, 5), {"factorized": True, "second_moment_transport": "square"}, {"factorized": True, "square": True}),
    ((5, 5), {"normalize_grads": True}, {"normalize": True}),
    ((5, 5), {"correct_bias": False}, {"correct_bias": False}),
    ((5, 5), {"eps_mode": "torch", "eps": 0.1}, {"torch_eps": True, "eps": 0.1}),
    ((4, 9), {"one_sided": True}, {"axes": (0,)}),
    ((9, 4), {"one_sided": True, "factorized": True}, {"axes": (1,), "factorized": True}),
    ((4, 4), {"one_sided": True}, {"axes": (0,)}),
    ((9, 4), {"max_precond_dim": 8}, {"axes": (1,)}),
    ((3, 4, 5), {}, {}),
    ((3, 4, 9, 2), {"max_precond_dim": 8}, {"axes": (0, 1, 3)}),
    ((9, 4), {"one_sided": True, "max_precond_dim": 3}, {"axes": ()}),
]


@pytest.mark.parametrize(("shape", "options", "naive"), NAIVE_CASES)
def test_equals_the_naive_implementation_over_fifty_steps(
    shape: tuple[int, ...], options: dict[str, Any], naive: dict[str, Any]
) -> None:
    weight = Parameter(gaussian(0, *shape))
    reference = NaiveSOAP(weight.detach(), **naive)
    optimizer = SOAP([weight], **{**BOOK, "precondition_frequency": 3, **options})
    for k in range(1, 51):
        weight.grad = gaussian(k, *shape)
        reference.step(weight.grad)
        optimizer.step()
        if k == 1:  # where one gradient leaves a null space, eigensolvers may choose its basis as they like
            for axis, basis in reference.bases.items():
                basis.copy_(optimizer.state[weight][f"basis_{axis}"])
    torch.testing.assert_close(weight.detach(), reference.weight, rtol=0, atol=1e-12)


def test_merged_convolutions_equal_the_matrices_they_are_seen_as() -> None:
    kernel = Parameter(gaussian(0, 6, 2, 3, 1))
    last = Parameter(kernel.detach().permute(0, 2, 3, 1).contiguous())
    matrix = Parameter(kernel.detach().reshape(6, 6).clone())
    options: dict[str, Any] = {**BOOK, "merge_dims": "fan_in"}
    optimizers = [
        SOAP([kernel], **options),
        SOAP([last], data_format="channels_last", **options),
        SOAP([matrix], **BOOK),
    ]
    for k in range(1, 10):
        grad = gaussian(k, 6, 2, 3, 1)
        kernel.grad = grad.contiguous(memory_format=torch.channels_last)
        last.grad, matrix.grad = grad.permute(0, 2, 3, 1), grad.reshape(6, 6)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.detach().reshape(6, 6), matrix.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(last.detach().permute(0, 3, 1, 2), kernel.detach(), rtol=0, atol=1e-13)


def test_greedy_merging_warns_when_it_flattens_a_matrix() -> None:
    with pytest.warns(UserWarning, match=r"flattens shape \(4, 4\) to \(16,\)"):
        SOAP([ramp(4, 4)], merge_dims=True)


def test_first_call_only_sets_up_and_the_second_moves_every_rotated_entry_by_lr() -> None:
    weight = ramp(3, 3)
    start = weight.detach().clone()
    optimizer = SOAP([weight], **BOOK)
    (after_first,) = run([weight], optimizer, [[wave(1, 3, 3)]])
    assert torch.equal(after_first, start)
    assert optimizer.state[weight]["step"] == 0
    (after_second,) = run([weight], optimizer, [[wave(2, 3, 3)]])
    assert float((after_second - start).norm()) == pytest.approx(0.1 * 3, rel=1e-6)


def test_normalized_steps_have_known_lengths() -> None:
    weight = ramp(3, 3)
    optimizer = SOAP([weight], normalize_grads=True, **BOOK)
    run([weight], optimizer, [[wave(1, 3, 3)]])
    lengths = []
    for k in (2, 3, 4):
        before = weight.detach().clone()
        run([weight], optimizer, [[wave(k, 3, 3)]])
        lengths.append(float((weight.detach() - before).norm()))
    expected = [0.1 * 3 * math.sqrt(1 - 0.95**t) / (1 - 0.9**t) for t in (1, 2, 3)]
    assert lengths == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx([0.6708204, 0.4930262, 0.4180707], abs=1e-7)


@pytest.mark.parametrize("frequency", [1, 5])
@pytest.mark.parametrize("transport", ["permute", "square"])
def test_rotating_the_problem_rotates_the_trajectory(frequency: int, transport: str) -> None:
    u, v = (torch.linalg.qr(gaussian(seed, 6, 6)).Q for seed in (101, 102))
    plain, turned = Parameter(gaussian(0, 6, 6)), Parameter(u @ gaussian(0, 6, 6) @ v.T)
    options: dict[str, Any] = {
        **BOOK,
        "lr": 0.01,
        "precondition_frequency": frequency,
        "second_moment_transport": transport,
    }
    gradients = [gaussian(k, 6, 6) for k in range(1, 202)]
    (end,) = run([plain], SOAP([plain], **options), [[g] for g in gradients])
    (turned_end,) = run([turned], SOAP([turned], **options), [[u @ g @ v.T] for g in gradients])
    torch.testing.assert_close(turned_end, u @ end @ v.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (5,), ()])
def test_without_factors_it_is_adam_started_one_call_later(shape: tuple[int, ...]) -> None:
    weight = Parameter(gaussian(0, *shape, dtype=torch.float32))
    other = copy.deepcopy(weight)
    gradients: list[list[Tensor | None]] = [[gaussian(k, *shape, dtype=torch.float32)] for k in range(1, 7)]
    options: dict[str, Any] = {**BOOK, "max_precond_dim": 1}
    (end,) = run([weight], SOAP([weight], **options), gradients)
    adam = torch.optim.Adam([other], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    (expected,) = run([other], adam, gradients[1:])
    torch.testing.assert_close(end, expected, rtol=0, atol=5e-7)
    assert not any(key.startswith(("factor", "basis")) for key in SOAP([weight], **options).state[weight])


def test_vectors_get_a_factor_on_demand() -> None:
    weight = Parameter(gaussian(0, 4))
    reference = NaiveSOAP(weight.detach(), f=2)
    optimizer = SOAP([weight], precondition_1d=True, **BOOK)
    for k in range(1, 12):
        weight.grad = gaussian(k, 4)
        optimizer.step()
        reference.step(weight.grad)
        if k == 1:
            reference.bases[0].copy_(optimizer.state[weight]["basis_0"])
    torch.testing.assert_close(weight.detach(), reference.weight, rtol=0, atol=1e-12)


def test_vocabularies_carry_one_factor_only() -> None:
    weight = Parameter(torch.zeros(50257, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = SOAP([weight])
    report = optimizer.memory_report()
    optimizer.step()
    state = optimizer.state[weight]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "factor_1", "basis_1"}
    assert state["factor_1"].shape == (64, 64)
    assert report["total"] == sum(value.nbytes for key, value in state.items() if key != "step")


def test_factorized_sums_agree() -> None:
    weight = ramp(5, 4)
    optimizer = SOAP([weight], factorized=True, **BOOK)
    run([weight], optimizer, [[gaussian(k, 5, 4)] for k in range(9)])
    state = optimizer.state[weight]
    assert float(state["row_sq"].sum() - state["col_sq"].sum()) == pytest.approx(0.0, abs=1e-12)


def test_half_power_shampoo_with_trace_is_adafactor_in_the_eigenbasis() -> None:
    gradients = torch.stack([gaussian(k, 5, 7) * torch.linspace(0.5, 2, 7, dtype=F64) for k in range(500)])
    left = (gradients @ gradients.mT).mean(0)
    right = (gradients.mT @ gradients).mean(0)
    (values_l, q_l), (values_r, q_r) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    g = gradients[0]
    roots = [q @ torch.diag(values.rsqrt()) @ q.T for values, q in ((values_l, q_l), (values_r, q_r))]
    shampoo = left.trace().sqrt() * roots[0] @ g @ roots[1]
    rotated = q_l.T @ gradients @ q_r
    rows, cols = rotated.square().sum(2).mean(0), rotated.square().sum(1).mean(0)
    torch.testing.assert_close(rows, values_l, rtol=1e-12, atol=0)
    torch.testing.assert_close(cols, values_r, rtol=1e-12, atol=0)
    adafactor = q_l @ (rotated[0] / (torch.outer(rows, cols) / rows.sum()).sqrt()) @ q_r.T
    torch.testing.assert_close(shampoo, adafactor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transport", ["permute", "square"])
def test_two_thousand_float32_steps_keep_bases_orthonormal_and_moments_positive(transport: str) -> None:
    weight = Parameter(torch.zeros(8, 6))
    optimizer = SOAP([weight], precondition_frequency=1, second_moment_transport=transport)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2001):
        weight.grad = torch.randn(8, 6, generator=generator)
        optimizer.step()
    state = optimizer.state[weight]
    for axis, n in enumerate((8, 6)):
        basis = state[f"basis_{axis}"]
        assert float((basis.T @ basis - torch.eye(n)).abs().max()) < 1e-5
    assert (state["exp_avg_sq"] >= 0).all()


def test_square_transport_keeps_the_sum_of_second_moments() -> None:
    weight = Parameter(gaussian(0, 6, 5, dtype=torch.float32))
    optimizer = SOAP([weight], second_moment_transport="square", precondition_frequency=1000)
    run([weight], optimizer, [[gaussian(k, 6, 5, dtype=torch.float32)] for k in range(5)])
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    optimizer.refresh_now()
    after = optimizer.state[weight]["exp_avg_sq"]
    assert not torch.allclose(before, after)
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-6)


SHAPES = [(8, 6), (8, 6), (6, 8), (6,), (6,), (), (8, 6), (4, 3, 5), (4, 3, 5), (7, 7), (8, 1), (2, 2, 2, 2)]


@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"refresh_tolerance": 0.3}, {"factorized": True}])
def test_batched_equals_one_by_one_on_a_mixed_bag(options: dict[str, Any]) -> None:
    ends = []
    for foreach in (None, False):
        params = [Parameter(gaussian(i, *shape, dtype=torch.float32)) for i, shape in enumerate(SHAPES)]
        optimizer = SOAP(params, lr=0.01, precondition_frequency=3, foreach=foreach, **options)
        absent = torch.Generator().manual_seed(0)
        for k in range(1, 20):
            grads: list[Tensor | None] = []
            for i, shape in enumerate(SHAPES):  # some start late, some pause
                missing = float(torch.rand((), generator=absent)) < 0.2 or (i == 1 and k < 4)
                grads.append(None if missing else gaussian(100 * k + i, *shape, dtype=torch.float32))
            run(params, optimizer, [grads])
        ends.append([param.detach() for param in params])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


def test_late_parameters_start_on_their_own() -> None:
    early, late = ramp(3, 3), ramp(3, 3)
    optimizer = SOAP([early, late], **BOOK)
    gradients = [wave(k, 3, 3) for k in range(1, 9)]
    run([early, late], optimizer, [[g, None] for g in gradients])
    run([early, late], optimizer, [[None, g] for g in gradients])
    assert torch.equal(early, late)


@pytest.mark.parametrize("frequency", [3, 4, 7])
def test_staggering_refreshes_everyone_once_a_period_and_evenly(frequency: int) -> None:
    params = [Parameter(gaussian(i, 4, 3)) for i in range(5)] + [Parameter(gaussian(i, 5, 5)) for i in range(8)]
    optimizer = SOAP(params, stagger=True, precondition_frequency=frequency)
    history = []
    for k in range(1, 4 * frequency + 2):
        before = [copy.deepcopy(optimizer.state[p]) for p in params] if k > 1 else None
        run(params, optimizer, [[gaussian(100 * k + i, *p.shape) for i, p in enumerate(params)]])
        if before is not None:
            sides = [
                {not torch.equal(old[f"basis_{axis}"], optimizer.state[p][f"basis_{axis}"]) for axis in (0, 1)}
                for old, p in zip(before, params, strict=True)
            ]
            assert all(len(side) == 1 for side in sides)  # both sides of a parameter go together
            history.append([side.pop() for side in sides])
    for start in range(len(history) - frequency + 1):
        window = history[start : start + frequency]
        assert [sum(column) for column in zip(*window, strict=True)] == [1] * len(params)
    for bucket in (slice(0, 5), slice(5, 13)):
        counts = [sum(row[bucket]) for row in history]
        assert max(counts) - min(counts) <= 1


def test_tolerance_decides_side_by_side() -> None:
    weight = ramp(4, 4)
    optimizer = SOAP([weight], refresh_tolerance=0.0, **BOOK)
    run([weight], optimizer, [[gaussian(k, 4, 4)] for k in range(2)])
    stale = optimizer.basis_staleness()["param_groups[0]['params'][0]"]
    assert stale[0] != stale[1]
    optimizer.param_groups[0]["refresh_tolerance"] = 10.0
    before = copy.deepcopy(optimizer.state[weight])
    run([weight], optimizer, [[gaussian(2, 4, 4)]])
    assert torch.equal(before["basis_0"], optimizer.state[weight]["basis_0"])
    run([weight], optimizer, [[gaussian(3, 4, 4)]])
    rho = optimizer.basis_staleness()["param_groups[0]['params'][0]"]
    fresher, staler = sorted(rho, key=lambda axis: rho[axis])
    optimizer.param_groups[0]["refresh_tolerance"] = sum(rho.values()) / 2
    optimizer.param_groups[0]["shampoo_beta"] = 1 - 1e-9  # the factors, and so rho, stay as they are
    run([weight], optimizer, [[gaussian(4, 4, 4)], [gaussian(5, 4, 4)]])
    after = optimizer.state[weight]
    assert rho[fresher] < sum(rho.values()) / 2 < rho[staler]
    changed = {axis: not torch.equal(before[f"basis_{axis}"], after[f"basis_{axis}"]) for axis in (0, 1)}
    assert changed == {fresher: False, staler: True}


def test_refresh_now_lowers_staleness_and_names_parameters() -> None:
    model = nn.Linear(5, 4)
    optimizer = SOAP(model.named_parameters(), precondition_frequency=1000)
    for k in range(20):
        model.weight.grad, model.bias.grad = gaussian(k, 4, 5).float(), gaussian(k, 4).float()
        optimizer.step()
    before = optimizer.basis_staleness()
    assert list(before) == ["weight"]
    for _ in range(30):
        optimizer.refresh_now()
    after = optimizer.basis_staleness()
    assert all(after["weight"][axis] < 0.1 * before["weight"][axis] for axis in (0, 1))


@pytest.mark.parametrize("product_dtype", [None, torch.bfloat16])
def test_tall_matrices_are_updated_block_by_block(monkeypatch: pytest.MonkeyPatch, product_dtype: Any) -> None:
    shape, ends = (2053, 9), []
    for rows in (4096, 100):
        monkeypatch.setattr("effml_optim.soap.ROWS", rows)
        weight = Parameter(gaussian(0, *shape, dtype=torch.float32))
        options: dict[str, Any] = {"max_precond_dim": 20, "weight_decay": 0.1, "product_dtype": product_dtype}
        optimizer = SOAP([weight], precondition_frequency=2, **options)
        ends += run([weight], optimizer, [[gaussian(k, *shape, dtype=torch.float32)] for k in range(5)])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5 if product_dtype is None else 2e-3)


GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]


def test_balanced_staggering_keeps_the_work_of_every_step_alike() -> None:
    params = [Parameter(torch.empty(shape, device="meta")) for _ in range(12) for shape in GPT2]
    optimizer = SOAP(params, stagger=True)
    (group,) = optimizer.param_groups
    layouts = [optimizer.layout(group, param.shape) for param in params]
    phases = optimizer.phases(group, layouts)
    work = [0.0] * 10
    for layout, phase in zip(layouts, phases, strict=True):
        work[phase] += sum(14 / 3 * n**3 + 4 * n * math.prod(layout.shape) for n in layout.shape)
    assert max(work) < 1.25 * sum(work) / 10  # dealt out layout by layout from step 0 on it would be 1.67
    for layout in set(layouts):
        counts = [
            sum(1 for other, phase in zip(layouts, phases, strict=True) if (other, phase) == (layout, p))
            for p in range(10)
        ]
        assert max(counts) - min(counts) <= 1
    assert SOAP(params).phases(group | {"stagger": False}, layouts) == [0] * len(params)


def test_products_in_bfloat16_stay_near_and_leave_the_rest_of_the_state_in_float32() -> None:
    shapes = [(40, 24), (24, 24), (7,)]
    sets = [[Parameter(gaussian(i, *s, dtype=torch.float32)) for i, s in enumerate(shapes)] for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.01, "precondition_frequency": 3}
    optimizers = [SOAP(sets[0], **options), SOAP(sets[1], product_dtype=torch.bfloat16, **options)]
    for k in range(12):
        for params, optimizer in zip(sets, optimizers, strict=True):
            run(params, optimizer, [[gaussian(10 * k + i, *s, dtype=torch.float32) for i, s in enumerate(shapes)]])
    moved = [
        (exact.detach() - gaussian(i, *s)).norm() for i, (exact, s) in enumerate(zip(sets[0], shapes, strict=True))
    ]
    for exact, low, distance in zip(*sets, moved, strict=True):
        assert (exact - low).norm() < 0.1 * distance
    assert torch.equal(sets[0][2], sets[1][2])  # no products, no difference
    state = optimizers[1].state[sets[1][0]]
    assert {key: value.dtype for key, value in state.items() if value.dtype != torch.float32} == {
        "basis_0": torch.bfloat16,
        "basis_1": torch.bfloat16,
    }
    resumed = SOAP([copy.deepcopy(param) for param in sets[1]], product_dtype="bfloat16", **options)
    resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    ends = [
        run(list(optimizer.param_groups[0]["params"]), optimizer, [[gaussian(k, *s).float() for s in shapes]] * 4)
        for k, optimizer in zip((5, 5), (optimizers[1], resumed), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    with pytest.raises(ConfigError, match="product_dtype: got 'float16'"):
        SOAP(sets[0], product_dtype=torch.float16)


def test_the_lean_preset_takes_less_than_adamw_and_what_it_reports() -> None:
    params = [Parameter(gaussian(i, *shape, dtype=torch.float32)) for i, shape in enumerate([(64, 32), (48, 16), (5,)])]
    optimizer = SOAP.lean(params, lr=0.01)
    for k in range(2):
        run(params, optimizer, [[gaussian(k, *p.shape, dtype=torch.float32) for p in params]])
    report = optimizer.memory_report()
    tensors = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert sum(value.numel() * value.itemsize for value in tensors) == report["total"] < report["adamw"]
    gpt2 = [Parameter(torch.empty(shape, device="meta")) for shape in GPT2]
    report = SOAP.lean(gpt2).memory_report()
    assert 0.7 < report["total"] / report["adamw"] < 0.76
    assert SOAP.lean(gpt2, factorized=False).param_groups[0]["factorized"] is False


@pytest.mark.parametrize("shape", [(3, 3), (6, 4), (4, 6), (2, 3, 5)])
def test_the_first_basis_does_not_depend_on_what_the_solver_makes_of_a_null_space(shape: tuple[int, ...]) -> None:
    from effml_optim.matrix import eigenbasis

    gradient = gaussian(1, *shape)[None]
    gradient[:, 0] = 0  # less than full rank on every axis
    real = eigenbasis.symmetric_eigh

    def another_solver(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = real(gram)
        null = int((values < 1e-12 * values.amax()).sum())
        turn = torch.linalg.qr(gaussian(7, null, null)).Q
        turned = torch.cat([vectors[..., :null] @ turn, -vectors[..., null:]], dim=-1)
        return values, turned

    for axis in range(len(shape)):
        basis = eigenbasis.first_basis(gradient, axis)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eigenbasis, "symmetric_eigh", another_solver)
            other = eigenbasis.first_basis(gradient, axis)
        torch.testing.assert_close((basis * other).sum(-2).abs(), torch.ones(1, shape[axis], dtype=F64))
        torch.testing.assert_close(basis.mT @ basis, torch.eye(shape[axis], dtype=F64)[None], rtol=0, atol=1e-12)
        unfolded = gradient[0].movedim(axis, 0).reshape(shape[axis], -1)
        rotated = basis[0].T @ unfolded @ unfolded.T @ basis[0]
        values = torch.linalg.eigvalsh(unfolded @ unfolded.T).flip(0)
        torch.testing.assert_close(rotated, torch.diag(values), rtol=0, atol=1e-12 * float(values[0]))
    dead = eigenbasis.first_basis(torch.zeros(2, 4, 3), 0)
    torch.testing.assert_close(dead.mT @ dead, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-6)


def test_memory_report_needs_no_memory_and_tells_the_truth() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**14, 2**12), nn.Linear(2**12, 2**12))
    assert SOAP(model.parameters()).memory_report()["factors"] == 4 * 3 * 2**24  # 2**14 is above max_precond_dim
    lean = SOAP(model.parameters(), one_sided=True, factorized=True).memory_report()
    assert lean["total"] < lean["adamw"]


def test_bfloat16_parameters_keep_float32_state_through_a_checkpoint() -> None:
    weight = Parameter(gaussian(0, 5, 4, dtype=torch.bfloat16))
    optimizer = SOAP([weight], precondition_frequency=2)
    run([weight], optimizer, [[gaussian(k, 5, 4, dtype=torch.bfloat16)] for k in range(4)])
    state = copy.deepcopy(optimizer.state_dict())
    other = SOAP([copy.deepcopy(weight)], precondition_frequency=2)
    other.load_state_dict(state)
    (loaded,) = other.state.values()
    for key, value in optimizer.state[weight].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, loaded[key])
        assert value.data_ptr() != loaded[key].data_ptr()


def test_double_precision_on_request() -> None:
    weight = Parameter(gaussian(0, 3, 3, dtype=torch.float32))
    optimizer = SOAP([weight], precond_dtype=torch.float64)
    run([weight], optimizer, [[gaussian(k, 3, 3, dtype=torch.float32)] for k in range(3)])
    assert optimizer.state[weight]["basis_0"].dtype == torch.float64
    assert optimizer.param_groups[0]["precond_dtype"] == "float64"


def test_autocast_around_the_step_changes_nothing() -> None:
    ends = []
    for enabled in (False, True):
        weight = Parameter(gaussian(0, 8, 8, dtype=torch.float32))
        optimizer = SOAP([weight], precondition_frequency=2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            ends += run([weight], optimizer, [[gaussian(k, 8, 8, dtype=torch.float32)] for k in range(6)])
            optimizer.refresh_now()
    assert torch.equal(*ends)


def test_gradients_are_not_modified() -> None:
    weight, vector = ramp(3, 3), Parameter(gaussian(0, 3))
    optimizer = SOAP([weight, vector], **BOOK)
    for k in range(4):
        weight.grad, vector.grad = gaussian(k, 3, 3), gaussian(k, 3)
        optimizer.step()
        assert torch.equal(weight.grad, gaussian(k, 3, 3))
        assert torch.equal(vector.grad, gaussian(k, 3))


@pytest.mark.parametrize("call", [0, 3])
def test_non_finite_factors_raise_with_the_name(call: int) -> None:
    model = nn.Linear(3, 4, bias=False)
    optimizer = SOAP(model.named_parameters(), precondition_frequency=1)
    for k in range(call):
        model.weight.grad = gaussian(k, 4, 3).float()
        optimizer.step()
    model.weight.grad = torch.full((4, 3), torch.nan)
    with pytest.raises(NonFiniteError, match="weight: its factor of size 4"):
        optimizer.step()
    if call:
        assert torch.isfinite(optimizer.state[model.weight]["basis_0"]).all()
    else:
        assert not optimizer.state[model.weight]


def test_gradient_scaler_skips_whole_steps() -> None:
    weight = ramp(3, 3)
    optimizer = SOAP([weight], **BOOK)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for k, poison in enumerate((0.0, 0.0, math.inf, 0.0)):
        loss = (weight * (gaussian(k, 3, 3) + poison)).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[weight]["step"] == 2  # the first call sets up, the third is skipped


def test_replicated_dtensors_are_updated_on_every_rank() -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = ramp(3, 3)
        replicated = Parameter(distribute_tensor(plain.detach().clone(), mesh, [Replicate()]))
        optimizers = SOAP([plain], **BOOK), SOAP([replicated], **BOOK)
        for k in range(1, 6):
            plain.grad = wave(k, 3, 3)
            replicated.grad = distribute_tensor(wave(k, 3, 3), mesh, [Replicate()])
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(replicated.full_tensor(), plain)  # type: ignore[attr-defined]
    finally:
        distributed.destroy_process_group()


def test_empty_parameters_are_skipped() -> None:
    empty = Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    SOAP([empty]).step()


def test_loading_refuses_the_state_of_another_shape() -> None:
    small, large = ramp(3, 3), ramp(4, 3)
    optimizer = SOAP([small])
    run([small], optimizer, [[wave(1, 3, 3)]])
    with pytest.raises(Exception, match="exp_avg of parameter 0 has 9 elements, expected 12"):
        SOAP([large]).load_state_dict(optimizer.state_dict())


class TestSOAPConformance(OptimizerKit):
    bad_arguments = (
        ("lr", -1.0),
        ("lr", torch.ones(2)),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("betas", (0.9,)),
        ("betas", (1.0, 0.9)),
        ("shampoo_beta", 1.0),
        ("precondition_frequency", 0),
        ("precondition_frequency", 2.5),
        ("max_precond_dim", -1),
        ("merge_dims", "fan_out"),
        ("merge_dims", 1),
        ("data_format", "NCHW"),
        ("basis_update", "svd"),
        ("second_moment_transport", "none"),
        ("refresh_tolerance", -0.1),
        ("precond_dtype", torch.bfloat16),
        ("capturable", True),
        ("eps_mode", "adam"),
    )

    def make(self, params: Any, **overrides: Any) -> SOAP:
        return SOAP(params, **{"lr": 0.03, "precondition_frequency": 3, **overrides})


class TestStaggeredLeanSOAPConformance(OptimizerKit):
    def make(self, params: Any, **overrides: Any) -> SOAP:
        lean: dict[str, Any] = {"one_sided": True, "factorized": True, "merge_dims": "fan_in"}
        flat = {"stagger": True, "basis_update": "cholqr"}
        return SOAP(params, **{"lr": 0.03, "precondition_frequency": 3, **lean, **flat, **overrides})
