from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from effml_eval.scoring.tokenizer_adapter import TokenizerAdapter
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import ConfigError

WORDS = {word: i for i, word in enumerate(["<s>", "</s>", "a", "the", "cat", "<unk>"])}


def hugging_face(template: str | None) -> Any:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        specials = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=specials)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_bytes() -> None:
    adapter = TokenizerAdapter(ByteTokenizer())
    assert adapter.encode("né") == adapter.encode("né", opened=True) == (110, 195, 169)
    assert adapter.decode((110, 195, 169, 256)) == "né"
    assert (adapter.bos_id, adapter.eos_id, adapter.prefix_id(), adapter.prefix_id(7)) == (None, 256, 256, 7)
    assert adapter.prefix_id(0) == 0


@pytest.mark.parametrize(
    ("template", "opening"), [(None, ()), ("<s> $A", (0,)), ("<s> $A </s>", (0,)), ("$A </s>", ())]
)
def test_hugging_face(template: str | None, opening: tuple[int, ...]) -> None:
    adapter = TokenizerAdapter(hugging_face(template))
    assert adapter.opening == opening
    assert adapter.encode("the cat") == (3, 4)
    assert adapter.encode("the cat", opened=True) == (*opening, 3, 4)
    assert adapter.encode("<s> the cat", opened=True) == (0, 3, 4)  # never twice
    assert adapter.decode([0, 3, 4, 1]) == "the cat"
    assert adapter.prefix_id() == 0
    assert adapter.end_ids([5, 1]) == (1, 5)
    assert adapter.end_ids(5) == (1, 5)


def test_refuses() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: got a SimpleNamespace"):
        TokenizerAdapter(SimpleNamespace(encode=None))
    silent = SimpleNamespace(encode=lambda text: [1], decode=str, eos_id=None)
    with pytest.raises(ConfigError, match=r"prefix_token_id: got none"):
        TokenizerAdapter(silent).prefix_id()
    options = {"convert_ids_to_tokens": None, "bos_token_id": None, "eos_token_id": 1}
    odd = SimpleNamespace(encode=lambda text, **options: [1, 2] if options else [1, 3, 2], **options)
    with pytest.raises(ConfigError, match=r"tokenizer: got \[1, 3, 2\] with"):
        TokenizerAdapter(odd)
