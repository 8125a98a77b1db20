"""When calls are recorded and replayed: on a CPU with recordings that compute; on a GPU, whole layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_arch.recurrent import graphs, operators
from effml_arch.recurrent.graphs import GraphCache, Recording
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.model import RecurrentTransformer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TINY = RecurrentTransformerConfig(
    n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=50, qk_norm="head", base_block=4
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened: recordings compute on their own buffers, on a CPU, when they are replayed."""
    events: list[str] = []

    def record(function: Callable[[list[Tensor]], tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> Recording:
        events.append("record")
        inputs = [tensor.clone() for tensor in tensors]
        outputs = tuple(torch.full_like(output, torch.nan) for output in function(inputs))

        def replay() -> None:
            events.append("replay")
            for output, result in zip(outputs, function(inputs), strict=True):
                output.copy_(result)

        return Recording(inputs, replay, outputs)

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "recordable", lambda tensors: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    return events


def scaled(x: Tensor, weights: list[Tensor], mask: Tensor | None, factor: float, name: str) -> tuple[Tensor, ...]:
    assert name
    y = sum((x @ weight for weight in weights), torch.zeros_like(x)) * factor
    return y, y if mask is None else y * mask


def arguments(n: int = 3, mask: bool = False, factor: float = 2.0) -> tuple[Any, ...]:
    weights = [torch.randn(4, 4), torch.randn(4, 4)]
    return torch.randn(n, 4), weights, torch.ones(n, 1) if mask else None, factor, "name"


def check(cache: GraphCache, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    got = cache(scaled, *given)
    for one, other in zip(got, scaled(*given), strict=True):
        assert torch.equal(one, other)
    return got


def test_the_second_call_of_a_shape_is_recorded_and_the_next_ones_replayed(calls: list[str]) -> None:
    cache = GraphCache()
    check(cache, arguments())
    assert calls == []
    first = check(cache, arguments())  # other values and other weights
    kept = first[0].clone()
    assert calls == ["record", "replay"]
    check(cache, arguments())
    assert calls == ["record", "replay", "replay"]
    assert torch.equal(first[0], kept)  # results are the caller's
    cache.clear()
    check(cache, arguments())
    assert len(calls) == 3


@pytest.mark.parametrize(
    "other",
    [{"n": 4}, {"mask": True}, {"factor": 3.0}, {"dtype": torch.float64}, {"function": True}, {"structure": True}],
)
def test_what_differs_is_not_replayed(calls: list[str], other: dict[str, Any]) -> None:
    cache, given = GraphCache(), arguments()
    for _ in range(2):
        check(cache, given)
    if "dtype" in other:
        check(cache, (given[0].double(), [weight.double() for weight in given[1]], *given[2:]))
    elif "function" in other:
        assert torch.equal(cache(lambda x: (x + 1,), given[0])[0], given[0] + 1)
    elif "structure" in other:
        check(cache, (given[0], given[1][:1], given[1][1][:3, :1], *given[3:]))
    else:
        check(cache, arguments(**other))
    assert calls == ["record", "replay"]


def test_what_was_not_called_for_longest_is_forgotten(calls: list[str]) -> None:
    cache = GraphCache(limit=2)
    for n in (1, 1, 2, 1, 3):  # 2 goes
        check(cache, arguments(n))
    assert calls == ["record", "replay", "replay"]
    for n in (1, 2):
        check(cache, arguments(n))
    assert calls == ["record", *["replay"] * 3]
    check(cache, arguments(2))
    assert calls[-2:] == ["record", "replay"]


def test_tensors_of_a_cpu_and_calls_without_tensors_are_not_recorded() -> None:
    cache, given = GraphCache(), arguments()
    for _ in range(3):
        check(cache, given)
        assert cache(lambda number: (torch.tensor(number),), 1)[0] == 1
    assert not graphs.recordable([torch.zeros(1)])


def run(model: RecurrentTransformer, ids: Tensor, mask: Tensor) -> list[Tensor]:
    loss = model(ids, attention_mask=mask, labels=ids).loss_sum
    assert loss is not None
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def check_layers(device: str, dtype: torch.dtype, tolerance: float) -> None:
    model, stream = RecurrentTransformer(replace(TINY, cuda_graphs=True)).to(device, dtype), torch.Generator()
    plain = RecurrentTransformer(TINY).to(device, dtype)
    for step in range(4):
        ids = torch.randint(50, (2, 13), generator=stream.manual_seed(step)).to(device)
        mask = (torch.arange(13) >= step).expand(2, -1).to(device)
        for got, expected in zip(run(model, ids, mask), run(plain, ids, mask), strict=True):
            assert (got - expected).norm() <= tolerance * expected.norm()
        with torch.no_grad():
            for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
                weight.add_(0.1)
                other.add_(0.1)


def test_layers_share_recordings_forward_and_backward(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "GRAPHS", GraphCache())
    check_layers("cpu", torch.float64, 1e-12)
    # Four steps of two layers forward and backward; the first call of each direction is only noted.
    assert (calls.count("record"), calls.count("replay")) == (2, 2 * (4 * 2 - 1))


def test_a_cache_is_not_recorded(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "GRAPHS", GraphCache())
    model = RecurrentTransformer(replace(TINY, cuda_graphs=True)).eval()
    with torch.no_grad():
        for _ in range(3):
            cache = model.new_cache()
            for part in torch.zeros(2, 6, dtype=torch.long).split([2, 4], dim=1):
                model(part, cache=cache)
    assert (calls.count("record"), calls.count("replay")) == (1, 5)  # of the parts without a past


@pytest.mark.parametrize(
    "options",
    [
        {"resid_dropout": 0.1},
        {"position": "alibi", "window": 5, "norm": "layer", "qk_norm": "full", "schedule": "pull"},
    ],
)
def test_the_passes_never_wait_for_a_device_nor_leave_it(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cotangents = replace(TINY, **options), []

    def solution(z: Tensor, *rest: Any) -> Tensor:
        with torch.no_grad():
            cotangents.append(operators._run_cotangents(torch.empty_like(z), *rest[2:]))
        return z

    for name, run in (("_scan", operators._run_scan), ("_solution", solution)):
        monkeypatch.setattr(operators, name, run)
    with FakeTensorMode():  # fails where a value is asked for, or where tensors of two devices meet
        with torch.device("cuda"):
            layer = RecurrentTransformerLayer(config)
            x = torch.empty(2, 13, 16, requires_grad=True)
            given = {"attention_mask": torch.ones(2, 13), "doc_ids": torch.ones(2, 13)}
        assert layer(x, **given).device.type == "cuda"
    assert {tensor.device.type for tensor in cotangents[0]} == {"cuda"}


@pytest.mark.gpu
@needs_gpu
def test_layers_on_the_device_equal_those_without_graphs() -> None:
    operators.GRAPHS.clear()
    check_layers("cuda", torch.float32, 1e-6)
    assert [recording is not None for recording in operators.GRAPHS._recordings.values()] == [True, True]


@pytest.mark.gpu
@needs_gpu
def test_nothing_is_recorded_while_another_graph_is() -> None:
    tensors = [torch.zeros(3, device="cuda")]
    assert graphs.recordable(tensors)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert not graphs.recordable(tensors)
        tensors[0].add_(1)
