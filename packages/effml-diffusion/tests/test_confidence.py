"""Confidence sampling: laws it keeps and laws it breaks, and samplers written row by row, position by position."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers import Confidence, Decoding
from effml_diffusion.samplers.scores import top_prob
from effml_shared.errors import ConfigError, NonFiniteError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 4
MASK = VOCAB
TABLE = torch.randn(2, VOCAB + 1, VOCAB + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def neighbours(ids: Tensor) -> Tensor:
    """Logits that depend on both neighbours."""
    return 2 * TABLE[0][ids].roll(1, 1) + TABLE[1][ids].roll(-1, 1)


def distance(ids: Tensor, law: Mapping[tuple[int, ...], float]) -> float:
    """Total variation between the samples' frequencies and a law."""
    found = Counter(map(tuple, ids.tolist()))
    return 0.5 * sum(abs(found[x] / len(ids) - law.get(x, 0.0)) for x in {*found, *law})


@pytest.mark.parametrize(
    ("score", "low", "high"),
    [(name, 0, 0.02) for name in ("margin", "top_prob", "neg_entropy", "random", "position")]
    + [("prob", 0.325, 0.345), (top_prob, 0, 0.02)],
)
def test_scores_of_the_state_keep_the_law_and_scores_of_the_draw_do_not(
    score: Any,
    low: float,
    high: float,
    reference_law: dict[tuple[int, ...], float],
    exact_posterior: Callable[..., Any],
) -> None:
    model = exact_posterior(reference_law)
    init = torch.full((50_000, 3), model.mask_id)
    sampler = Confidence(score, steps=3)
    output = sampler(MaskedDiffusion(model, model.mask_id), init, generator=torch.Generator().manual_seed(0))
    assert low <= distance(output.ids, reference_law) < high
    assert output.n_forwards == model.calls == 3


def test_two_tokens_at_once_are_drawn_as_if_independent(exact_posterior: Callable[..., Any]) -> None:
    law: dict[tuple[int, ...], float] = {(0, 0): 0.5, (1, 1): 0.5}
    model = exact_posterior(law)
    diffusion, init = MaskedDiffusion(model, model.mask_id), torch.full((20_000, 2), model.mask_id)
    generator = torch.Generator().manual_seed(0)
    assert distance(Confidence(steps=1)(diffusion, init, generator=generator).ids, law) == pytest.approx(0.5, abs=0.02)
    assert distance(Confidence(steps=2)(diffusion, init, generator=generator).ids, law) < 0.02
    bounded = Confidence(entropy_bound=0.1)(diffusion, init, generator=generator)
    assert distance(bounded.ids, law) < 0.02
    assert bounded.n_forwards == 2
    generous = Confidence(entropy_bound=math.log(2))(diffusion, init, generator=generator)
    assert generous.n_forwards == 1


def entropy(p: Tensor) -> float:
    return -sum(float(x * x.log()) for x in p if x > 0)


def score_by_hand(name: str, p: Tensor, position: int) -> float:
    first, second = sorted(p.tolist(), reverse=True)[:2]
    by_name = {"margin": first - second, "top_prob": first, "prob": first, "position": -position}
    return -entropy(p) if name == "neg_entropy" else by_name[name]


