"""Words and ids of the solution-tree task."""

from __future__ import annotations

import pytest
from effml_rl.solution_tree.tree_tokenizer import TreeTokenizer
from effml_shared.errors import ConfigError


def test_every_word_round_trips() -> None:
    tokenizer = TreeTokenizer(20)
    assert tokenizer.vocab_size == 29
    assert tokenizer.words[:9] == ("<unk>", "<bos>", "<pad>", ":", "S", "P", "C", "A", "I")
    text = " ".join(tokenizer.words)
    assert tokenizer.encode(text).tolist() == list(range(29))
    assert tokenizer.decode(range(29)) == text
    assert tokenizer.decode([tokenizer.state, tokenizer.first_integer + 19]) == "S 19"


def test_strange_words_and_ids_are_unknown() -> None:
    tokenizer = TreeTokenizer(3)
    assert tokenizer.encode("S 3 x").tolist() == [4, 0, 0]
    assert tokenizer.decode([-1, 12, 11]) == "<unk> <unk> 2"
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.decode([]) == ""
    with pytest.raises(ConfigError, match=r"n_integers: got 0"):
        TreeTokenizer(0)
