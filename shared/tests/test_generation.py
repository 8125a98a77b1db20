from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_shared.errors import ConfigError
from effml_shared.generation import draw, filter_logits, generate, make_decoder, unwrap
from effml_shared.tensors import gather_log_probs, left_pad
from effml_shared.transformer import Transformer, TransformerConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor, nn

CONFIG = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=40)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [35], [8, 9]]


@pytest.fixture(scope="module", params=["rope", "alibi"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return Transformer(replace(CONFIG, position=request.param)).double()


@torch.no_grad()
def continuation(model: Transformer, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding by running everything again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        logits = model(torch.tensor([ids])).logits
        assert logits is not None
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


# Filters and draws.


@pytest.mark.parametrize(("top_p", "kept"), [(0.45, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_table(top_p: float, kept: int, dtype: torch.dtype) -> None:
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=dtype).log()[:, order]
    assert filter_logits(logits, top_p=top_p).isfinite().tolist() == [(order < kept).tolist()]


def test_top_k_breaks_ties_by_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert filter_logits(logits, top_k=3).isfinite().int().tolist() == [[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]]
    assert torch.equal(filter_logits(logits, top_k=9), logits)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**31), st.floats(0.3, 3), st.integers(0, 12), st.floats(0.05, 1), st.sampled_from([0.0, 0.01, 0.2])
)
def test_filters_equal_hugging_face(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    expected = process.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = process.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = process.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = process.MinPLogitsWarper(min_p)(None, expected)
    got = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    filtered = filter_logits(logits, temperature=1.3, top_k=9, top_p=0.93, min_p=0.02)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = draw(filtered.expand(200_000, -1), uniform).bincount(minlength=12).double()
    probs = filtered[0].double().softmax(0)
    assert not counts[probs == 0].any()
    kept = probs > 0
    assert chisquare(counts[kept].numpy(), (probs[kept] * 200_000).numpy()).pvalue > 1e-3


def test_draw_at_the_ends_takes_ids_that_are_possible() -> None:
    inf = torch.inf
    logits = torch.tensor([[-inf, 0.0, 0.0, -inf], [-inf, 0.0, 0.0, -inf], [-inf, 0.0, 0.0, -inf]])
    assert draw(logits, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [1, 2, 2]


# Generation.


def test_greedy_batch_equals_full_recomputation_row_by_row(model: Transformer) -> None:
    ids, mask = left_pad(PROMPTS, pad_id=0)
    out = generate(model, ids, mask, max_new_tokens=9)
    assert torch.equal(out.ids[:, :6], ids)
    assert out.ids[:, 6:].tolist() == [continuation(model, prompt, 9) for prompt in PROMPTS]
    assert torch.equal(generate(model, ids, mask, max_new_tokens=9, do_sample=True, temperature=0).ids, out.ids)


def test_a_seeded_row_does_not_depend_on_its_batch(model: Transformer) -> None:
    ids, mask = left_pad(PROMPTS, pad_id=0)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.95}
    whole = generate(model, ids, mask, max_new_tokens=9, seeds=[7, 8, 9, 7], **options)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (7, 8, 9, 7), strict=True)):
        alone = generate(model, torch.tensor([prompt]), max_new_tokens=9, seeds=[seed], **options)
        assert torch.equal(alone.ids[0, len(prompt) :], whole.ids[row, 6:])
    longer = generate(model, ids, mask, max_new_tokens=20, seeds=[7, 8, 9, 7], **options)
    assert torch.equal(longer.ids[:, :15], whole.ids)
    other = generate(model, ids, mask, max_new_tokens=9, seeds=[17, 18, 19, 17], **options)
    assert not torch.equal(other.ids, whole.ids)


def test_one_generator_for_all_rows(model: Transformer) -> None:
    ids = torch.tensor([[1, 2], [1, 2]])
    rows = [
        generate(model, ids, max_new_tokens=8, do_sample=True, generator=torch.Generator().manual_seed(5)).ids
        for _ in range(2)
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0][0], rows[0][1])


def test_several_sequences_per_prompt_equal_repeated_prompts(model: Transformer) -> None:
    ids, mask = left_pad(PROMPTS, pad_id=0)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "seeds": list(range(12))}
    several = generate(model, ids, mask, num_return_sequences=3, **options)
    repeated = generate(model, ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), **options)
    assert torch.equal(several.ids, repeated.ids)


def test_rows_end_at_end_of_sequence_and_then_only_pad(model: Transformer) -> None:
    ids, mask = left_pad(PROMPTS, pad_id=0)
    free = generate(model, ids, mask, max_new_tokens=9, return_logprobs=True)
    ends = [int(free.ids[0, 6 + 2]), int(free.ids[1, 6 + 4]), int(free.ids[2, 6])]
    out = generate(model, ids, mask, max_new_tokens=9, eos_token_id=ends, pad_token_id=39, return_logprobs=True)
    assert out.log_probs is not None
    assert free.log_probs is not None
    for row in range(4):
        text = free.ids[row, 6:].tolist()
        length = next((i + 1 for i, token in enumerate(text) if token in ends), 9)
        assert out.mask[row].tolist() == [i < length for i in range(out.mask.shape[1])]
        assert out.ids[row, 6:].tolist() == (text[:length] + [39] * 9)[: out.mask.shape[1]]
        assert not out.log_probs[row, length:].any()
        torch.testing.assert_close(out.log_probs[row, :length], free.log_probs[row, :length])


