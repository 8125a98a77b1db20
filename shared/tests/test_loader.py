from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effml_shared.data import ByteTokenizer, DataConfig, Loader, PackedDataset, StreamingLoader, open_data
from effml_shared.errors import CheckpointError, ConfigError, DataError
from effml_shared.tree import read_tree, write_tree
from hypothesis import given, settings
from hypothesis import strategies as st

AnyLoader = Loader | StreamingLoader
TEXTS = [f"document {i}: " + "abcdefg"[: i % 7] * 5 for i in range(20)]
SEQ = 6
DATASET = PackedDataset(TEXTS, ByteTokenizer(), SEQ)


def indexed(rank: int = 0, world_size: int = 1, seed: int = 0) -> Loader:
    return Loader(DATASET, seed=seed, rank=rank, world_size=world_size)


def in_order(rank: int = 0, world_size: int = 1, seed: int = 0) -> Loader:
    return Loader(DATASET, seed=seed, rank=rank, world_size=world_size, shuffle=False)


def streamed(rank: int = 0, world_size: int = 1, seed: int = 0) -> StreamingLoader:
    return StreamingLoader(lambda: TEXTS, ByteTokenizer(), SEQ, seed=seed, rank=rank, world_size=world_size)


def buffered(rank: int = 0, world_size: int = 1, seed: int = 0) -> StreamingLoader:
    return StreamingLoader(
        lambda: iter(TEXTS), ByteTokenizer(), SEQ, seed=seed, rank=rank, world_size=world_size, shuffle_buffer=13
    )


makers = pytest.mark.parametrize("make", [indexed, in_order, streamed, buffered])
sizes = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def joined(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels", "doc_ids")])


@makers
@settings(deadline=None, max_examples=30)
@given(sizes=sizes, world_size=st.integers(1, 9))
def test_the_stream_depends_on_neither_batches_nor_ranks(
    make: Callable[..., AnyLoader], sizes: list[int], world_size: int
) -> None:
    whole = joined([make().next(sum(sizes))])
    ranks = [make(rank, world_size) for rank in range(world_size)]
    parts = []
    for size in sizes:
        rows = [loader.next(size) for loader in ranks]
        counts = [len(part["input_ids"]) for part in rows]
        assert sum(counts) == size
        assert max(counts) - min(counts) <= 1
        assert all(tensor.shape[1:] == (SEQ,) for part in rows for tensor in part.values())
        parts += rows
    assert torch.equal(joined(parts), whole)
    assert all(loader.position == sum(sizes) for loader in ranks)


@makers
@settings(deadline=None, max_examples=25)
@given(before=sizes, after=sizes, world_size=st.integers(1, 3))
def test_a_resumed_stream_is_the_same_stream(
    make: Callable[..., AnyLoader],
    tmp_path_factory: pytest.TempPathFactory,
    before: list[int],
    after: list[int],
    world_size: int,
) -> None:
    loader = make()
    for size in before:
        loader.next(size)
    path = tmp_path_factory.mktemp("state") / "state"
    write_tree(path, loader.state_dict())  # what survives a file: tensors and JSON
    expected = joined([loader.next(size) for size in after])
    ranks = [make(rank, world_size) for rank in range(world_size)]
    for other in ranks:
        other.next(7)  # whatever it did before is forgotten
        other.load_state_dict(read_tree(path))
        assert other.position == sum(before)
    assert torch.equal(joined([other.next(size) for size in after for other in ranks]), expected)


def test_each_epoch_is_another_permutation_and_another_seed_another_order() -> None:
    n = len(DATASET)
    loader = indexed()
    everything = {tuple(row) for row in DATASET.batch(np.arange(n))["input_ids"].tolist()}
    epochs = [loader.next(n)["input_ids"].tolist() for _ in range(3)]
    assert all({tuple(row) for row in epoch} == everything for epoch in epochs)
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3
    assert indexed(seed=1).next(n)["input_ids"].tolist() != epochs[0]
    assert torch.equal(in_order().next(n)["input_ids"], DATASET.batch(np.arange(n))["input_ids"])


def test_orders_never_change() -> None:
    """A checkpoint of any release continues under any other: these numbers are part of the format."""
    assert indexed()._permutation(0)[:5].tolist() == [23, 7, 80, 104, 44]
    assert buffered().next(4)["input_ids"][:, 0].tolist() == [99, 97, 100, 98]


def test_a_stream_in_order_is_the_packed_corpus_and_a_buffer_only_reorders_it() -> None:
    n = len(DATASET)
    batch, packed = streamed().next(n), DATASET.batch(np.arange(n))
    assert all(torch.equal(batch[name], packed[name]) for name in packed)
    ordered = streamed().next(500)["input_ids"].tolist()
    mixed = buffered().next(500 - 12)["input_ids"].tolist()
    assert mixed != ordered[: len(mixed)]
    for i, row in enumerate(mixed):
        assert row in ordered[: i + 13]  # drawn from what has been read


def test_a_stream_runs_on_across_its_end_without_a_label_across_it() -> None:
    loader = StreamingLoader(lambda: ["abc"], ByteTokenizer(), 6)
    batch = loader.next(2)
    assert batch["input_ids"].tolist() == [[97, 98, 99, 256, 97, 98], [98, 99, 256, 97, 98, 99]]
    assert batch["labels"].tolist() == [[-100, 98, 99, 256, -100, 98], [-100, 99, 256, -100, 98, 99]]
    assert batch["doc_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


@makers
def test_batches_are_tensors_that_can_be_changed_without_changing_the_data(make: Callable[..., AnyLoader]) -> None:
    first = make()
    for tensor in first.next(3).values():
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        tensor.zero_()
    second = make()
    second.next(3)
    assert torch.equal(joined([first.next(50)]), joined([second.next(50)]))


def test_the_state_of_an_indexed_loader_is_json() -> None:
    loader = indexed()
    loader.next(9)
    state = json.loads(json.dumps(loader.state_dict()))
    other = indexed()
    other.load_state_dict(state)
    assert other.position == 9


def altered(**changes: Any) -> Loader:
    arguments: dict[str, Any] = {"texts": TEXTS, "seq_len": SEQ, "seed": 0, "shuffle": True, **changes}
    dataset = PackedDataset(arguments["texts"], ByteTokenizer(), arguments["seq_len"])
    return Loader(dataset, seed=arguments["seed"], shuffle=arguments["shuffle"])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"texts": TEXTS[:-1]}, "windows"),
        ({"texts": [*TEXTS[:-1], TEXTS[-1].upper()]}, "content"),
        ({"seed": 1}, "seed: got 1, expected 0"),
        ({"shuffle": False}, "shuffle"),
        ({"seq_len": 7}, "windows"),
    ],
)
def test_other_data_or_another_order_is_refused_in_one_line(changes: dict[str, Any], name: str) -> None:
    other = altered(**changes)
    with pytest.raises(CheckpointError, match=rf"^data {name}.*resume with the same data, or start a new run$"):
        other.load_state_dict(indexed().state_dict())
    assert other.position == 0


