from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effml_diffusion.flex import Canvas, Flex, FlexMDM, LengthGuidance
from effml_diffusion.flex.interpolant import FlowSchedule
from effml_diffusion.schedules import schedule
from effml_shared.errors import ConfigError, NonFiniteError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

Law = dict[tuple[int, ...], float]

MASK, PAD = 6, 7
"""Of the networks of noise; their tokens are 0 .. 5, and tokens that are given may be others."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_model(seed: int = 0, gap: float = 1.0, counts: int = 0) -> Callable[..., SimpleNamespace]:
    """Random logits and expected counts, whatever the ids; `counts`: a random distribution up to it."""
    stream = generator(seed)

    def model(ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        batch, seq = ids.shape
        logits = torch.randn(batch, seq, 8, generator=stream)
        if counts:
            return SimpleNamespace(logits=logits, gap_logits=torch.randn(batch, seq + 1, counts + 1, generator=stream))
        return SimpleNamespace(logits=logits, gaps=2 * gap * torch.rand(batch, seq + 1, generator=stream))

    return model


def noise(max_length: int = 64, **options: Any) -> FlexMDM:
    return FlexMDM(noise_model(**options), MASK, PAD, max_length, length_multiple=1)


# Lengths alone: one symbol, with the exact expectation of what is missing

LENGTHS = {4: 0.1, 16: 0.4, 32: 0.4, 64: 0.1}
CAPACITY = 96


def missing_posterior(k: Tensor, a: float) -> Tensor:
    """P(n - k = m | k tokens present): (rows, 65), all zero where no length is possible; k (rows,)."""
    n = torch.tensor(list(LENGTHS), dtype=torch.float64)
    p = torch.tensor(list(LENGTHS.values()), dtype=torch.float64)
    lost = n - k[:, None]
    possible = lost >= 0
    lost = lost.clamp(min=0)
    ways = torch.lgamma(n + 1) - torch.lgamma(k[:, None] + 1.0) - torch.lgamma(lost + 1)
    rate = torch.tensor(a, dtype=torch.float64)
    log_weight = p.log() + ways + torch.xlogy(k[:, None], rate) + torch.xlogy(lost, 1 - rate)
    weight = torch.where(possible, log_weight.exp(), 0.0)
    total = weight.sum(1, keepdim=True)
    weight = torch.where(total > 0, weight / total.where(total > 0, 1.0), 0.0)
    return torch.zeros(len(k), 65, dtype=torch.float64).scatter_add(1, lost.long(), weight)


def mean_missing(k: Tensor, a: float) -> Tensor:
    return missing_posterior(k, a) @ torch.arange(65, dtype=torch.float64)


def length_chain(steps: int, kind: str, insert_last: bool = False) -> Tensor:
    """The law of the length (97,) after `steps`, masks that do not fit being dropped all together."""
    k, flow = torch.arange(CAPACITY + 1), FlowSchedule(schedule("linear"))
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    law = torch.zeros(CAPACITY + 1, dtype=torch.float64)
    law[0] = 1.0
    new = torch.arange(CAPACITY + 1, dtype=torch.float64)
    for i in range(steps if insert_last else steps - 1):
        q = flow.hazard(grid[i], grid[i + 1])
        rate = q * mean_missing(k, float(grid[i]))[:, None]
        if kind == "poisson":
            chance = (torch.xlogy(new, rate) - rate - torch.lgamma(new + 1)).exp()
        else:
            if kind == "bernoulli":
                sizes, share = k[:, None] + 1.0, (rate / (k[:, None] + 1.0)).clamp(max=1.0)
                weights = torch.ones(len(k), 1, dtype=torch.float64)[:, None]
            else:
                sizes, share = torch.arange(65.0)[:, None].double(), q.expand(65, 1)
                weights = missing_posterior(k, float(grid[i]))[:, None]
            left = (sizes - new).clamp(min=0)
            log = torch.lgamma(sizes + 1) - torch.lgamma(new + 1) - torch.lgamma(left + 1)
            log = log + torch.xlogy(new, share) + torch.xlogy(left, 1 - share)
            table = torch.where(new <= sizes, log.exp(), 0.0)
            chance = table if kind == "bernoulli" else (weights @ table).squeeze(1)
            if kind == "binomial":
                chance[missing_posterior(k, float(grid[i])).sum(1) == 0, 0] = 1.0
        to = k[:, None] + new.long()
        fits = to <= CAPACITY
        moved = torch.zeros_like(law).scatter_add(0, to[fits], (law[:, None] * chance)[fits])
        law = moved + law * (1 - (chance * fits).sum(1))
    return law


def distances(law: Tensor) -> tuple[float, float]:
    """KL(LENGTHS || law) and total variation."""
    p = torch.zeros_like(law)
    p[list(LENGTHS)] = torch.tensor(list(LENGTHS.values()), dtype=torch.float64)
    some = p > 0
    return float((p[some] * (p[some] / law[some]).log()).sum()), float((p - law).abs().sum() / 2)


def test_expected_missing_tokens_of_one_symbol() -> None:
    for (k, a), total in {
        (0, 0.0): 26.0, (2, 0.25): 11.164186, (4, 0.25): 14.595230, (8, 0.5): 8.197072,
        (16, 0.5): 15.999769, (20, 0.75): 12.0, (32, 0.99): 0.0,
    }.items():  # fmt: skip
        assert float(mean_missing(torch.tensor([k]), a)) == pytest.approx(total, abs=2e-6)


@pytest.mark.parametrize(
    ("steps", "kind", "kl", "tv"),
    [
        (64, "poisson", 0.6169, 0.4430), (256, "poisson", 0.2098, 0.1856),
        (1024, "poisson", 0.0658, 0.0633),
        (64, "bernoulli", 0.6235, None), (256, "bernoulli", 0.2067, None),
        (1024, "bernoulli", 0.0645, None),
    ],
)  # fmt: skip
def test_the_law_of_lengths_for_the_paper_s_sampler(steps: int, kind: str, kl: float, tv: float | None) -> None:
    found = distances(length_chain(steps, kind))
    assert found[0] == pytest.approx(kl, abs=1e-4)
    assert tv is None or found[1] == pytest.approx(tv, abs=1e-4)


def test_thinned_counts_give_exact_lengths_in_four_steps() -> None:
    assert distances(length_chain(4, "binomial", insert_last=True))[1] < 1e-12
    assert distances(length_chain(4, "binomial"))[1] == pytest.approx(0.964, abs=5e-4)


def one_symbol(kind: str) -> FlexMDM:
    """The network of the mixture: expectations spread over all gaps, or a distribution all in the last gap."""

    def model(ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        batch, seq = ids.shape
        logits = torch.zeros(batch, seq, 1)
        posterior = missing_posterior(lengths, float(cond[0]))
        if kind == "binomial":
            nothing = torch.zeros(batch, seq + 1, 65, dtype=torch.float64)
            nothing[..., 0] = 1.0
            impossible = posterior.sum(1) == 0
            posterior[impossible, 0] = 1.0
            nothing[torch.arange(batch), lengths] = posterior
            return SimpleNamespace(logits=logits, gap_logits=nothing.log())
        total = posterior @ torch.arange(65, dtype=torch.float64) / (lengths + 1)
        return SimpleNamespace(logits=logits, gaps=total[:, None].expand(-1, seq + 1))

    return FlexMDM(model, 1, 2, CAPACITY)


@pytest.mark.parametrize(
    ("kind", "steps", "last"), [("poisson", 12, False), ("bernoulli", 12, True), ("binomial", 4, True)]
)
def test_generated_lengths_follow_the_chain(kind: str, steps: int, last: bool) -> None:
    sampler = Flex(steps, mode="vanilla", insertion=kind, insert_last=last, overflow="drop")
    rows = 1500 if kind == "binomial" else 6000
    out = sampler(one_symbol(kind), rows, generator=generator())
    law = length_chain(steps, kind, insert_last=last)
    share = out.lengths.bincount(minlength=CAPACITY + 1) / rows
    noise_level = float((law.clamp(0, 1) * (1 - law) / rows).sqrt().sum()) / 2 * math.sqrt(2 / math.pi)
    assert float((share - law).abs().sum() / 2) < 1.6 * noise_level
    assert bool((out.ids == torch.where(torch.arange(out.ids.shape[1]) < out.lengths[:, None], 0, 2)).all())


# Texts: the exact chain over all states of an enumerated law


def text_chain(model: Any, steps: int, *, order: str, greedy: bool, capacity: int = 3) -> Law:
    """The law of the texts: Binomial reveals, Poisson insertions, dropped where they do not fit."""
    states = [s for k in range(capacity + 1) for s in itertools.product(range(3), repeat=k)]
    ids = torch.tensor([[*s, *[3] * (capacity - len(s))] for s in states])
    lengths = torch.tensor([len(s) for s in states])
    law: Law = {(): 1.0}
    for i in range(steps):
        q, last = 1 / (steps - i), i == steps - 1
        output = model(ids, lengths=lengths, cond=torch.full((len(states),), i / steps))
        table = zip(states, output.logits[..., :2].softmax(-1).tolist(), output.gaps.tolist(), strict=True)
        after: Law = {}
        for state, f, g in table:
            mass = law.get(state, 0.0)
            if not mass:
                continue
            inserted = [((0,) * (len(state) + 1), 1.0)] if last else insertions(g[: len(state) + 1], q, capacity)
            for revealed, chance in reveals(state, f, q, order, greedy):
                for counts, weight in inserted:
                    new = [2] * counts[0]
                    for token, count in zip(revealed, counts[1:], strict=True):
                        new += [token, *[2] * count]
                    key = tuple(new)
                    after[key] = after.get(key, 0.0) + mass * chance * weight
        law = after
    return law


def reveals(
    state: tuple[int, ...], f: list[list[float]], q: float, order: str, greedy: bool
) -> list[tuple[tuple[int, ...], float]]:
    masks = [i for i, token in enumerate(state) if token == 2]
    results = []
    for k in range(len(masks) + 1):
        binomial = math.comb(len(masks), k) * q**k * (1 - q) ** (len(masks) - k)
        if order == "random":
            subsets = list(itertools.combinations(masks, k))
        else:
            subsets = [tuple(sorted(masks, key=lambda i: -abs(f[i][0] - f[i][1]))[:k])]
        for subset in subsets:
            for tokens in itertools.product(range(2), repeat=k):
                if greedy:
                    chance = float(all(t == (f[i][1] > f[i][0]) for i, t in zip(subset, tokens, strict=True)))
                else:
                    chance = math.prod(f[i][t] for i, t in zip(subset, tokens, strict=True))
                new = list(state)
                for i, token in zip(subset, tokens, strict=True):
                    new[i] = token
                if binomial * chance:
                    results.append((tuple(new), binomial * chance / len(subsets)))
    return results


def insertions(g: list[float], q: float, capacity: int) -> list[tuple[tuple[int, ...], float]]:
    room, results = capacity + 1 - len(g), []
    for counts in itertools.product(range(room + 1), repeat=len(g)):
        if sum(counts) <= room:
            terms = [math.exp(-q * x) * (q * x) ** n / math.factorial(n) for x, n in zip(g, counts, strict=True)]
            results.append((counts, math.prod(terms)))
    nothing = (0,) * len(g)
    lost = 1 - sum(weight for _, weight in results)
    return [(counts, weight + lost * (counts == nothing)) for counts, weight in results]


def total_variation(p: Law, q: Law) -> float:
    return sum(abs(p.get(x, 0.0) - q.get(x, 0.0)) for x in {*p, *q}) / 2


@pytest.mark.parametrize(
    ("steps", "greedy", "random", "margin"),
    [
        (64, False, 0.0334, 0.0329),
        (256, False, 0.0087, 0.0085),
        (64, True, 0.1091, 0.1033),
        (256, True, 0.0993, 0.0933),
    ],
)
def test_any_order_gives_the_law_of_the_data_and_the_likeliest_tokens_do_not(
    steps: int, greedy: bool, random: float, margin: float, flex_law: Law, exact_flex_posterior: Callable[..., Any]
) -> None:
    model = exact_flex_posterior(flex_law, 2)
    for order, expected in (("random", random), ("margin", margin)):
        found = text_chain(model, steps, order=order, greedy=greedy)
        assert total_variation(found, flex_law) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_any_order_with_more_room(flex_law: Law, exact_flex_posterior: Callable[..., Any]) -> None:
    model = exact_flex_posterior(flex_law, 2)
    for order, expected in (("random", 0.0376), ("margin", 0.0372)):
        found = text_chain(model, 64, order=order, greedy=False, capacity=5)
        assert total_variation(found, flex_law) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "order", "greedy"),
    [
        ({"score": "random"}, "random", False),
        ({"score": "margin"}, "margin", False),
        ({"mode": "vanilla"}, "random", False),
        ({"score": "margin", "temperature": 0.0}, "margin", True),
    ],
)
def test_generated_texts_follow_the_chain(
    options: dict[str, Any], order: str, greedy: bool, flex_law: Law, exact_flex_posterior: Callable[..., Any]
) -> None:
    model, rows = exact_flex_posterior(flex_law, 2), 10_000
    flex = FlexMDM(model, 2, 3, 3, length_multiple=1)
    out = Flex(8, overflow="drop", **options)(flex, rows, generator=generator())
    assert out.n_forwards == model.calls == 8
    found: Law = {}
    for ids, n in zip(out.ids.tolist(), out.lengths.tolist(), strict=True):
        found[tuple(ids[:n])] = found.get(tuple(ids[:n]), 0.0) + 1 / rows
    assert total_variation(found, text_chain(model, 8, order=order, greedy=greedy)) < 0.02


def test_sampled_tokens_come_close_to_the_data_and_the_likeliest_do_not(
    flex_law: Law, exact_flex_posterior: Callable[..., Any]
) -> None:
    flex = FlexMDM(exact_flex_posterior(flex_law, 2), 2, 3, 3, length_multiple=1)
    found = []
    for temperature in (1.0, 0.0):
        out = Flex(64, overflow="drop", temperature=temperature)(flex, 6000, generator=generator())
        texts = [tuple(ids[:n]) for ids, n in zip(out.ids.tolist(), out.lengths.tolist(), strict=True)]
        found.append(total_variation({x: texts.count(x) / 6000 for x in set(texts)}, flex_law))
    assert found[0] < 0.0329 + 0.02
    assert found[1] > 0.1033 - 0.02


def test_inserting_last_brings_the_law_closer(flex_law: Law, exact_flex_posterior: Callable[..., Any]) -> None:
    flex = FlexMDM(exact_flex_posterior(flex_law, 2, counts=True), 2, 3, 3, length_multiple=1)
    found = []
    for last in (False, True):
        out = Flex(6, insertion="binomial", insert_last=last)(flex, 6000, generator=generator())
        assert out.n_forwards == 6 + last
        texts = [tuple(ids[:n]) for ids, n in zip(out.ids.tolist(), out.lengths.tolist(), strict=True)]
        found.append(total_variation({x: texts.count(x) / 6000 for x in set(texts)}, flex_law))
    assert found[1] < 0.13 < 0.2 < found[0]  # what is left: counts of several gaps drawn independently


# What is given stays


canvases = st.sampled_from(["prompt", "infill", "waypoints", "open", "any"])


@settings(deadline=None, max_examples=40)
@given(
    kind=canvases,
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(["adaptive", "vanilla"]),
    insertion=st.sampled_from(["poisson", "bernoulli", "binomial"]),
    overflow=st.sampled_from(["subset", "drop"]),
    last=st.booleans(),
)
def test_given_tokens_stay_and_closed_gaps_stay_closed(
    kind: str, seed: int, mode: str, insertion: str, overflow: str, last: bool
) -> None:
    stream = generator(seed)
    lengths = torch.randint(0, 5, (32,), generator=stream).tolist()
    rows = [list(range(100, 100 + n)) for n in lengths]  # ids that the network does not have
    canvas = {
        "prompt": lambda: Canvas.prompt(rows),
        "infill": lambda: Canvas.infill([row[:2] for row in rows], [row[2:] for row in rows]),
        "waypoints": lambda: Canvas.waypoints(rows),
        "open": lambda: Canvas.waypoints(rows, open_ends=True),
        "any": lambda: Canvas.prompt(rows),
    }[kind]()
    if kind == "any":
        canvas = Canvas(canvas.ids, canvas.lengths, torch.rand(canvas.closed.shape, generator=stream) < 0.5)
    flex = noise(12, seed=seed, gap=1.5, counts=3 if insertion == "binomial" else 0)
    sampler = Flex(8, mode=mode, insertion=insertion, overflow=overflow, insert_last=last)
    out = sampler(flex, canvas, generator=stream)
    assert bool((out.lengths <= 12).all())
    for i, row in enumerate(rows):
        n = int(out.lengths[i])
        text = out.ids[i].tolist()
        assert set(text[n:]) <= {PAD}
        assert MASK not in text
        assert PAD not in text[:n]
        places = [j for j, token in enumerate(text) if token >= 100]
        assert [text[j] for j in places] == row
        ends = [-1, *places, n]
        for gap in range(len(row) + 1):
            if canvas.closed[i, gap]:
                assert ends[gap + 1] == ends[gap] + 1


def test_prompts_and_infills_are_bit_identical() -> None:
    flex = noise(30)
    out = Flex(16)(flex, Canvas.infill([[1, 2, 3]] * 20, [[4, 5]] * 20), generator=generator())
    assert bool((out.ids[:, :3] == torch.tensor([1, 2, 3])).all())
    tail = torch.stack([row[n - 2 : n] for row, n in zip(out.ids, out.lengths, strict=True)])
    assert bool((tail == torch.tensor([4, 5])).all())
    assert out.lengths.float().mean() > 6
    whole = Flex(16)(flex, Canvas.waypoints([[1], [2]]), generator=generator())
    assert whole.ids.tolist() == [[1], [2]]
    with_masks = Flex(4)(flex, Canvas.waypoints([[1, MASK, 2]] * 50), generator=generator())
    assert not (with_masks.ids == MASK).any()


# Counts of reveals and insertions


@pytest.mark.parametrize("window", [None, (5.0, 4)])
def test_no_more_is_revealed_than_is_masked_even_at_absurd_rates(window: tuple[float, int] | None) -> None:
    flex = noise(24)
    insert = flex.interpolant.insert
    absurd = SimpleNamespace(hazard=lambda t, s: torch.full_like(t, 1e3))
    flex.interpolant = SimpleNamespace(insert=insert, unmask=absurd)  # type: ignore[assignment]
    rows = [list(range(100, 105))] * 10
    out = Flex(6, reveal="poisson", window=window)(flex, Canvas.waypoints(rows), generator=generator())
    for row, n in zip(out.ids.tolist(), out.lengths.tolist(), strict=True):
        assert [token for token in row if token >= 100] == rows[0]
        assert all(token == PAD for token in row[n:])
        assert not {MASK, PAD} & set(row[:n])


@pytest.mark.parametrize("reveal", ["binomial", "poisson"])
@pytest.mark.parametrize("mode", ["adaptive", "vanilla"])
def test_masks_left_for_the_last_step(mode: str, reveal: str) -> None:
    """Of a fixed-length text, the share of masks that is left is 1 / N; with Poisson counts it is more."""
    flex, steps, width, left = noise(40, gap=0.0), 16, 40, []
    canvas = Canvas.waypoints([[MASK] * width] * 200)
    sampler = Flex(steps, mode=mode, reveal=reveal)
    sampler(flex, canvas, callback=lambda i, c: left.append(c.masks(MASK).sum().item()), generator=generator())
    p = 1 / torch.arange(steps, 1, -1).double()
    if reveal == "binomial":
        expected = 1 / steps
    elif mode == "vanilla":
        expected = float((1 - p * torch.exp(-p)).prod())
        assert expected * steps == pytest.approx(2.03, abs=0.3)
    else:
        return
    share = left[-2] / (200 * width)
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / (200 * width)))
    assert left[-1] == 0


def test_a_window_keeps_to_the_left() -> None:
    flex = noise(20, gap=0.0)
    canvas, seen = Canvas.waypoints([[MASK] * 20] * 30), [torch.ones(30, 20, dtype=torch.bool)]
    sampler = Flex(10, window=(2, 3))

    def check(step: int, now: Canvas) -> None:
        before, after = seen[-1], now.masks(MASK)
        opened = before & ~after
        if step < 9:
            assert bool((opened.sum(1) <= 3).all())
            assert bool((before.cumsum(1)[opened] <= 3).all())
        seen.append(after)

    sampler(flex, canvas, callback=check, generator=generator())


def test_positions_are_revealed_in_their_order() -> None:
    flex = noise(12, gap=0.0)
    states: list[Tensor] = []
    Flex(6, score="position")(
        flex, Canvas.waypoints([[MASK] * 12] * 20), callback=lambda _, c: states.append(c.masks(MASK))
    )
    for masks in states:
        assert torch.equal(masks, masks.cummax(1).values)  # once masked, masked to the end
    best = Flex(6, score=lambda logits: logits[:, 0])(flex, Canvas.waypoints([[MASK] * 12] * 2))
    assert not (best.ids == MASK).any()


@pytest.mark.parametrize("overflow", ["subset", "drop"])
def test_overflow_is_cut_and_reported(overflow: str) -> None:
    out = Flex(8, overflow=overflow)(noise(10, gap=9.0), 50, generator=generator())
    assert int(out.lengths.max()) <= 10
    assert bool((out.n_truncated > 0).any())
    if overflow == "subset":
        assert bool((out.lengths == 10).all())
    limited = Flex(8, overflow=overflow)(noise(64, gap=9.0), Canvas.prompt([[1, 2], [3]]), max_length=2)
    assert limited.lengths.tolist()[0] == 2
    nothing = Flex(8)(noise(8), 3, max_length=0)
    assert nothing.lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize("insertion", ["poisson", "bernoulli", "binomial"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("overflow", ["subset", "drop"])
def test_lengths_on_request(insertion: str, last: bool, overflow: str) -> None:
    counts = 3 if insertion == "binomial" else 0
    options: dict[str, Any] = {"insertion": insertion, "insert_last": last, "overflow": overflow}
    target = torch.randint(2, 20, (40,), generator=generator())
    canvas = Canvas.prompt([[1, 2]] * 40)
    exact = Flex(6, **options, guidance=LengthGuidance(target=target))
    assert torch.equal(exact(noise(20, counts=counts), canvas, generator=generator()).lengths, target)
    between = Flex(6, **options, guidance=LengthGuidance(minimum=5, maximum=7))
    out = between(noise(20, counts=counts), canvas, generator=generator())
    assert bool(((out.lengths >= 5) & (out.lengths <= 7)).all())
    means = []
    for tilt in (-1.0, 0.0, 1.0):
        sampler = Flex(6, **options, guidance=LengthGuidance(tilt=tilt))
        means.append(float(sampler(noise(40, counts=counts), canvas, generator=generator()).lengths.float().mean()))
    assert means[0] < means[1] < means[2]


# The record, the network's share, reproducibility


def test_the_trace_replays_the_generation() -> None:
    snapshots: list[Canvas] = []
    canvas = Canvas.infill([[1, 2], [3]], [[4], [5, 5]])
    sampler = Flex(10, trace=True, insert_last=True)
    out = sampler(noise(24), canvas, generator=generator(), callback=lambda _, c: snapshots.append(c))
    assert out.trace is not None
    rows = [[1, 2, 4], [3, 5, 5]]
    for step in range(out.n_forwards):
        for event in (e for e in out.trace if e.step == step):
            if event.event == "reveal":
                assert rows[event.row][event.position] == MASK
                rows[event.row][event.position] = event.token
            else:
                rows[event.row].insert(event.position, event.token)
        now = snapshots[step]
        assert rows == [ids[:n] for ids, n in zip(now.ids.tolist(), now.lengths.tolist(), strict=True)]
    assert rows == [ids[:n] for ids, n in zip(out.ids.tolist(), out.lengths.tolist(), strict=True)]
    assert Flex(4)(noise(8), 1).trace is None


def test_the_network_sees_only_what_is_there() -> None:
    shapes: list[tuple[int, int, int]] = []

    def model(ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        shapes.append((*ids.shape, int(lengths.max())))
        assert bool((ids[torch.arange(ids.shape[1]) >= lengths[:, None]] == PAD).all())
        return noise_model()(ids, lengths, cond)

    Flex(12)(FlexMDM(model, MASK, PAD, 50, length_multiple=4), 6, generator=generator())
    assert shapes[0] == (6, 4, 0)
    assert all(seq == max(4, -(-longest // 4) * 4) for _, seq, longest in shapes)


def test_the_same_generator_gives_the_same_texts_and_nothing_given_changes() -> None:
    canvas = Canvas.prompt([[1, 2], [3]])
    before = [x.clone() for x in (canvas.ids, canvas.lengths, canvas.closed)]
    one, two = (Flex(8)(noise(), canvas, generator=generator(3)) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert all(torch.equal(a, b) for a, b in zip(before, (canvas.ids, canvas.lengths, canvas.closed), strict=True))
    state = torch.get_rng_state()
    Flex(8)(noise(), 4, generator=generator())
    assert torch.equal(state, torch.get_rng_state())


def test_the_likeliest_token_ends_it() -> None:
    logits = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 9.0, 9.0])  # mask and pad are not for drawing

    def model(ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits.expand(*ids.shape, 8), gaps=torch.full((len(ids), ids.shape[1] + 1), 0.4))

    flex = FlexMDM(model, MASK, PAD, 64)
    canvas = Canvas.waypoints([[MASK] * 8] * 50)
    out = Flex(2, final="argmax", reveal="poisson", mode="vanilla")(flex, canvas, generator=generator())
    real = torch.arange(out.ids.shape[1]) < out.lengths[:, None]
    assert bool((out.ids[real] == 1).double().mean() > 0.6)
    cold = Flex(8, temperature=0.0)(flex, canvas, generator=generator())
    assert set(cold.ids.unique().tolist()) == {1, PAD}
    assert set(Flex(8, top_k=2)(flex, canvas, generator=generator()).ids.unique().tolist()) == {1, 2, PAD}
    assert set(Flex(8, top_p=0.3)(flex, canvas, generator=generator()).ids.unique().tolist()) == {1, PAD}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"steps: got 0"),
        ({"steps": 1}, r"steps: got 1, which inserts nothing"),
        ({"mode": "greedy"}, r"mode: got 'greedy'"),
        ({"score": "prob"}, r"score: got 'prob'"),
        ({"temperature": -1.0}, r"temperature: got -1.0"),
        ({"top_k": -1}, r"top_k: got -1"),
        ({"top_p": 0.0}, r"top_p: got 0.0"),
        ({"window": (0.5, 4)}, r"window: got \(0.5, 4\)"),
        ({"final": "last"}, r"final: got 'last'"),
        ({"reveal": "euler"}, r"reveal: got 'euler'"),
        ({"insertion": "gamma"}, r"insertion: got 'gamma'"),
        ({"overflow": "keep"}, r"overflow: got 'keep'"),
    ],
)
def test_wrong_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Flex(**{"steps": 4, **arguments})


def test_wrong_starts_and_networks() -> None:
    flex = noise(4)
    with pytest.raises(ConfigError, match=r"init: got a text of 5 tokens, expected at most max_length, 4"):
        Flex(4)(flex, Canvas.prompt([[1] * 5]))
    with pytest.raises(ConfigError, match=r"init: got pad_id 7 within a text"):
        Flex(4)(flex, Canvas.prompt([[1, PAD]]))
    with pytest.raises(ConfigError, match=r"batch: got 0"):
        Flex(4)(flex, 0)
    with pytest.raises(ConfigError, match=r"max_length: got -1"):
        Flex(4)(flex, 1, max_length=-1)
    with pytest.raises(ConfigError, match=r"insertion: got 'binomial' for a network without gap_logits"):
        Flex(4, insertion="binomial")(flex, 1)
    with pytest.raises(ConfigError, match=r"minimum: got 9, expected at most max_length, 4"):
        Flex(4, guidance=LengthGuidance(minimum=9))(flex, 1)
    for gap in (math.nan, math.inf, -1.0):
        with pytest.raises(NonFiniteError, match=r"gaps: got NaN, infinite or negative"):
            Flex(4)(noise(4, gap=gap), 2)

    def broken(ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            logits=torch.full((*ids.shape, 8), math.nan), gaps=torch.zeros(len(ids), ids.shape[1] + 1)
        )

    with pytest.raises(NonFiniteError, match=r"logits: got NaN"):
        Flex(4)(FlexMDM(broken, MASK, PAD, 4), Canvas.waypoints([[MASK]]))
