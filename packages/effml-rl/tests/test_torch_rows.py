"""Decoding with torch: equal to running everything again, and a batch that follows the rows that are alive."""

from __future__ import annotations

import pytest
import torch
from effml_rl.torch_rows import TorchRows
from effml_shared.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=40)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [35], [8, 9]]


def network(kind: str) -> torch.nn.Module:
    if kind == "ours":
        return Transformer(CONFIG).double()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=40, n_positions=32)
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize("kind", ["ours", "hugging face"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_rows_equal_recomputation_while_others_leave(kind: str, padded: bool) -> None:
    model = network(kind)
    prompts = PROMPTS if padded else [[1, 2], [3, 4], [5, 6], [7, 8]]
    rows = TorchRows(model, 12, 0, torch.device("cpu"))
    logits = rows.prefill(prompts)
    for source in ([0, 0, 1, 2, 2, 3, 3], [3, 1]):  # rows begin twice after one prefill
        rows.start(torch.tensor(source))
        texts, logits_now, kept = [list(prompts[i]) for i in source], logits[source], None
        for step in range(10):
            for text, got in zip(texts, logits_now, strict=True):
                torch.testing.assert_close(got[:40], model(torch.tensor([text])).logits[0, -1, :40], rtol=0, atol=1e-10)
            ids = torch.tensor([(7 * step + 3 * row) % 40 for row in range(len(texts))])
            kept = torch.arange(len(texts))[1:] if step in (1, 2, 4, 5) and len(texts) > 1 else None
            if kept is not None:
                texts, ids = texts[1:], ids[1:]
            for text, token in zip(texts, ids.tolist(), strict=True):
                text.append(token)
            logits_now = rows.step(ids, kept)


@torch.no_grad()
def test_the_batch_halves_with_the_rows() -> None:
    model, sizes = network("ours"), []
    model.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
    rows = TorchRows(model, 12, 0, torch.device("cpu"))
    rows.prefill(PROMPTS)
    rows.start(torch.arange(8) % 4)
    alive = 8
    for left in (8, 7, 4, 3, 2, 1, 1):
        rows.step(torch.zeros(left, dtype=torch.int64), torch.arange(left) if left < alive else None)
        alive = left
    assert sizes == [(4, 6), (8, 1), (8, 1), (8, 1), (3, 1), (3, 1), (1, 1), (1, 1)]
