from __future__ import annotations

import numpy as np
import pytest
import torch
from effml_shared.data import ByteTokenizer, DataConfig, PackedDataset, read_documents
from effml_shared.errors import ConfigError, DataError
from hypothesis import given
from hypothesis import strategies as st

texts = st.lists(st.text(max_size=12), min_size=1, max_size=12)


@given(texts, st.integers(2, 9))
def test_every_token_is_predicted_once_in_order_and_no_label_crosses_a_document(texts: list[str], seq_len: int) -> None:
    stream = [i for text in texts for i in (*text.encode(), 256)]
    owner = [d for d, text in enumerate(texts) for _ in range(len(text.encode()) + 1)]
    try:
        dataset = PackedDataset(texts, ByteTokenizer(), seq_len)
    except DataError:
        assert len(stream) < seq_len
        return
    batch = dataset.batch(np.arange(len(dataset)))
    used = len(dataset) * (seq_len - 1)
    assert 0 < len(stream) - used < seq_len  # the rest is too short for another window
    assert batch["input_ids"][:, :-1].flatten().tolist() == stream[:used]
    assert batch["input_ids"][:, 1:].flatten().tolist() == stream[1 : used + 1]
    targets = [stream[i + 1] if owner[i + 1] == owner[i] else -100 for i in range(used)]
    assert batch["labels"][:, 1:].flatten().tolist() == targets
    assert (batch["labels"][:, 0] == -100).all()
    for row, ids in enumerate(batch["doc_ids"].tolist()):
        start = row * (seq_len - 1)
        assert ids == [owner[start + i] - owner[start] for i in range(seq_len)]


def test_any_windows_at_once_and_none() -> None:
    dataset = PackedDataset(["abcdefgh", "ij", "", "k" * 20], ByteTokenizer(), 4)
    picked = np.array([3, 0, 3])
    batch = dataset.batch(picked)
    for name, rows in batch.items():
        assert rows.shape == (3, 4)
        assert rows.dtype == torch.int64
        assert rows.is_contiguous()
        assert torch.equal(rows, torch.cat([dataset.batch(np.array([i]))[name] for i in picked]))
    assert all(rows.shape == (0, 4) for rows in dataset.batch(np.array([], np.int64)).values())


def test_ids_take_two_bytes_where_they_fit() -> None:
    assert PackedDataset(["abc"], ByteTokenizer(), 2).tokens.dtype == np.uint16
    large = ByteTokenizer()
    large.vocab_size = 70_000
    large.eos_id = 69_999
    dataset = PackedDataset(["abc"], large, 4)
    assert dataset.tokens.dtype == np.uint32
    assert dataset.batch(np.array([0]))["labels"].tolist() == [[-100, 98, 99, 69_999]]


def test_the_fingerprint_changes_with_anything_that_changes_a_window() -> None:
    def fingerprint(*texts: str, seq_len: int = 2) -> dict[str, object]:
        return PackedDataset(texts, ByteTokenizer(), seq_len).fingerprint

    base = fingerprint("abc", "def")
    assert base == fingerprint("abc", "def")
    others = [fingerprint("abd", "def"), fingerprint("def", "abc"), fingerprint("abc", "def", seq_len=3)]
    assert base not in others
    same_ids = ByteTokenizer()
    same_ids.eos_id = ord("x")  # the same ids with another boundary
    one, two = (PackedDataset(texts, same_ids, 2).fingerprint for texts in (["axb"], ["a", "b"]))
    assert one != two


def test_too_little_text_and_a_wrong_length_are_one_line() -> None:
    for texts in ([], ["ab"]):
        with pytest.raises(DataError, match=r"got \d tokens of text, expected at least seq_len = 4: use more text"):
            PackedDataset(texts, ByteTokenizer(), 4)
    with pytest.raises(ConfigError, match="seq_len: got 1, expected an integer >= 2"):
        PackedDataset(["abc"], ByteTokenizer(), 1)


def test_ten_megabytes_come_back() -> None:
    documents = list(read_documents(DataConfig(max_bytes=10_000_000)))
    dataset = PackedDataset(documents, ByteTokenizer(), 1024)
    assert dataset.tokenizer.decode(dataset.tokens) == "".join(documents)
