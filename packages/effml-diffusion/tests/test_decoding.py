"""What every sampler owes: fixed tokens, the caller's tensors, rows of their own, reproducibility, clear errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers import Ancestral, Confidence, Decoding, FirstHitting, ReMDM, Sampler
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.transformer import Transformer, TransformerConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

MASK = 5
TABLE = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SAMPLERS: dict[str, Sampler] = {
    "ancestral": Ancestral(steps=7),
    "first hitting": FirstHitting(top_p=0.8),
    "margin": Confidence(steps=4),
    "prob, blocks": Confidence("prob", steps=8, block_length=3),
    "random, guided": Confidence("random", steps=3, guidance=0.7),
    "threshold": Confidence("top_prob", threshold=0.6, temperature=0.5),
    "entropy bound": Confidence("neg_entropy", entropy_bound=0.5, top_k=2),
    "cap": ReMDM(9, "cap", 0.3),
    "conf": ReMDM(9, "conf"),
    "loop": ReMDM(9, "loop", 0.3),
}


def neighbours(ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits that depend on both neighbours; the mask's own are the largest of all."""
    logits = TABLE[0][ids].roll(1, 1) + TABLE[1][ids].roll(-1, 1)
    return logits.index_fill(-1, torch.tensor(MASK), 50.0)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 8))

    def table(cell: st.SearchStrategy[Any]) -> Tensor:
        return torch.tensor([[draw(cell) for _ in range(length)] for _ in range(rows)])

    init = table(st.one_of(st.just(MASK), st.integers(0, MASK - 1)))
    fixed = table(st.booleans()) if draw(st.booleans()) else None
    attention_mask = table(st.sampled_from([0, 1, 1])) if draw(st.booleans()) else None
    init[0, 0] = MASK
    for option in (fixed, attention_mask):
        if option is not None:
            option[0, 0] = option is attention_mask
    return init, fixed, attention_mask


