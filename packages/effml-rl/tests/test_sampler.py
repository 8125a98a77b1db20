"""Sampling: exact log-probabilities, rows that depend on nothing but themselves, one prefill, and bad input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effml_rl.native_rows import NativeRows, native_rows
from effml_rl.rollout_batch import RolloutBatch, completion_mask
from effml_rl.sampler import Sampler
from effml_rl.solution_tree import SolutionTreeTask
from effml_rl.token_logps import token_logps
from effml_rl.verifiers.verdict import Verdict
from effml_rl.wall.temperature_sweep import TemperatureSweep
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.transformer import Transformer, TransformerConfig
from scipy.stats import chisquare
from torch import nn

CONFIG = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=40)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [35], [8, 9]]
KINDS = ["native", "torch", "llama", "gpt2"]


def network(kind: str = "native") -> nn.Module:
    """A float32 network decoded in C, one that a hook keeps from it, and two of Hugging Face's."""
    if kind in ("native", "torch"):
        model = Transformer(CONFIG)
        if kind == "torch":
            model.register_forward_hook(lambda *_: None)
        return model
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=40, n_positions=32)
        return transformers.GPT2LMHeadModel(config)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, **shape))


def sampler(model: Any = None, **options: Any) -> Sampler:
    defaults: dict[str, Any] = {"eos_token_id": [3, 4], "max_new_tokens": 12}
    return Sampler(network() if model is None else model, **defaults | options)


