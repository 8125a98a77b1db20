from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_eval.scoring.causal_model import CausalModel
from effml_eval.scoring.prompt_continuation import Continuation, PromptRow, continue_prompts
from effml_eval.scoring.scorer import SamplingParams
from effml_eval.scoring.tokenizer_adapter import TokenizerAdapter
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import NonFiniteError
from effml_shared.generation import generate
from effml_shared.transformer import Transformer, TransformerConfig, TransformerOutput
from torch import Tensor, nn

BYTES = TokenizerAdapter(ByteTokenizer())


class Chain(nn.Module):
    """A model that recites a text without repeated letters and then ends it; the vocabulary may lack that end."""

    def __init__(self, text: str, vocab: int = 257) -> None:
        super().__init__()
        self.table = torch.zeros(vocab, vocab, dtype=torch.float64)
        for a, b in zip(text.encode(), [*text.encode()[1:], 256], strict=True):
            if b < vocab:
                self.table[a, b] = 100.0
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> TransformerOutput:
        self.shapes.append(tuple(ids.shape))
        return TransformerOutput(logits=self.table[ids])


def recite(model: nn.Module, *prompts: str, **sampling: Any) -> list[Continuation]:
    rows = [PromptRow(tuple(prompt.encode()), seed) for seed, prompt in enumerate(prompts)]
    params = SamplingParams(**{"max_new_tokens": 50, **sampling})
    return continue_prompts(CausalModel(model), BYTES, rows, params, end_ids=[256])


@pytest.mark.parametrize(
    ("stop", "limit", "expected"),
    [
        ((), 50, Continuation("bcdefghij", "eos", 10)),
        ((), 4, Continuation("bcde", "length", 4)),
        (("gh", "de"), 50, Continuation("bc", "stop", 4)),  # the earliest of several
        (("bc",), 50, Continuation("", "stop", 2)),  # at the very beginning
        (("f", "ef"), 50, Continuation("bcd", "stop", 5)),  # overlapping
        (("efx", "ef"), 50, Continuation("bcd", "stop", 5)),  # a longer one with the same beginning changes nothing
        (("f", "defg"), 50, Continuation("bc", "stop", 6)),  # found later, begins earlier
        (("f", "defz"), 50, Continuation("bcde", "stop", 6)),
        (("ij",), 9, Continuation("bcdefgh", "stop", 9)),  # with the last token allowed
        (("xyz",), 50, Continuation("bcdefghij", "eos", 10)),
    ],
)
def test_how_a_text_ends(stop: tuple[str, ...], limit: int, expected: Continuation) -> None:
    model = Chain("abcdefghij")
    assert recite(model, "a", stop=stop, max_new_tokens=limit) == [expected]
    assert len(model.shapes) <= expected.n_tokens + 1  # nothing is written beyond the end
    beside = recite(model, "a", "xyzf", stop=stop, max_new_tokens=limit)
    assert beside[0] == expected


def test_a_vocabulary_without_an_end() -> None:
    model = Chain("abcdefghij", vocab=256)
    assert recite(model, "a", stop=("de",), max_new_tokens=9) == [Continuation("bc", "stop", 4)]
    assert recite(model, "a", max_new_tokens=9) == [Continuation("bcdefghij", "length", 9)]


@pytest.mark.parametrize("top", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.01}])
def test_draws_what_generate_draws(top: dict[str, Any]) -> None:
    config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=258)
    model, seeds = Transformer(config, seed=3).double().eval(), [5, 6, 7]
    rows = [PromptRow((104, 105), seed) for seed in seeds]
    params = SamplingParams(max_new_tokens=20, temperature=0.7, **top)
    found = continue_prompts(CausalModel(model), BYTES, rows, params, [256])
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "eos_token_id": 256, **top}
    drawn = generate(model, torch.tensor([[104, 105]] * 3), seeds=seeds, **options)
    texts = [BYTES.decode(ids[2:][mask].tolist()) for ids, mask in zip(drawn.ids, drawn.mask, strict=True)]
    assert [one.text for one in found] == texts


def test_samples_of_one_prompt_share_its_reading() -> None:
    model = Chain("abcdefghij")
    rows = [PromptRow((97,), 0), PromptRow((97,), 1), PromptRow((98, 99), 0), PromptRow((98, 99), 1)]
    params = SamplingParams(max_new_tokens=3, temperature=1.0)
    together = continue_prompts(CausalModel(model), BYTES, rows, params)
    assert [shape[0] for shape in model.shapes] == [2, 4, 4]
    model.shapes.clear()
    apart = continue_prompts(CausalModel(model), BYTES, [rows[0], rows[2], rows[1]], params)
    assert [shape[0] for shape in model.shapes] == [3, 3, 3]
    assert apart == [together[0], together[2], together[1]]


def test_nan_is_an_error() -> None:
    model = Chain("abcdefghij")
    model.table[ord("d"), 5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"logits: got NaN or infinity while generating"):
        recite(model, "a")
    assert recite(model, "a", stop=("c",)) == [Continuation("b", "stop", 2)]  # not reached
