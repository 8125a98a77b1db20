"""TopK, BatchTopK and thresholds on dense pre-activations, against masks made by sorting."""

import pytest
import torch
from effml_eval.sae.sparsifiers import batch_topk_codes, kth_largest, stable_topk, threshold_codes, topk_codes
from effml_shared.errors import ConfigError, NonFiniteError
from hypothesis import given, settings
from hypothesis import strategies as st

P = torch.tensor([[3.0, 1.0, 0.0], [0.5, 2.0, 4.0]], dtype=torch.float64)


def naive_topk(p, k):
    """Keep, row by row, the first k of a stable falling order that are above 0."""
    out = torch.zeros_like(p)
    for row, target in zip(p.tolist(), out, strict=True):
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]:
            target[i] = max(row[i], 0.0)
    return out


def test_batch_topk_of_the_worked_example():
    assert batch_topk_codes(P, 1).dense().tolist() == [[3, 0, 0], [0, 0, 4]]
    assert batch_topk_codes(P, 1.5).dense().tolist() == [[3, 0, 0], [0, 2, 4]]
    assert batch_topk_codes(P, 0.01).dense().tolist() == [[0, 0, 0], [0, 0, 4]]  # at least one
    few = torch.tensor([[1.0, -1.0, 0.0], [-2.0, 0.0, 0.0]])
    assert batch_topk_codes(few, 2).dense().tolist() == [[1, 0, 0], [0, 0, 0]]
    assert batch_topk_codes(-P, 2).values.shape == (2, 0)


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(1, 7), st.integers(0, 2**32 - 1), st.data())
def test_topk_is_the_naive_one_with_ties(rows, concepts, seed, data):
    k = data.draw(st.integers(1, concepts))
    p = torch.randint(-2, 4, (rows, concepts), generator=torch.Generator().manual_seed(seed)).double()
    codes = topk_codes(p, k)
    assert torch.equal(codes.dense(), naive_topk(p, k))
    assert codes.values.shape == (rows, k)
    values, indices = stable_topk(p, k)
    everything = p.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, everything.values[:, :k])
    assert torch.equal(indices, everything.indices[:, :k])


def test_limits():
    p = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(topk_codes(p, 8).dense(), p.relu())
    for row in p:
        assert torch.equal(batch_topk_codes(row[None], 3).dense(), topk_codes(row[None], 3).dense())
    assert torch.equal(threshold_codes(p, 0.0).dense(), p.relu())
    assert torch.equal(threshold_codes(p, -1.0).dense(), p.relu())
    assert torch.equal(threshold_codes(p, 0.5).dense(), torch.where(p > 0.5, p, 0.0))
    assert topk_codes(p.reshape(5, 1, 8), 2).values.shape == (5, 1, 2)


@pytest.mark.parametrize("codes", [lambda p: topk_codes(p, 2), lambda p: batch_topk_codes(p, 1.5)])
def test_gradients_reach_what_is_kept_and_positive(codes):
    p = torch.tensor([[1.0, 3.0, -1.0], [-1.0, -2.0, 0.5], [-1.0, 0.0, -3.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(3, 3)
    (codes(p).dense() * weight).sum().backward()
    assert torch.equal(p.grad, weight * (p.detach() > 0))
    off = p.detach() - 0.1  # finite differences need to stay off the kink at 0
    assert torch.autograd.gradcheck(lambda q: codes(q).dense(), (off.requires_grad_(),))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([1e-300, 1e-30, 0.1, 0.1 + 1e-17, 1.0, 1.0 + 2**-20, 3.0, 1e30]), max_size=12))
def test_kth_largest_is_that_of_sorting(numbers):
    for dtype in (torch.float64, torch.float32):
        values = torch.tensor(numbers, dtype=dtype)
        values = values[values > 0]
        order = values.sort(descending=True).values.tolist()
        found = [kth_largest(values, k) for k in range(1, len(order) + 2)]
        assert found == [*order, 0.0]


@pytest.mark.parametrize("k", [0, -1, 4, 1.5])
def test_impossible_widths_are_refused(k):
    with pytest.raises(ConfigError, match=r"k: got"):
        topk_codes(P, k)
    if k != 1.5:
        with pytest.raises(ConfigError, match=r"k: got"):
            batch_topk_codes(P, k)
    with pytest.raises(ConfigError, match=r"k: got"):
        topk_codes(torch.tensor(1.0), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_what_is_not_finite_is_named_and_not_ranked(dtype, bad):
    """The bits of NaN are above those of every number, and with its sign set no integer of theirs is a float's."""
    for values in ([bad], [1.0, bad, 2.0]):
        with pytest.raises(NonFiniteError, match=r"^pre-activations: got NaN or infinity"):
            kth_largest(torch.tensor(values, dtype=dtype), 1)
        with pytest.raises(NonFiniteError, match=r"^pre-activations: got NaN or infinity"):
            batch_topk_codes(torch.tensor([values], dtype=dtype), 1)
    if bad != torch.inf:
        with pytest.raises(NonFiniteError, match=r"^pre-activations: got NaN,"):
            threshold_codes(torch.tensor([[1.0, bad]], dtype=dtype), 0.5)
        assert bool(topk_codes(torch.tensor([[1.0, bad]], dtype=dtype), 1).values.isnan().all())
    assert batch_topk_codes(torch.tensor([[1.0, -torch.inf]], dtype=dtype), 1).dense().tolist() == [[1, 0]]


def test_zeros_of_either_sign_rank_last():
    assert kth_largest(torch.tensor([-0.0, 2.0, 0.0, -0.0]), 1) == 2.0
    assert kth_largest(torch.tensor([-0.0, 2.0, 0.0, -0.0]), 2) == 0.0
