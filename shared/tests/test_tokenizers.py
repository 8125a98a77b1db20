from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from effml_shared.data import ByteTokenizer, load_tokenizer
from effml_shared.errors import DataError, MissingExtra
from hypothesis import given
from hypothesis import strategies as st


@given(st.text())
def test_bytes_round_trip_whatever_the_text_and_the_specials_between(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.pad_id, -100]) == text
    assert torch.from_numpy(ids).dtype == torch.int64


def test_bytes_show_broken_text_instead_of_failing() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xC3, 0x28, 65]) == "\ufffd(A"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert tokenizer.decode(torch.tensor([104, 105, 256]).numpy()) == "hi"
    assert (tokenizer.vocab_size, tokenizer.name) == (258, "byte")


def write_tokenizer(path: Path, *specials: str, words: dict[str, int] | None = None) -> Path:
    library = pytest.importorskip("tokenizers")
    model = library.models.WordLevel(words or {"[UNK]": 0, "a": 1, "b": 2, "<": 3, ">": 4, "eos": 5}, "[UNK]")
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.enable_truncation(2)  # what a file asks for must not reach a corpus
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path


def test_a_file_encodes_the_whole_text_and_text_cannot_forge_the_end_of_a_document(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "tokenizer.json", "<eos>", "<pad>")))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (6, 7, 8)
    assert list(tokenizer.encode("a b <eos> a")) == [1, 2, 3, 5, 4, 1]
    assert tokenizer.decode([1, 6, 2, 7, -100, 99]) == "a b"
    assert np.asarray(tokenizer.encode("")).dtype == np.int64


def test_the_end_of_a_document_is_found_by_known_names_or_named(tmp_path: Path) -> None:
    path = str(write_tokenizer(tmp_path / "tokenizer.json", "<stop>", "<other>"))
    with pytest.raises(DataError, match=r"expected eos_token in \['<stop>', '<other>'\]"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="no token </s>"):
        load_tokenizer(path, eos_token="</s>")
    tokenizer = load_tokenizer(path, eos_token="<stop>")
    assert tokenizer.eos_id == tokenizer.pad_id == 6
    assert tokenizer.name != load_tokenizer(path, eos_token="<other>").name


def test_ids_with_gaps_all_lie_below_the_vocabulary_size(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", words={"[UNK]": 0, "a": 70, "</s>": 3})
    assert load_tokenizer(str(path)).vocab_size == 71


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"{}", b"null", b'{"model": {}}', b"\xff\xfe\x00"], ids=lambda c: repr(c)
)
def test_a_damaged_or_missing_file_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json.*expected 'byte' or the path") as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_every_truncation_of_a_file_is_one_line(tmp_path: Path) -> None:
    whole = write_tokenizer(tmp_path / "whole.json", "<eos>").read_bytes().rstrip()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.json").write_bytes(whole[:length])
        with pytest.raises(DataError, match="expected 'byte'"):
            load_tokenizer(str(tmp_path / "cut.json"))


def test_a_folder_and_a_misspelt_name_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    for spec in (str(tmp_path), "bytes", ""):
        with pytest.raises(DataError, match=r"expected 'byte' or the path of a tokenizer\.json"):
            load_tokenizer(spec)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'effml-shared\[data\]'"):
        load_tokenizer("tokenizer.json")