def rows_of(batch: RolloutBatch) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of every row."""
    assert batch.sampler_logps is not None
    parts = zip(batch.completion_ids, batch.sampler_logps, batch.completion_mask, strict=True)
    return [(ids[mask].tolist(), logps[mask].tolist()) for ids, logps, mask in parts]


def equal(a: RolloutBatch, b: RolloutBatch) -> bool:
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What a completion is.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_log_probabilities_equal_a_teacher_forced_pass(kind: str, temperature: float) -> None:
    model = network(kind).eval()
    batch = sampler(model, top_k=30, top_p=0.9, min_p=0.01, temperature=temperature).generate(PROMPTS, 6)
    with torch.no_grad():
        expected = token_logps(
            model, batch.input_ids, batch.attention_mask, batch.prompt_ids.shape[1], temperature=temperature
        )
    mask = batch.completion_mask
    assert batch.sampler_logps is not None
    torch.testing.assert_close(batch.sampler_logps[mask], expected.logps[mask], rtol=0, atol=1e-5)
    assert not batch.sampler_logps[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rows_equal_recomputation(kind: str) -> None:
    model = network(kind).eval()
    batch = sampler(model, eos_token_id=()).generate(PROMPTS, 2, temperature=0)
    for row, (ids, logps) in enumerate(rows_of(batch)):
        text = list(PROMPTS[row // 2])
        for token in ids:
            with torch.no_grad():
                assert model(torch.tensor([text])).logits[0, -1, :40].argmax() == token
            text.append(token)
        assert logps == [0.0] * 12
    assert batch.truncated.all()


@pytest.mark.parametrize("pad", [3, 0, None])
def test_rows_end_with_the_first_end_and_then_only_padding_follows(pad: int | None) -> None:
    batch = sampler(pad_token_id=pad).generate(PROMPTS * 4, 8)
    mask, truncated = completion_mask(batch.completion_ids, [3, 4])
    if pad != 0:  # then padding ends nothing
        assert torch.equal(batch.truncated, truncated)
        assert torch.equal(batch.completion_mask, mask)
    assert 0 < batch.truncated.float().mean() < 1
    assert 1 in batch.lengths
    assert (batch.completion_ids[~batch.completion_mask] == (0 if pad == 0 else 3)).all()
    assert batch.completion_ids.shape[1] == batch.lengths.max()
    assert batch.group_index.tolist() == [i // 8 for i in range(16 * 8)]
    assert [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)][
        ::8
    ] == 4 * PROMPTS
    short = sampler(max_new_tokens=1).generate(PROMPTS, 3)
    assert short.completion_ids.shape == (12, 1)


def test_first_tokens_follow_the_distribution() -> None:
    model = network()
    ids = sampler(model, max_new_tokens=1, temperature=0.8).generate([PROMPTS[0]], 20_000).completion_ids[:, 0]
    with torch.no_grad():
        probs = (model(torch.tensor([PROMPTS[0]])).logits[0, -1, :40].double() / 0.8).softmax(0)
    assert chisquare(ids.bincount(minlength=40).numpy(), (probs * 20_000).numpy()).pvalue > 1e-3


# What it depends on.


def many_prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 40, length).tolist() for length in random.integers(1, 40, 16)]


@pytest.mark.parametrize("kind", ["native", "llama"])
def test_a_row_is_bit_by_bit_the_same_in_a_batch_of_1_and_of_64(kind: str) -> None:
    model, prompts = network(kind), many_prompts()
    if native_rows(model, 1) is None:
        pytest.skip("no C compiler")
    whole = rows_of(sampler(model, max_new_tokens=30).generate(prompts, 4))
    assert rows_of(sampler(model, max_new_tokens=30, max_rows=1).generate(prompts, 4)) == whole
    for number, prompt in enumerate(prompts):
        assert rows_of(sampler(model, max_new_tokens=30).generate([prompt], 4)) == whole[4 * number : 4 * number + 4]
    assert len({len(ids) for ids, _ in whole}) > 8


@pytest.mark.parametrize("kind", ["torch", "gpt2"])
def test_elsewhere_a_row_has_the_same_tokens_and_log_probabilities_to_rounding(kind: str) -> None:
    model, prompts = network(kind), [prompt[:16] for prompt in many_prompts()]
    whole = rows_of(sampler(model).generate(prompts, 4))
    for number, prompt in enumerate(prompts):
        alone = rows_of(sampler(model).generate([prompt], 4))
        for (ids, logps), (other_ids, other) in zip(alone, whole[4 * number : 4 * number + 4], strict=True):
            assert ids == other_ids
            assert np.abs(np.subtract(logps, other)).max() < 1e-5


@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_max_rows_changes_nothing(kind: str, max_rows: int) -> None:
    model = network(kind).double() if kind == "torch" else network(kind)
    grid = [0.7, 0.0, 1.3]
    whole = sampler(model).generate_each(PROMPTS, grid, 5)
    parts = sampler(model, max_rows=max_rows).generate_each(PROMPTS, grid, 5)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.completion_ids, other.completion_ids)
        torch.testing.assert_close(one.sampler_logps, other.sampler_logps, rtol=0, atol=1e-12 if kind == "torch" else 0)


def test_a_row_depends_on_seed_draw_prompt_and_number_alone() -> None:
    model = network()
    eight = sampler(model).generate([PROMPTS[0]], 8)
    assert rows_of(sampler(model).generate([PROMPTS[0]], 3)) == rows_of(eight)[:3]
    longer = rows_of(sampler(model, max_new_tokens=30).generate([PROMPTS[0]], 8))
    assert [ids[:12] for ids, _ in longer] == [ids for ids, _ in rows_of(eight)]
    for other in (sampler(model, seed=1).generate([PROMPTS[0]], 8), sampler(model).generate([PROMPTS[0]], 8, draw=1)):
        assert rows_of(other) != rows_of(eight)
    twice = sampler(model).generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]], 4)
    assert rows_of(twice[:4]) == rows_of(twice[8:]) == rows_of(eight)[:4]
    assert twice.group_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_weights_are_read_anew_by_every_call() -> None:
    model = network()
    draws = sampler(model)
    before = rows_of(draws.generate(PROMPTS, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert rows_of(draws.generate(PROMPTS, 2)) == rows_of(sampler(model).generate(PROMPTS, 2)) != before


# What it costs.


def test_every_prompt_is_read_once_for_all_samples_and_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes, read = network("torch"), [], []
    model.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    grid, prompts = [0.5, 0.0, 1.0], [*PROMPTS, PROMPTS[0]]
    sampler(model, eos_token_id=range(8)).generate_each(prompts, grid, 4)
    assert shapes[:2] == [(4, 6), (5 * 3 * 4, 1)]
    assert all(new == 1 for _, new in shapes[1:])
    assert [rows for rows, _ in shapes[1:]] == sorted((rows for rows, _ in shapes[1:]), reverse=True)
    assert shapes[-1][0] < 60
    native, prefill = network(), NativeRows.prefill

    def counted(rows: NativeRows, prompts: Any) -> torch.Tensor:
        read.append(len(prompts))
        return prefill(rows, prompts)

    monkeypatch.setattr(NativeRows, "prefill", counted)
    together = sampler(native).generate_each(prompts, grid, 4)
    assert read == ([] if native_rows(native, 1) is None else [4])
    for temperature, batch in zip(grid, together, strict=True):
        assert equal(batch, sampler(native).generate(prompts, 4, temperature=temperature))


# Models and tokenizers.


def test_the_model_is_evaluated_and_left_as_it_was() -> None:
    model = Transformer(replace(CONFIG, resid_dropout=0.5))
    model.train()
    model.model["norm"].eval()
    before = [module.training for module in model.modules()]
    batch = sampler(model).generate(PROMPTS, 2)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    assert equal(batch, sampler(model.eval()).generate(PROMPTS, 2))
    assert not any(tensor.requires_grad for tensor in batch.tensors().values())


@pytest.mark.slow
def test_wrapped_models_decode_as_what_they_wrap(tmp_path: Path) -> None:
    model = network()
    expected = sampler(model).generate(PROMPTS, 2)
    assert equal(sampler(torch.compile(model)).generate(PROMPTS, 2), expected)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert equal(sampler(wrapped).generate(PROMPTS, 2), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["native", "llama"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_adapters_take_part(kind: str) -> None:
    peft = pytest.importorskip("peft")
    base = network(kind)
    before = sampler(base).generate(PROMPTS, 4)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(base, adapters)
    batch = sampler(model).generate(PROMPTS, 4)
    with torch.no_grad():
        expected = token_logps(model.eval(), batch.input_ids, batch.attention_mask, batch.prompt_ids.shape[1]).logps
        with model.disable_adapter():
            without = sampler(model).generate(PROMPTS, 4)
    assert batch.sampler_logps is not None
    mask = batch.completion_mask
    torch.testing.assert_close(batch.sampler_logps[mask], expected[mask], rtol=0, atol=1e-5)
    assert (
        [ids for ids, _ in rows_of(without)]
        == [ids for ids, _ in rows_of(before)]
        != [ids for ids, _ in rows_of(batch)]
    )


def test_text_goes_in_and_comes_out() -> None:
    tokenizer = ByteTokenizer()
    model = Transformer(replace(CONFIG, vocab_size=258))
    with torch.no_grad():
        model.lm_head.weight[256].mul_(3)  # type: ignore[union-attr]
    draws = Sampler(model, tokenizer, max_new_tokens=20)
    assert (draws.eos_token_ids, draws.pad_token_id) == ([256], 257)
    batch = draws.generate(["ab", "né"], 16)
    assert batch.prompt_ids[batch.prompt_mask].tolist() == [97, 98] * 16 + [110, 195, 169] * 16
    assert draws.texts(batch) == [tokenizer.decode(ids) for ids, _ in rows_of(batch)]
    assert not batch.truncated.all()


def test_a_sweep_over_temperatures_does_not_depend_on_its_groups() -> None:
    task = SolutionTreeTask(n_states=6, n_actions=6, n_contexts=6, n_problem=6, len_range=(1, 2), n_irrelevant=0)
    examples = list(task.sample(6))
    prompts, targets = [e.prompt for e in examples], [e.completion for e in examples]
    model = Transformer(replace(CONFIG, vocab_size=task.tokenizer.vocab_size))
    kept, cut = (Sampler(model, task.tokenizer, max_new_tokens=12, keep_end=keep) for keep in (True, False))
    ended = [text for text in kept.texts(kept.generate(prompts, 8)) if text.endswith("<pad>")]
    assert ended
    assert not any("<pad>" in text for text in cut.texts(cut.generate(prompts, 8)))
    seen: list[str] = []

    def verifier(prompts: Sequence[str], completions: Sequence[str], targets: Sequence[str]) -> list[Verdict]:
        seen.extend(completions)
        return task.verifier(prompts, completions, targets)

    for group in (1, 4):
        TemperatureSweep(kept.completions, verifier, [0.5, 1.0], n=3, greedy=True, group=group).run(prompts, targets)
    half = len(seen) // 2
    assert half == 6 * (2 * 3 + 1)
    assert sorted(seen[:half]) == sorted(seen[half:])


# Bad input.


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, r"prompts: got \[\], expected a list of at least one prompt"),
        ("text", {}, r"prompts: got 'text', expected a list"),
        (None, {}, r"prompts: got None, expected a list"),
        (["text"], {}, r"prompts: got a string and no tokenizer"),
        ([[1], []], {}, r"prompts: got no tokens in number 1"),
        ([1, 2], {}, r"prompts: got 1, expected strings or sequences of ids"),
        ([[1.5]], {}, r"prompts: got \[1.5\], expected strings or sequences of ids"),
        ([[1, 40]], {}, r"prompts: got ids 1 to 40, expected 0 to 39"),
        ([[-1]], {}, r"prompts: got ids -1 to -1"),
        ([[1]], {"n": 0}, r"n: got 0"),
        ([[1]], {"temperature": -1.0}, r"temperature: got -1.0"),
        ([[1]], {"temperature": float("nan")}, r"temperature: got nan"),
    ],
)
def test_bad_prompts_are_refused(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler().generate(prompts, **options)


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({"temperature": -0.1}, r"temperature: got -0.1"),
        ({"top_p": 0.0}, r"top_p: got 0.0"),
        ({"top_k": -1}, r"top_k: got -1"),
        ({"min_p": 1.1}, r"min_p: got 1.1, expected 0 to 1"),
        ({"max_new_tokens": 0}, r"max_new_tokens: got 0"),
        ({"max_rows": 0}, r"max_rows: got 0"),
        ({"pad_token_id": -1}, r"pad_token_id: got -1"),
        ({"pad_token_id": 1.5}, r"eos_token_id, pad_token_id: got .* and 1\.5, expected token ids"),
        ({"eos_token_id": "."}, r"eos_token_id, pad_token_id: got '\.' and"),
        ({"model": torch.nn.Linear(3, 3)}, r"model: got a Linear, expected a Transformer or a causal"),
    ):
        with pytest.raises(ConfigError, match=message):
            sampler(**options)
    with pytest.raises(ConfigError, match=r"model: got a NoneType"):
        Sampler(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"temperatures: got none"):
        sampler().generate_each(PROMPTS, [])
    with pytest.raises(ConfigError, match=r"pad_token_id: got 40, expected at most 39"):
        sampler(pad_token_id=40).generate(PROMPTS)
    with pytest.raises(ConfigError, match=r"tokenizer: got none, expected one for texts"):
        sampler().texts(sampler().generate(PROMPTS))


def test_prompts_beyond_the_context_and_broken_weights_are_told() -> None:
    model = network("gpt2")
    sampler(model, max_new_tokens=10).generate([[1] * 23], 1)  # the last token is not read
    with pytest.raises(ConfigError, match=r"prompts: got one of 24 tokens and max_new_tokens=10, .* context of 32"):
        sampler(model, max_new_tokens=10).generate([[1] * 24], 1)
    for kind in ("native", "torch"):
        broken = network(kind)
        with torch.no_grad():
            next(broken.parameters())[5] = torch.nan
        with pytest.raises(NonFiniteError, match=r"model: got logits that are NaN"):
            sampler(broken).generate([[5, 1]], 2)
