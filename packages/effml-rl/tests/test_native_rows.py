"""Decoding in C: equal to the network in every configuration, and a row bit by bit the same in any company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_rl.native_rows import NativeRows, native_rows, one_torch_thread
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor

CONFIG = TransformerConfig(n_layers=2, d_model=48, n_heads=4, n_kv_heads=2, d_ff=56, vocab_size=40, vocab_rows=44)
LENGTHS = (1, 15, 16, 17, 70, 3, 33)  # around pages of 16 and chunks of 64
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "alibi": {"position": "alibi", "n_heads": 3, "n_kv_heads": 1},
    "none": {"position": "none", "n_kv_heads": None},
    "olmo": {"norm_position": "post", "qk_norm": "full", "norm": "layer"},
    "head": {"qk_norm": "head", "d_model": 160, "residual_scale": "depth"},
    "gelu": {"mlp": "gelu", "mlp_bias": True},
    "gelu_tanh": {"mlp": "gelu_tanh"},
    "relu": {"mlp": "relu", "mlp_bias": True},
    "swiglu": {"mlp_bias": True, "d_ff": 70},
}


def model(seed: int = 0, **options: Any) -> Transformer:
    """A float32 network with scales and biases that are not 1 and 0."""
    network = Transformer(replace(CONFIG, **options), seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return network


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (length,), generator=generator).tolist() for length in lengths]


def rows_of(network: Transformer, max_new_tokens: int = 40, threads: int = 1) -> NativeRows:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = native_rows(network, max_new_tokens)
    finally:
        torch.set_num_threads(before)
    if rows is None:
        pytest.skip("no C compiler")
    return rows


def tokens(count: int, steps: int) -> Tensor:
    return torch.randint(0, 40, (steps, count), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_the_network(name: str) -> None:
    network = model(**VARIANTS[name])
    rows, texts, steps = rows_of(network), prompts(), tokens(len(LENGTHS), 20)
    got = [rows.prefill(texts)]
    rows.start(torch.arange(len(LENGTHS)))
    got += [rows.step(ids).clone() for ids in steps]
    exact = network.double()
    for row, text in enumerate(texts):
        whole = torch.tensor([text + steps[:, row].tolist()])
        expected = exact(whole).logits[0, len(text) - 1 :, :40]
        torch.testing.assert_close(torch.stack(got)[:, row].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_is_bit_by_bit_the_same_alone_in_a_batch_and_on_more_threads(threads: int) -> None:
    network, texts, steps = model(), prompts(), tokens(64, 20)
    rows = rows_of(network, threads=threads)
    first = rows.prefill(texts)
    source = torch.arange(64) % len(LENGTHS)
    rows.start(source)
    whole = [rows.step(ids).clone() for ids in steps]
    alone = rows_of(network)
    for row in (0, 1, 4, 13, 62, 63):
        assert torch.equal(alone.prefill([texts[source[row]]])[0], first[source[row]])
        alone.start(torch.tensor([0]))
        for ids, expected in zip(steps, whole, strict=True):
            assert torch.equal(alone.step(ids[row : row + 1])[0], expected[row])


def test_rows_leave_and_others_begin_after_the_same_prompts() -> None:
    rows, texts, steps = rows_of(model(), 20), prompts((5, 16)), tokens(6, 20)
    rows.prefill(texts)
    rows.start(torch.tensor([0, 0, 0, 1, 1, 1]))
    whole = [rows.step(ids).clone() for ids in steps]
    rows.start(torch.tensor([1, 0, 1, 0, 0, 1]))
    order, kept = torch.tensor([3, 0, 4, 1, 2, 5]), None
    for step, ids in enumerate(steps):
        assert torch.equal(rows.step(ids[order], kept), whole[step][order])
        kept = torch.arange(len(order))[step % 3 :: 2] if step in (4, 7) else None
        order = order if kept is None else order[kept]
    assert len(order) < 3


def test_only_float32_on_a_cpu_outside_autocast_of_a_modest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of(model())
    assert native_rows(model().double(), 4) is None
    assert native_rows(model().to("meta"), 4) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert native_rows(model(), 4) is None
    for name, value in (("MAX_WEIGHTS", 1000), ("library", lambda *_, **__: None)):
        with monkeypatch.context() as patch:
            patch.setattr(f"effml_rl.native_rows.{name}", value)
            assert native_rows(model(), 4) is None


def test_large_numbers_and_nan_pass_through() -> None:
    for scale in (1e4, float("nan")):
        network = model()
        network.get_parameter("model.layers.0.mlp.gate_proj.weight").mul_(scale)
        rows = rows_of(network)
        got, expected = rows.prefill([[1, 2, 3]]), network(torch.tensor([[1, 2, 3]])).logits[:, -1, :40]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_torch_has_its_threads_back_after_an_error() -> None:
    def fail() -> None:
        with one_torch_thread():
            assert torch.get_num_threads() == 1
            raise KeyError

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError):
            fail()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
