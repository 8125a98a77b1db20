"""Replaying an order that was drawn beforehand: numbering moments, and one pass for each."""

from __future__ import annotations

import torch
from effml_diffusion import samplers
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers.reveal_order import moments, reveal_in_order
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CELLS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=4, max_size=4)


@given(st.lists(CELLS, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_moments_are_dense_ranks(rows: list[list[tuple[int, bool]]]) -> None:
    when = torch.tensor([[value for value, _ in row] for row in rows])
    counted = torch.tensor([[there for _, there in row] for row in rows])
    number, value = moments(when, counted)
    for row, cells in enumerate(rows):
        distinct = sorted({value for value, there in cells if there})
        assert number[row].tolist() == [distinct.index(v) if there else -1 for v, there in cells]
        assert value[row, : len(distinct)].tolist() == distinct


class Replay(samplers.Sampler):
    """Reveal in a given order."""

    def decode(self, state: samplers.Decoding) -> None:
        when = torch.tensor([[9, 2, 2, 5], [4, 4, 4, 4], [0, 1, 2, 3]])
        reveal_in_order(state, when, state.masked, lambda value: value.double() / 10)


def test_rows_share_passes_but_not_times() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def model(ids: Tensor, t: Tensor) -> Tensor:
        seen.append((ids.clone(), t))
        return torch.zeros(*ids.shape, 3)

    diffusion = MaskedDiffusion(model, 2, time_conditioning="time")
    init = torch.tensor([[2, 2, 2, 2], [2, 2, 2, 2], [0, 2, 0, 2]])
    output = Replay(history=True)(diffusion, init)
    assert output.n_forwards == 3
    masks = [(ids == 2).tolist() for ids, _ in seen]
    assert masks[1] == [[True, False, False, True], [False] * 4, [False, False, False, True]]
    assert masks[2] == [[True, False, False, False], [False] * 4, [False] * 4]
    times = torch.stack([t for _, t in seen], 1)
    torch.testing.assert_close(times, torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.4, 0.4], [0.1, 0.3, 0.3]]))
    assert output.history is not None
    assert torch.equal(output.history[0], init)
    assert torch.equal(output.history[-1], output.ids)