@makers
def test_a_state_that_is_none_is_refused(make: Callable[..., AnyLoader]) -> None:
    with pytest.raises(CheckpointError, match="data seed"):
        make().load_state_dict({})


def test_a_stream_that_changed_behind_the_checkpoint_is_refused() -> None:
    loader = streamed()
    loader.next(20)
    state = loader.state_dict()
    consumed = state["documents"]
    changed = [*TEXTS]

    def resumed() -> StreamingLoader:
        return StreamingLoader(lambda: changed, ByteTokenizer(), SEQ)

    changed[consumed:] = ["new documents after the checkpoint are welcome"]
    resumed().load_state_dict(state)
    for wrong in (TEXTS[1:], TEXTS[: consumed - 1], [TEXTS[0] + TEXTS[1], *TEXTS[2:]]):
        changed[:] = wrong
        with pytest.raises(CheckpointError, match=r"^data digest"):
            resumed().load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"^data shuffle_buffer: got 13, expected 1"):
        buffered().load_state_dict(state)


def test_resuming_a_stream_tokenises_nothing_twice() -> None:
    class Counting(ByteTokenizer):
        calls = 0

        def encode(self, text: str) -> Any:
            self.calls += 1
            return super().encode(text)

    state = {}
    loader = StreamingLoader(lambda: TEXTS, ByteTokenizer(), SEQ)
    loader.next(40)
    state = loader.state_dict()
    other = StreamingLoader(lambda: TEXTS, counting := Counting(), SEQ)
    other.load_state_dict(state)
    assert state["documents"] > 3
    assert counting.calls == 0


def test_an_empty_or_failing_stream_is_one_line() -> None:
    with pytest.raises(DataError, match="got a stream without documents"):
        StreamingLoader(list, ByteTokenizer(), SEQ).next(1)

    def fails() -> Iterator[str]:
        yield "ab"
        raise DataError("the file ended early")

    with pytest.raises(DataError, match="ended early"):
        StreamingLoader(fails, ByteTokenizer(), SEQ).next(1)


def test_wrong_arguments_are_one_line() -> None:
    with pytest.raises(ConfigError, match="seq_len, shuffle_buffer: got 0, 1, expected integers >= 2 and 1"):
        StreamingLoader(lambda: TEXTS, ByteTokenizer(), 0)
    for make in (indexed, streamed):
        with pytest.raises(ConfigError, match="batch_size: got 0"):
            make().next(0)
        with pytest.raises(ConfigError, match="batch_size: got 4 for rank 2 of 2"):
            make(rank=2, world_size=2).next(4)


@pytest.mark.parametrize("streaming", [False, True])
def test_open_data_keeps_what_is_held_out_from_training(tmp_path: Path, streaming: bool) -> None:
    texts = [f"<{i:04}>" for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(corpus=str(tmp_path), seq_len=8, held_out=0.2, streaming=streaming, shuffle_buffer=5)
    train, held_out = open_data(config)
    assert isinstance(train, StreamingLoader if streaming else Loader)
    decode = held_out.tokenizer.decode
    seen = {decode(row[:7].numpy()) for row in train.next(500)["input_ids"]}
    kept = {decode(row[:7].numpy()) for row in held_out.batch(np.arange(len(held_out)))["input_ids"]}
    assert 60 < len(kept) < 100
    assert seen | kept <= set(texts) | {""}
    assert not seen & kept
    assert torch.equal(open_data(config)[0].next(9)["labels"], open_data(config)[0].next(9)["labels"])


def test_open_data_asks_for_more_text_where_a_part_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one short document")
    with pytest.raises(DataError, match="no held_out document among 18 bytes"):
        open_data(DataConfig(corpus=str(tmp_path)))
