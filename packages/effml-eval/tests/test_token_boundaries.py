from __future__ import annotations

import pytest
from effml_eval.scoring.token_boundaries import Row, SplitPair, fit, split_pair
from effml_eval.scoring.tokenizer_adapter import TokenizerAdapter
from effml_shared.errors import ConfigError

WORDS = ["the", "cat", "ab", "a", "b", "c", " ", " cat", "<s>", "\n"]
PREFIX = 99


class LongestMatch:
    """Always take the longest word that fits; ids are places in WORDS."""

    eos_id, bos_id = 98, WORDS.index("<s>")
    convert_ids_to_tokens = None  # as Hugging Face's tokenizers have

    def __init__(self, opens: bool) -> None:
        self.bos_token_id, self.eos_token_id, self.opens = self.bos_id, self.eos_id, opens

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        ids = []
        while text:
            word = max((word for word in WORDS if text.startswith(word)), key=len, default="")
            ids += [WORDS.index(word)] if word else []
            text = text[max(1, len(word)) :]
        return [*[self.bos_id] * self.opens, *ids, *[self.eos_id] * self.opens] if add_special_tokens else ids


def words(text: tuple[int, ...]) -> list[str]:
    return ["P" if i == PREFIX else WORDS[i] for i in text]


def split(context: str, continuation: str, *, strict: bool = False, opens: bool = False) -> tuple:
    adapter = TokenizerAdapter(LongestMatch(opens))
    pair = split_pair(adapter, context, continuation, prefix_id=PREFIX, strict=strict)
    return words(pair.context), words(pair.continuation), pair.boundary_merge


def test_white_space_moves_to_the_continuation() -> None:
    assert split("the ", "cat") == (["the"], [" cat"], False)
    assert split("the", " cat") == (["the"], [" cat"], False)
    assert split("the\n", "cat") == (["the"], ["\n", "cat"], False)


def test_a_merge_across_the_boundary() -> None:
    assert split("a", "bc") == (["a"], ["c"], True)
    assert split("a", "bc", strict=True) == (["a"], ["b", "c"], True)
    assert split("a", "b") == split("a", "b", strict=True) == (["a"], ["b"], True)  # swallowed: no token is left


def test_an_empty_context_is_one_prefix_token() -> None:
    assert split("", "the cat") == (["P"], ["the", " cat"], False)
    assert split("  ", "cat") == (["P"], [" ", " cat"], False)
    assert split("??", "cat") == (["P"], ["cat"], False)  # of which the tokenizer makes nothing


def test_never_two_beginnings_and_never_an_end() -> None:
    assert split("the", " cat", opens=True) == (["<s>", "the"], [" cat"], False)
    assert split("<s>the", " cat", opens=True) == (["<s>", "the"], [" cat"], False)
    adapter = TokenizerAdapter(LongestMatch(True))
    bos = adapter.prefix_id()
    assert split_pair(adapter, "", "<s>the", prefix_id=bos) == split_pair(adapter, "", "the", prefix_id=bos)
    assert split_pair(adapter, "", "<s>", prefix_id=bos) == ((bos,), (bos,), False)


def test_refuses_what_has_no_token() -> None:
    with pytest.raises(ConfigError, match=r"continuation: got an empty text after 'the '"):
        split("the ", "")
    with pytest.raises(ConfigError, match=r"continuation: got '\?', which has no tokens"):
        split("the", "?")


def test_the_context_is_cut_from_the_left() -> None:
    pair = SplitPair((1, 2, 3), (4, 5), False)
    assert fit(pair, 4) == (Row((1, 2, 3, 4, 5), 2), 0)
    assert fit(pair, 2) == (Row((3, 4, 5), 2), 2)
    with pytest.raises(ConfigError, match=r"continuation: got 2 tokens, expected at most max_length=1"):
        fit(pair, 1)


def test_the_parts_of_a_row() -> None:
    row = Row((1, 2, 3, 4, 5), 2)
    assert (row.inputs, row.context, row.continuation, row.read) == ((1, 2, 3, 4), (1, 2, 3), (4, 5), (4,))
    assert Row((1, 2), 1).read == ()