def test_stops_when_all_rows_have_ended(model: Transformer) -> None:
    ids = torch.tensor([[3, 1, 4], [3, 1, 4]])
    first = continuation(model, [3, 1, 4], 1)[0]
    out = generate(model, ids, max_new_tokens=50, eos_token_id=first)
    assert out.ids.tolist() == [[3, 1, 4, first]] * 2


def test_log_probs_equal_a_second_scoring(model: Transformer) -> None:
    ids, mask = left_pad(PROMPTS, pad_id=0)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 8, "seeds": [0, 1, 2, 3]}
    out = generate(model, ids, mask, max_new_tokens=9, return_logprobs=True, **options)
    full_mask = torch.cat([mask, out.mask], 1)
    with torch.no_grad():
        logits = model(out.ids, attention_mask=full_mask).logits
    assert logits is not None
    logits, new = logits[:, 5:-1], out.ids[:, 6:]
    sampled_from = torch.stack([filter_logits(step, temperature=0.7, top_k=8) for step in logits.unbind(1)], 1)
    for got, expected in ((out.log_probs, logits), (out.sampling_log_probs, sampled_from)):
        assert got is not None
        torch.testing.assert_close(got.double(), gather_log_probs(expected, new), rtol=0, atol=1e-6)


def test_training_mode_and_gradients_are_left_as_they_were(model: Transformer) -> None:
    model.train()
    model.model["norm"].eval()
    seen: list[bool] = []
    hook = model.register_forward_hook(lambda module, *_: seen.append(module.training))
    before = [module.training for module in model.modules()]
    assert not generate(model, torch.tensor([[1]]), max_new_tokens=2).ids.requires_grad
    hook.remove()
    assert seen == [False, False]
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_padded_vocabulary_is_never_drawn() -> None:
    model = Transformer(replace(CONFIG, vocab_size=3))
    out = generate(model, torch.zeros(64, 1, dtype=torch.int64), max_new_tokens=20, do_sample=True, temperature=50.0)
    assert out.ids.max() == 2


@pytest.mark.parametrize("kind", ["own", "hugging face"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_decoders_fork_and_select_rows(kind: str, padded: bool) -> None:
    network: nn.Module = Transformer(replace(CONFIG, vocab_rows=40)).double()
    if kind == "hugging face":
        transformers = pytest.importorskip("transformers")
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, **shape)
        network = transformers.LlamaForCausalLM(config).double().eval()
    prompts = PROMPTS if padded else [[1, 2], [3, 4], [5, 6], [7, 8]]
    ids, mask = left_pad(prompts, pad_id=0)
    decoder = make_decoder(network, 10)
    decoder(ids, mask if padded else None)
    texts = [prompts[2], prompts[0], prompts[2]]
    for fork in (decoder.fork(torch.tensor([2, 0, 2])), decoder.fork(torch.tensor([2, 0, 2]))):
        fork(torch.tensor([[5], [6], [7]]))
        fork.select(torch.tensor([2, 1]))
        logits = fork(torch.tensor([[8], [9]]))
        for row, text in enumerate(([*texts[2], 7, 8], [*texts[1], 6, 9])):
            torch.testing.assert_close(logits[row], network(torch.tensor([text])).logits[0, -1], rtol=0, atol=1e-10)


def test_wrappers_are_taken_off_down_to_what_adapts_the_model() -> None:
    class Adapter(nn.Module):
        """Hands on what it does not have, as adapters do."""

        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base, name)

    network = Transformer(CONFIG)
    adapter = Adapter(torch.compile(network))  # type: ignore[arg-type]
    assert unwrap(network) is unwrap(torch.compile(network)) is network  # type: ignore[arg-type]
    assert unwrap(adapter) is adapter


@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_models_decode_alike(padded: bool) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, **shape))
    ours = Transformer(replace(CONFIG, vocab_rows=40))
    theirs.load_state_dict(ours.state_dict())
    ids, mask = left_pad(PROMPTS if padded else [[1, 2], [3, 4]], pad_id=0)
    greedy = generate(theirs, ids, mask, max_new_tokens=8)
    reference = theirs.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(greedy.ids, reference)
    assert torch.equal(generate(ours, ids, mask, max_new_tokens=8).ids, reference)
    options: dict[str, Any] = {"do_sample": True, "seeds": list(range(2 * len(ids))), "num_return_sequences": 2}
    sampled: list[Tensor] = [generate(m, ids, mask, max_new_tokens=8, **options).ids for m in (theirs, ours)]
    assert torch.equal(*sampled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected at least 1"),
        ({"temperature": -0.1}, "temperature: got -0.1, expected at least 0"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"min_p": 1.5}, "min_p: got 1.5, expected 0 to 1"),
        ({"seeds": [1]}, "seeds: got 1 of them, expected one for each of 2 rows"),
        ({"seeds": [1, 2], "generator": torch.Generator()}, "generator: got seeds too"),
        ({"num_return_sequences": 0}, "num_return_sequences: got 0"),
        ({"attention_mask": torch.tensor([[1, 1], [1, 0]])}, "attention_mask: got padding on the right"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "input_ids: got .2, 0., expected at least one token"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input_ids": torch.zeros(2, 2, dtype=torch.int64), "max_new_tokens": 1, **options}
    with pytest.raises(ConfigError, match=message):
        generate(Transformer(CONFIG), **arguments)
