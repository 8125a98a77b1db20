from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from effml_arch.recurrent import RecurrentTransformer, RecurrentTransformerConfig
from effml_arch.sliding_window import SlidingWindowConfig, SlidingWindowTransformer
from effml_arch.streaming import settled, stream_text
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import ConfigError
from effml_shared.generation import generate
from effml_shared.kv_cache import KVCache
from effml_shared.transformer import Transformer, TransformerConfig, TransformerOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

BYTES = ByteTokenizer()
SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 32, "vocab_size": 258}
MODELS = {
    "standard": lambda: Transformer(TransformerConfig(**SHAPE)),
    "recurrent": lambda: RecurrentTransformer(RecurrentTransformerConfig(**SHAPE)),
    "window": lambda: SlidingWindowTransformer(SlidingWindowConfig(window=4, **SHAPE)),
}


class Recitation(nn.Module):
    """A model that says a given list of ids, whatever it is asked."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids, self.at, self.dropout = ids, 0, nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.zeros(1))

    def new_cache(self, max_len: int | None = None) -> KVCache:
        return KVCache(1)

    def forward(self, ids: Tensor, **arguments: Any) -> TransformerOutput:
        assert not self.dropout.training
        self.at += 1
        return TransformerOutput(logits=torch.eye(258)[None, None, self.ids[self.at - 1]])


def recite(text: str, stop: list[str], *, more: int = 0) -> list[str]:
    ids = [*text.encode(), BYTES.eos_id]
    return list(stream_text(Recitation(ids), BYTES, "?", max_new_tokens=len(ids) + more, stop=stop))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_says_what_generate_says(name: str, temperature: float) -> None:
    model, prompt = MODELS[name](), torch.tensor(BYTES.encode("hello"))[None]
    options: dict[str, Any] = {"temperature": temperature, "top_k": 50, "top_p": 0.9, "max_new_tokens": 30}
    for seed in range(3):
        whole = generate(model, prompt, do_sample=True, seeds=[seed], eos_token_id=256, **options)
        expected = BYTES.decode(whole.ids[0, 5:].numpy())
        assert "".join(stream_text(model, BYTES, "hello", seed=seed, **options)) == expected
    assert model.training


@settings(deadline=None)
@given(text=st.text("abé☃", max_size=12), stop=st.lists(st.text("abé☃", min_size=1, max_size=4), max_size=3))
def test_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    ends = [end for end in range(len(text) + 1) if any(string in text[:end] for string in stop)]
    expected = text
    if ends:  # the first moment at which there is one: before the earliest that there is then
        expected = text[: min(place for place in map(text[: ends[0]].find, stop) if place >= 0)]
    pieces = recite(text, stop)
    assert "".join(pieces) == expected
    assert all(pieces)


def test_a_piece_comes_as_soon_as_it_is_certain() -> None:
    assert recite("a☃b", []) == ["a", "☃", "b"]
    assert recite("xstandstop", ["stop"]) == ["x", "sta", "n", "d"]
    assert recite("st", ["stop"]) == ["st"]  # the text ends, so it was no stop string


def test_ends_with_the_tokens_and_in_broken_characters() -> None:
    model = Recitation([97, 0xE2, 0x98, 98])
    assert list(stream_text(model, BYTES, "?", max_new_tokens=3)) == ["a", "\ufffd"]
    assert model.at == 3


def test_the_consumer_may_leave() -> None:
    model = Recitation([97] * 100)
    assert list(islice(stream_text(model, BYTES, "?", max_new_tokens=100), 3)) == ["a"] * 3
    assert model.at == 3
    assert model.training
    assert model.dropout.training


def test_settled_characters() -> None:
    assert settled("", ["a"]) == 0
    assert settled("aab", ["abc", "b"]) == 1  # "ab" may go on to "abc"
    assert settled("abab", ["ababa"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, r"prompt: got no tokens"),
        ({"stop": "end"}, r"stop: got 'end', expected a sequence"),
        ({"stop": ["end", ""]}, r"stop: got \['end', ''\]"),
        ({"max_new_tokens": 0}, r"max_new_tokens: got 0"),
        ({"temperature": -1.0}, r"temperature: got -1.0"),
        ({"temperature": float("nan")}, r"temperature: got nan"),
        ({"top_k": -1}, r"top_k: got -1"),
        ({"top_p": 0.0}, r"top_p: got 0.0"),
        ({"min_p": 2.0}, r"min_p: got 2.0"),
        ({"model": nn.Linear(1, 1)}, r"model: got a Linear, expected one with new_cache"),
    ],
)
def test_wrong_arguments_are_named_at_the_call(arguments: dict[str, Any], message: str) -> None:
    given = {"model": Recitation([97]), "tokenizer": BYTES, "prompt": "?", "max_new_tokens": 1, **arguments}
    with pytest.raises(ConfigError, match=message):
        stream_text(**given)