def greedy_by_hand(
    init: Tensor,
    *,
    score: str,
    steps: int = 0,
    block_length: int | None = None,
    threshold: float | None = None,
    entropy_bound: float | None = None,
) -> Tensor:
    """Decode greedily, one row after the other, as the public loops do."""
    ids = init.clone()
    for row in ids:
        masks = (row == MASK).nonzero().flatten().tolist()
        width = block_length or max(1, len(masks))
        blocks = [masks[i : i + width] for i in range(0, len(masks), width)]
        for b, block in enumerate(blocks):
            budget = steps // len(blocks) + (b < steps % len(blocks))
            step = 0
            while block:
                p = neighbours(row[None])[0, :, :VOCAB].softmax(-1)
                block = sorted(block, key=lambda i: (-score_by_hand(score, p[i], i), i))
                if threshold is not None:
                    take = max(1, sum(score_by_hand(score, p[i], i) > threshold for i in block))
                elif entropy_bound is not None:
                    entropies = [entropy(p[i]) for i in block]
                    sums = [sum(entropies[: k + 1]) - max(entropies[: k + 1]) for k in range(len(block))]
                    take = max(1, sum(value <= entropy_bound for value in sums))
                else:
                    take = -(-len(block) // (budget - step))
                step += 1
                for i in block[:take]:
                    row[i] = p[i].argmax()
                block = block[take:]
    return ids


@st.composite
def inits(draw: st.DrawFn) -> Tensor:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    cell = st.one_of(st.just(MASK), st.just(MASK), st.integers(0, VOCAB - 1))
    init = torch.tensor([[draw(cell) for _ in range(length)] for _ in range(rows)])
    init[0, 0] = MASK
    return init


SCORE = st.sampled_from(["margin", "top_prob", "prob", "neg_entropy", "position"])


@given(inits(), SCORE, st.one_of(st.none(), st.integers(1, 4)), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_fixed_counts_row_by_row(init: Tensor, score: str, block_length: int | None, more: int) -> None:
    steps = -(-int((init == MASK).sum(1).max()) // (block_length or 99)) + more
    sampler = Confidence(score, steps=steps, block_length=block_length, temperature=0.0)
    output = sampler(MaskedDiffusion(neighbours, MASK), init)
    assert torch.equal(output.ids, greedy_by_hand(init, score=score, steps=steps, block_length=block_length))


@given(inits(), SCORE, st.one_of(st.none(), st.integers(1, 4)), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_entropy_bound_row_by_row(init: Tensor, score: str, block_length: int | None, bound: float) -> None:
    sampler = Confidence(score, entropy_bound=bound, block_length=block_length, temperature=0.0)
    output = sampler(MaskedDiffusion(neighbours, MASK), init)
    expected = greedy_by_hand(init, score=score, entropy_bound=bound, block_length=block_length)
    assert torch.equal(output.ids, expected)


@given(inits(), SCORE.filter(lambda name: name != "position"), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_threshold_row_by_row(init: Tensor, score: str, threshold: float) -> None:
    output = Confidence(score, threshold=threshold, temperature=0.0)(MaskedDiffusion(neighbours, MASK), init)
    assert torch.equal(output.ids, greedy_by_hand(init, score=score, threshold=threshold))


def test_steps_that_reveal_nothing_run_nothing() -> None:
    diffusion, init = MaskedDiffusion(neighbours, MASK), torch.full((2, 3), MASK)
    assert Confidence(steps=50)(diffusion, init).n_forwards == 3
    assert Confidence(counts=[0, 2, 0, 1])(diffusion, init).n_forwards == 2
    assert Confidence(steps=50, counts="schedule")(diffusion, init).n_forwards <= 3
    assert Confidence(threshold=-1.0)(diffusion, init).n_forwards == 1
    assert Confidence(threshold=2.0)(diffusion, init).n_forwards == 3


def test_counts_are_those_asked_for() -> None:
    init = torch.full((1, 22), MASK)
    for options, expected in (
        ({"steps": 4}, [6, 6, 5, 5]),
        ({"steps": 4, "counts": "schedule"}, [6, 5, 6, 5]),
        ({"counts": [1, 20, 9]}, [1, 20, 1]),
        ({"steps": 4, "block_length": 11}, [6, 5, 6, 5]),
    ):
        output = Confidence(history=True, **options)(MaskedDiffusion(neighbours, MASK), init)
        assert output.history is not None
        assert (-(output.history == MASK).sum((1, 2)).diff()).tolist() == expected


def test_orders_without_logits_read_the_winners_only() -> None:
    read = []

    class Spy(MaskedDiffusion):
        def logits(self, *args: Any, at: Tensor | None = None, **kwargs: Any) -> Tensor:
            assert at is not None
            read.append(len(at))
            return super().logits(*args, at=at, **kwargs)

    init = torch.full((2, 8), MASK)
    for score, expected in (("random", [4] * 4), ("position", [4] * 4), ("margin", [16, 12, 8, 4])):
        read.clear()
        Confidence(score, steps=4)(Spy(neighbours, MASK), init)
        assert read == expected


def test_no_step_waits_for_a_count() -> None:
    """Sizes are known to the host beforehand: nothing is counted by `nonzero`, for which a GPU would have to answer."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten.nonzero.default
            return func(*args, **(kwargs or {}))

    for score, guidance in (("margin", 0.0), ("random", 0.0), ("prob", 0.5)):
        with Counting():
            Confidence(score, steps=4, guidance=guidance)(MaskedDiffusion(neighbours, MASK), torch.full((2, 8), MASK))


def test_left_to_right_is_left_to_right() -> None:
    output = Confidence("position", steps=5, history=True)(MaskedDiffusion(neighbours, MASK), torch.full((2, 5), MASK))
    assert output.history is not None
    for step, ids in enumerate(output.history):
        assert (ids == MASK).tolist() == [[i >= step for i in range(5)]] * 2


def test_the_network_is_told_the_time_of_the_share_of_masks() -> None:
    told = []

    def model(ids: Tensor, t: Tensor) -> Tensor:
        told.append(t.tolist())
        return neighbours(ids)

    diffusion = MaskedDiffusion(model, MASK, time_conditioning="time", schedule="polynomial_mask(2)")
    Confidence(steps=2)(
        diffusion, torch.tensor([[MASK] * 4, [1, MASK, MASK, 2]]), fixed=torch.zeros(2, 4, dtype=torch.bool)
    )
    assert told[0] == pytest.approx([1.0, 0.5**0.5])
    assert told[1] == pytest.approx([0.5**0.5, 0.5])


def test_nan_ends_with_an_error_in_every_mode() -> None:
    def model(ids: Tensor) -> Tensor:
        return torch.full((*ids.shape, VOCAB + 1), math.nan)

    init = torch.full((2, 3), MASK)
    for options in ({"steps": 2}, {"threshold": 0.5}, {"entropy_bound": 1.0}, {"steps": 2, "temperature": 0.0}):
        with pytest.raises(NonFiniteError, match=r"logits: got NaN"):
            Confidence(**options)(MaskedDiffusion(model, MASK), init)


def test_bad_arguments_are_refused() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, r"steps: got none, expected one of"),
        ({"steps": 2, "threshold": 0.5}, r"steps: got steps, threshold, expected one of"),
        ({"steps": 0}, r"steps: got 0"),
        ({"steps": 2, "score": "magic"}, r"score: got 'magic'"),
        ({"steps": 2, "counts": "odd"}, r"counts: got 'odd'"),
        ({"steps": 2, "block_length": 0}, r"block_length: got 0"),
        ({"counts": [1], "block_length": 2}, r"block_length: got one with explicit counts"),
        ({"entropy_bound": -1.0}, r"entropy_bound: got -1.0"),
        ({"threshold": 0.5, "score": "random"}, r"threshold: got one for score 'random'"),
    ]
    for options, message in bad:
        with pytest.raises(ConfigError, match=message):
            Confidence(**options)
    init = torch.full((1, 4), MASK)
    with pytest.raises(ConfigError, match=r"score: got shape \(1, 5\) from the function, expected \(1,\)"):
        Confidence(lambda logits: logits[:1], steps=1)(MaskedDiffusion(neighbours, MASK), init[:, :1])
    with pytest.raises(ConfigError, match=r"steps: got 1, expected at least one for each of 2 blocks"):
        Confidence(steps=1, block_length=2)(MaskedDiffusion(neighbours, MASK), init)


def test_callbacks_see_every_step() -> None:
    seen = []

    def callback(step: int, state: Decoding) -> None:
        seen.append((step, state.n_forwards, int(state.masked.sum())))

    Confidence(steps=2)(MaskedDiffusion(neighbours, MASK), torch.full((1, 4), MASK), callback=callback)
    assert seen == [(0, 1, 2), (1, 2, 0)]