@pytest.mark.parametrize("name", SAMPLERS)
@given(batches(), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_fixed_positions_are_never_touched(
    name: str, batch: tuple[Tensor, Tensor | None, Tensor | None], seed: int
) -> None:
    init, fixed, attention_mask = batch
    copies = [None if x is None else x.clone() for x in batch]
    seen: list[Tensor] = []

    def callback(step: int, state: Decoding) -> None:
        seen.append(state.ids.clone())
        assert torch.equal(state.masked, (state.ids == MASK) & ~state.fixed)

    options: dict[str, Any] = {"fixed": fixed, "attention_mask": attention_mask, "callback": callback}
    diffusion = MaskedDiffusion(neighbours, MASK)
    output = SAMPLERS[name](diffusion, init, generator=torch.Generator().manual_seed(seed), **options)
    kept = init != MASK if fixed is None else fixed
    kept = kept if attention_mask is None else kept | (attention_mask == 0)
    for ids in (*seen, output.ids):
        assert torch.equal(ids[kept], init[kept])
    assert not bool((output.ids[~kept] == MASK).any())
    assert output.ids.dtype == init.dtype
    if "cap" not in name and "conf" not in name and "loop" not in name:  # what is committed stays, if nothing remasks
        assert torch.equal(output.ids[init != MASK], init[init != MASK])
    for before, after in zip(copies, batch, strict=True):
        assert before is None or after is None or torch.equal(before, after)
    again = SAMPLERS[name](diffusion, init, generator=torch.Generator().manual_seed(seed), **options)
    assert torch.equal(again.ids, output.ids)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_with_a_seed_does_not_depend_on_its_batch(name: str) -> None:
    init = torch.full((4, 9), MASK)
    init[1, 2:], init[2, ::2], init[3, :8] = 3, 0, 1
    diffusion = MaskedDiffusion(neighbours, MASK)
    together = SAMPLERS[name](diffusion, init, seeds=[4, 5, 6, 7])
    for row in range(4):
        alone = SAMPLERS[name](diffusion, init[row : row + 1], seeds=[4 + row])
        assert torch.equal(alone.ids[0], together.ids[row])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_id_types_and_strides(dtype: torch.dtype) -> None:
    def model(ids: Tensor) -> Tensor:
        return neighbours(ids.long())

    init = torch.full((6, 3), MASK, dtype=dtype).T
    output = Confidence(steps=3, history=True)(MaskedDiffusion(model, MASK), init, seeds=[1, 2, 3])
    plain = Confidence(steps=3)(MaskedDiffusion(model, MASK), torch.full((3, 6), MASK), seeds=[1, 2, 3])
    assert output.ids.dtype == dtype
    assert torch.equal(output.ids.long(), plain.ids)
    assert output.history is not None
    assert output.history.shape == (4, 3, 6)


def test_padding_is_never_generated_nor_changed() -> None:
    diffusion = MaskedDiffusion(neighbours, MASK, pad_id=2)
    init = torch.full((50, 6), MASK)
    init[:, 5] = 2
    for sampler in (FirstHitting(), ReMDM(9, "cap", 0.9)):
        ids = sampler(diffusion, init, fixed=torch.zeros_like(init, dtype=torch.bool)).ids
        assert not bool((ids[:, :5] == 2).any())
        assert bool((ids[:, 5] == 2).all())


def test_the_network_samples_in_evaluation_mode_and_is_put_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.frozen, self.modes = nn.Dropout(), nn.Dropout().eval(), set[bool]()

        def forward(self, ids: Tensor) -> Tensor:
            self.modes |= {self.training, self.inner.training, self.frozen.training, torch.is_grad_enabled()}
            return neighbours(ids)

    net = Net()
    Confidence(steps=2)(MaskedDiffusion(net, MASK), torch.full((1, 4), MASK))
    assert net.modes == {False}
    assert (net.training, net.inner.training, net.frozen.training) == (True, True, False)


def test_bad_input_is_refused_in_one_line() -> None:
    sampler, diffusion, init = Confidence(steps=2), MaskedDiffusion(neighbours, MASK), torch.full((2, 3), MASK)
    bad: list[tuple[Tensor, dict[str, Any], str]] = [
        (init[0], {}, r"init: got shape \(3,\)"),
        (torch.tensor(MASK), {}, r"init: got shape \(\)"),
        (init.float(), {}, r"init: got shape \(2, 3\) of torch.float32"),
        (init == 0, {}, r"init: got shape \(2, 3\) of torch.bool"),
        (init, {"fixed": torch.zeros(2, 2, dtype=torch.bool)}, r"fixed: got shape \(2, 2\), expected \(2, 3\)"),
        (init, {"fixed": torch.zeros(2, 3)}, r"fixed: got torch.float32, expected torch.bool"),
        (init, {"attention_mask": torch.ones(3)}, r"attention_mask: got shape \(3,\)"),
        (init, {"seeds": [1]}, r"seeds: got 1 of them"),
        (init * 0, {}, r"init: got no mask \(id 5\) to replace"),
        (init[:0], {}, r"init: got no mask"),
        (init[:, :0], {}, r"init: got no mask"),
        (init, {"fixed": init == MASK}, r"init: got no mask"),
        (init, {"attention_mask": torch.zeros(2, 3)}, r"init: got no mask"),
    ]
    for ids, options, message in bad:
        with pytest.raises(ConfigError, match=message) as caught:
            sampler(diffusion, ids, **options)
        assert "\n" not in str(caught.value)
    for arguments, message in (
        ({"temperature": -1.0}, r"temperature: got -1.0"),
        ({"temperature": math.nan}, r"temperature: got nan"),
        ({"top_p": 0.0}, r"top_p: got 0.0"),
        ({"top_k": -1}, r"top_k: got -1"),
        ({"guidance": math.inf}, r"guidance: got inf"),
    ):
        with pytest.raises(ConfigError, match=message):
            FirstHitting(**arguments)


@pytest.mark.parametrize("name", SAMPLERS)
def test_broken_logits_are_an_error_and_no_endless_loop(name: str) -> None:
    def model(ids: Tensor) -> Tensor:
        return neighbours(ids).index_fill(1, torch.tensor([2]), math.nan)

    with pytest.raises(NonFiniteError, match=r"logits: got NaN"):
        SAMPLERS[name](MaskedDiffusion(model, MASK), torch.full((2, 4), MASK))


def test_logits_are_not_written_to() -> None:
    logits = neighbours(torch.full((1, 4), MASK))
    kept = logits.clone()
    Confidence(steps=2)(MaskedDiffusion(lambda ids: logits, MASK), torch.full((1, 4), MASK))
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_real_network_computes_its_head_only_where_it_is_read(name: str) -> None:
    config = TransformerConfig(vocab_size=6, n_layers=1, d_model=8, n_heads=1, d_ff=16, causal=False)
    network = Transformer(config, seed=1).double()
    rows = []
    head = network.lm_head
    assert head is not None
    head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    init = torch.full((3, 8), MASK)
    init[:, ::3], init[1, 1], init[2, :6] = torch.tensor([0, 1, 2]), 3, 4
    sparse = SAMPLERS[name](MaskedDiffusion(network, MASK), init, seeds=[1, 2, 3])
    read = sum(rows)
    everywhere = SAMPLERS[name](MaskedDiffusion(lambda ids: network(ids).logits, MASK), init, seeds=[1, 2, 3])
    assert torch.equal(sparse.ids, everywhere.ids)
    assert read < sum(rows) - read
    if name in ("ancestral", "first hitting"):  # every mask once
        assert read == int((init == MASK).sum())


def test_truncation_and_temperature_reach_the_draws() -> None:
    diffusion, init = MaskedDiffusion(neighbours, MASK), torch.full((4, 7), MASK)
    greedy = Confidence(steps=4, temperature=0.0)(diffusion, init).ids
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}):
        assert torch.equal(Confidence(steps=4, **options)(diffusion, init).ids, greedy)
    assert not torch.equal(Confidence(steps=4)(diffusion, init, seeds=[1, 2, 3, 4]).ids, greedy)
