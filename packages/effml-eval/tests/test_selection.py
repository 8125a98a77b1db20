"""Selection by tiles and by screening finds what the whole matrix of pre-activations shows."""

import pytest
import torch
import torch.nn.functional as F
from effml_eval.sae import native, selection
from effml_eval.sae.sparsifiers import batch_topk_codes, threshold_codes, topk_codes
from effml_shared.errors import NonFiniteError
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    monkeypatch.setattr(selection, "_TILE", 96)  # several tiles, whose width is no multiple of what C compares at once


@pytest.fixture(params=["bfloat16", "float32", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    monkeypatch.setattr(selection, "_multiplies_bfloat16", lambda: request.param == "bfloat16")
    return request.param


def case(rows, concepts, dim, seed=0, spread=0.0):
    """Return float32 tensors whose pre-activations are far enough apart for float32 to order them as float64 does."""
    g = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(rows, dim, generator=g), dim=1)
    scale = torch.exp(spread * torch.randn(concepts, 1, generator=g))
    return (
        x,
        F.normalize(torch.randn(concepts, dim, generator=g), dim=1) * scale,
        0.1 * torch.randn(concepts, generator=g),
    )


def exactly(x, weight, bias):
    return x.double() @ weight.double().T + bias.double()


CASES = [(17, 300, 32), (1, 96, 5), (5, 40, 3), (70, 1000, 48), (3, 1, 7)]


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("size", CASES)
def test_topk(path, size, spread):
    tensors = case(*size, spread=spread)
    k = min(7, size[1])
    codes, expected = selection.topk(*tensors, k), topk_codes(exactly(*tensors), k)
    assert torch.equal(codes.indices, expected.indices)
    torch.testing.assert_close(codes.values.double(), expected.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", CASES)
def test_batch_topk_and_threshold(path, size):
    tensors = case(*size)
    k = min(5.3, size[1])
    codes, expected = selection.batch_topk(*tensors, k), batch_topk_codes(exactly(*tensors), k)
    assert torch.equal(codes.dense() > 0, expected.dense() > 0)
    torch.testing.assert_close(codes.dense().double(), expected.dense(), rtol=1e-5, atol=1e-6)
    values = expected.values[expected.values > 0]
    for threshold in (0.0, -1.0, float(values.median()) + 1e-4, 1e9):
        codes, expected = selection.above_threshold(*tensors, threshold), threshold_codes(exactly(*tensors), threshold)
        assert torch.equal(codes.indices, expected.indices)
        torch.testing.assert_close(codes.values.double(), expected.values, rtol=1e-5, atol=1e-6)


def test_a_value_equal_to_the_threshold_is_left_out(path):
    x, weight, bias = torch.ones(2, 4), torch.eye(4), torch.tensor([0.0, 1.0, -0.5, -2.0])
    assert selection.above_threshold(x, weight, bias, 1.0).dense().tolist() == [[0, 2, 0, 0]] * 2


def test_ties_fall_to_the_lowest_concept(path):
    """Rows of zeros leave the biases alone, which tie everywhere: screening must give up and the plain form serve."""
    x, weight, _ = case(4, 2000, 8)
    x[1:3] = 0.0
    bias = torch.full((2000,), 0.5)
    codes = selection.topk(x, weight, bias, 3)
    assert codes.indices[1:3].tolist() == [[0, 1, 2]] * 2
    assert codes.values[1:3].tolist() == [[0.5] * 3] * 2
    assert torch.equal(codes.indices[::3], topk_codes(exactly(x, weight, bias), 3).indices[::3])
    assert int((selection.above_threshold(x, weight, bias, 0.4).values > 0).sum(1)[1]) == 2000
    assert selection.batch_topk(x[1:3], weight, bias, 3).values.shape == (2, 2000)  # all are equal to the least kept


def test_few_or_no_positive_entries(path):
    x, weight, bias = case(6, 200, 16)
    codes = selection.topk(x, weight, bias - 0.4, 50)
    expected = topk_codes(exactly(x, weight, bias - 0.4), 50)
    assert int((codes.values > 0).sum()) == int((expected.values > 0).sum()) < 6 * 50
    assert torch.equal(codes.indices, expected.indices)
    assert float(selection.topk(x, weight, bias - 9, 5).values.abs().sum()) == 0
    assert selection.batch_topk(x, weight, bias - 9, 5).values.shape == (6, 0)
    few = selection.batch_topk(x, weight, bias - 0.4, 50)
    assert torch.equal(few.dense() > 0, exactly(x, weight, bias - 0.4) > 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_weights_that_are_not_finite_show(path, bad):
    x, weight, bias = case(6, 200, 16)
    weight[3] = bad
    codes = selection.topk(x, weight, bias, 4)
    expected = topk_codes(x @ weight.T + bias, 4)
    torch.testing.assert_close(codes.values, expected.values, equal_nan=True)


def test_no_rows(path):
    x, weight, bias = case(0, 200, 16)
    assert selection.topk(x, weight, bias, 4).values.shape == (0, 4)
    assert selection.batch_topk(x, weight, bias, 4).values.shape == (0, 0)
    assert selection.above_threshold(x, weight, bias, 0.1).values.shape == (0, 0)


@pytest.mark.parametrize("guess", [0.2, 3.0])
def test_a_bad_guess_of_the_bound_changes_nothing(path, monkeypatch, guess):
    tensors = case(40, 500, 32)
    expected = selection.batch_topk(*tensors, 4)
    found = iter([guess])
    real = selection.kth_largest
    monkeypatch.setattr(selection, "kth_largest", lambda values, k: next(found, None) or real(values, k))
    codes = selection.batch_topk(*tensors, 4)
    assert torch.equal(codes.dense(), expected.dense())


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-8, 8), st.floats(-3, 3))
def test_the_margin_holds_at_any_scale(seed, size, spread):
    """No pre-activation is further from its bfloat16 product than the margin says."""
    x, weight, bias = case(5, 60, 24, seed, spread)
    x = x * 10.0**size
    screen = selection._Screen.of(x, weight, bias)
    approximate = (screen.rounded_x @ screen.rounded_weight.T).float() + bias
    off = (approximate.double() - exactly(x, weight, bias)).abs()
    assert bool((off <= screen.margins[:, None] + screen.relative * approximate.abs()).all())


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_diverged_encoder_ends_the_search(path, bad, part):
    """Neither NaN nor infinity has a bound that can be lowered to it: the search must say so, not go on."""
    x, weight, bias = case(6, 200, 16)
    (weight if part == "weight" else bias)[3] = bad
    p = x @ weight.T + bias
    if not bool(p.isnan().any() or (p == torch.inf).any()):  # a bias of -inf switches a concept off
        assert bool((selection.batch_topk(x, weight, bias, 4).indices != 3).all())
        return
    with pytest.raises(NonFiniteError, match=r"^pre-activations: got NaN"):
        selection.batch_topk(x, weight, bias, 4)
    if bool(p.isnan().any()):
        with pytest.raises(NonFiniteError, match=r"^pre-activations: got NaN"):
            selection.above_threshold(x, weight, bias, 0.1)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e18])
def test_a_bound_that_was_guessed_too_high_is_lowered_in_few_rounds(path, monkeypatch, scale):
    """Rows that are sampled for the guess are 10^12 times as large as the others, in which most of the codes are."""
    x, weight, bias = case(200, 300, 16)
    x = x * scale
    x[:: 200 // 64] *= 1e12
    rounds = []
    real = selection._above
    monkeypatch.setattr(selection, "_above", lambda *tensors: rounds.append(1) or real(*tensors))
    codes, expected = (
        selection.batch_topk(x, weight, 0 * bias, 100),
        batch_topk_codes(exactly(x, weight, 0 * bias), 100),
    )
    assert len(rounds) <= 12
    assert torch.equal(codes.dense() > 0, expected.dense().float() > 0)
