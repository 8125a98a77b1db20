from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effml_eval.scoring.causal_model import CausalModel, right_pad
from effml_shared.errors import ConfigError
from effml_shared.tensors import left_pad
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 32, "vocab_size": 50, "init": "normal"}


class Opaque(nn.Module):
    """A module that says nothing of itself and returns logits as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Transformer(TransformerConfig(**SHAPE)).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits


def make(name: str) -> nn.Module:
    if name == "own":
        return Transformer(TransformerConfig(**SHAPE)).double()
    if name == "tied":
        return Transformer(TransformerConfig(**SHAPE, tied=True)).double()
    if name == "opaque":
        return Opaque()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=12)
        return transformers.GPT2LMHeadModel(config).double().eval()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    softcap = {"final_logit_softcapping": 0.5, "head_dim": 16, "num_key_value_heads": 1, "sliding_window": 4}
    config = transformers.Gemma2Config(vocab_size=50, **shape, **softcap, attn_implementation="eager")
    return transformers.Gemma2ForCausalLM(config).eval()  # its eager softmax overflows at padding in float64


TOLERANCE = {"own": 1e-12, "tied": 1e-12, "opaque": 1e-12, "gpt2": 1e-12, "gemma2": 1e-5}
NAMES = list(TOLERANCE)


@torch.no_grad()
def whole(model: CausalModel, row: list[int]) -> Tensor:
    output = model.model(torch.tensor([row]))
    return (output if isinstance(output, Tensor) else output.logits)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_at_some_places(name: str) -> None:
    model = CausalModel(make(name))
    texts = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [3] * 6]
    rows, places = torch.tensor([0, 0, 1, 2, 1]), torch.tensor([5, 3, 2, 4, 1])
    found = model.logits_at(right_pad(texts), rows, places)
    expected = torch.stack([whole(model, texts[row])[place] for row, place in zip(rows, places, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[name])
    one = model.logits_at(torch.tensor([[1, 2, 3]]), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    torch.testing.assert_close(one, whole(model, [1, 2, 3]), rtol=0, atol=TOLERANCE[name])
    assert not any(module._forward_pre_hooks for module in model.model.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_continued_in_several_ways(name: str) -> None:
    model = CausalModel(make(name))
    contexts, endings = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10]], [(0, [11]), (1, [12, 13, 14, 15, 16]), (0, [17, 18])]
    ids, mask = left_pad(contexts, 0)
    past = model.past(13)
    first = past.extend(ids, mask)
    assert first.shape[1] == 1
    for row, context in enumerate(contexts):
        torch.testing.assert_close(first[row, 0], whole(model, context)[-1], rtol=0, atol=TOLERANCE[name])
    past.select(torch.tensor([row for row, _ in endings]))
    # The padding behind the first ending stands beyond the last position of the GPT-2 here.
    later = past.extend(right_pad([ending for _, ending in endings]), keep=0)
    if name != "opaque":  # which reads only what is there, and may be asked for the last places alone
        for i, (row, ending) in enumerate(endings):
            expected = whole(model, contexts[row] + ending)[-len(ending) :]
            torch.testing.assert_close(later[i, : len(ending)], expected, rtol=0, atol=TOLERANCE[name])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_token_by_token(name: str) -> None:
    model, texts = CausalModel(make(name)), [[1, 2, 3], [4]]
    ids, mask = left_pad(texts, 0)
    past = model.past(6)
    past.extend(ids, mask)
    for step in range(3):
        logits = past.extend(torch.tensor([[20 + step], [30 + step]]))
        texts = [[*texts[0], 20 + step], [*texts[1], 30 + step]]
        for row in range(2):
            torch.testing.assert_close(logits[row, 0], whole(model, texts[row])[-1], rtol=0, atol=TOLERANCE[name])


def test_what_it_says_of_itself() -> None:
    own, opaque = CausalModel(make("own")), CausalModel(make("opaque"))
    assert (own.remembers, own.vocab_size, own.max_length) == (True, 50, None)
    assert (opaque.remembers, opaque.vocab_size, opaque.max_length) == (False, None, None)
    assert opaque.device == torch.device("cpu")
    hugging_face = CausalModel(make("gpt2"))
    assert (hugging_face.remembers, hugging_face.vocab_size, hugging_face.max_length) == (True, 50, 12)
    own.check_ids([0, 49])
    opaque.check_ids([1000])
    for ids in ([50], [3, -1]):
        with pytest.raises(ConfigError, match=r"token ids: got .*expected 0 to 49"):
            own.check_ids(ids)


def test_a_hook_does_not_outlive_an_error() -> None:
    model = CausalModel(make("own"))
    with pytest.raises(ConfigError):
        model.logits_at(torch.tensor([[999]]), torch.tensor([0]), torch.tensor([0]))
    assert not model.model.lm_head._forward_pre_hooks


@pytest.mark.parametrize(
    "model",
    [
        Transformer(TransformerConfig(n_layers=1, d_model=8, n_heads=1, causal=False)),
        SimpleNamespace(config=None),
        None,
    ],
)
def test_refuses(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"model: got a .*expected"):
        CausalModel(model)


def test_refuses_what_are_no_logits() -> None:
    for answer in (torch.zeros(1, 5), torch.zeros(1, 3, 5), None):
        model = CausalModel(lambda ids, answer=answer: answer)
        with pytest.raises(ConfigError, match=r"model: got logits of shape .*expected \(1, 2, vocab\)"):
            model.logits_at(torch.tensor([[1, 2]]), torch.tensor([0]), torch.tensor([1]))
