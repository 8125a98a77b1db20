from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from effml_eval.scoring import GenerationRequest, LMScorer, SamplingParams, Score
from effml_eval.scoring.rolling_windows import rolling_windows
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.transformer import Transformer, TransformerConfig, TransformerOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

BYTES = ByteTokenizer()
CONFIG = TransformerConfig(n_layers=2, d_model=32, n_heads=2, d_ff=32, vocab_size=258, init="normal")
PAIRS = [
    ("The quick brown", " fox"),
    ("The quick brown", " dog jumps"),
    ("The quick brown", " a"),
    ("The quick brown", " b"),
    ("", "opening"),
    ("  ", "opening"),
    ("trailing  ", "space"),
    ("A rather long context, far longer than the others are, " * 3, "x"),
    ("A rather long context, far longer than the others are, " * 3, "and its continuation"),
    ("y", "z"),
]


class Table(nn.Module):
    """A model that knows only the last token: logits are rows of a table (vocab, vocab)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.dropout, self.shapes = nn.Parameter(table), nn.Dropout(0.5), list[tuple[int, ...]]()

    def forward(self, ids: Tensor) -> TransformerOutput:
        assert not self.dropout.training
        self.shapes.append(tuple(ids.shape))
        return TransformerOutput(logits=self.table[ids.clamp(max=len(self.table) - 1)])


def uniform(vocab: int = 256) -> Table:
    return Table(torch.zeros(vocab, vocab, dtype=torch.float64))


def bigram(vocab: int = 257) -> Table:
    return Table(torch.randn(vocab, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def transformer(dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(CONFIG, seed=1).to(dtype)
    with torch.no_grad():  # sharper than an untrained one, so that faults show
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    return model


def by_hand(model: nn.Module, context: Sequence[int], continuation: Sequence[int], max_length: int = 2048) -> float:
    """Score one pair of token lists by one call of the model."""
    tokens = torch.tensor([*context, *continuation][-(max_length + 1) :])
    with torch.no_grad():
        logits = model.eval()(tokens[None, :-1]).logits[0]
    log_probs = logits.double().log_softmax(-1)
    return sum(float(log_probs[i - 1, tokens[i]]) for i in range(len(tokens) - len(continuation), len(tokens)))


def tokens_of(context: str, continuation: str) -> tuple[list[int], list[int]]:
    kept = context.rstrip()
    moved = (context[len(kept) :] + continuation).encode()
    return list(kept.encode()) or [BYTES.eos_id], list(moved)


def close(found: list[Score], expected: list[float], tolerance: float) -> None:
    assert [score.logprob for score in found] == pytest.approx(expected, rel=0, abs=tolerance)


# Text likelihood


@pytest.mark.parametrize("vocab", [256, 300])
def test_a_uniform_model(vocab: int) -> None:
    text = "Ünïcode and ascii"
    scorer = LMScorer(uniform(vocab), BYTES, max_length=5)
    (found,) = scorer.rolling([text])
    assert (found.n_tokens, found.n_bytes, found.n_words) == (len(text.encode()), len(text.encode()), 3)
    assert math.exp(-found.logprob / found.n_tokens) == pytest.approx(vocab, rel=1e-12)
    if vocab == 256:
        assert -found.logprob / math.log(2) / found.n_bytes == pytest.approx(8, rel=1e-12)
    choices = [("Question", f" {choice}") for choice in ("one", "two", "six")]
    scores = scorer.score(choices)
    assert len({score.logprob for score in scores}) == 1  # so that the first choice is taken
    assert scores[0].logprob == pytest.approx(-4 * math.log(vocab), rel=1e-12)
    assert not any(score.greedy for score in scores)


def test_a_known_transition_matrix_for_every_length_and_context() -> None:
    model, text = bigram(), "to be or not to be"
    ids = [256, *text.encode()]
    table = model.table.detach().log_softmax(-1)
    expected = sum(float(table[a, b]) for a, b in pairwise(ids))
    for max_length in (1, 2, 3, 5, 17, 18, 40):
        for context in {1, 2, max_length // 2, max_length} - {0}:
            if context <= max_length:
                scorer = LMScorer(model, BYTES, max_length=max_length, rolling_context=context, batch_tokens=7)
                (found,) = scorer.rolling([text])
                assert found.logprob == pytest.approx(expected, rel=1e-12)
                assert found.n_tokens == 18


@pytest.mark.parametrize(("max_length", "context"), [(7, 1), (7, 3), (7, 7), (100, 1), (100, 50)])
def test_rolling_windows_by_hand(max_length: int, context: int) -> None:
    model, text = transformer(), "a text of some thirty letters."
    slots = [256, *text.encode()]
    expected = sum(
        by_hand(model, slots[w.start : w.stop - w.n_scored], slots[w.stop - w.n_scored : w.stop])
        for w in rolling_windows(len(text), max_length, context)
    )
    (found,) = LMScorer(model, BYTES, max_length=max_length, rolling_context=context).rolling([text])
    assert found.logprob == pytest.approx(expected, abs=1e-9)


def test_documents_do_not_see_each_other() -> None:
    texts = ["", "first", "second document", "a" * 70, "first"]
    scorer = LMScorer(transformer(), BYTES, max_length=16, batch_tokens=64)
    alone = [scorer.rolling([text])[0] for text in texts]
    for one, among in zip(alone, scorer.rolling(texts), strict=True):
        assert one[1:] == among[1:]
        assert one.logprob == pytest.approx(among.logprob, abs=1e-9)
    assert alone[0] == (0.0, 0, 0, 0)
    assert scorer.rolling([]) == []


# Continuations


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
def test_scores_by_hand(share: bool, batch_tokens: int) -> None:
    model = transformer()
    expected = [by_hand(model, *tokens_of(*pair)) for pair in PAIRS]
    scorer = LMScorer(model, BYTES, share_prefix=share, batch_tokens=batch_tokens)
    scores = scorer.score(PAIRS)
    close(scores, expected, 1e-9)
    assert [score.n_tokens for score in scores] == [len(tokens_of(*pair)[1]) for pair in PAIRS]
    assert scorer.score([]) == []


@pytest.mark.parametrize("share", [True, False])
def test_contexts_are_cut_from_the_left(share: bool) -> None:
    model = transformer()
    scorer = LMScorer(model, BYTES, max_length=24, share_prefix=share)
    expected = [by_hand(model, *tokens_of(*pair), max_length=24) for pair in PAIRS]
    scores = scorer.score(PAIRS)
    close(scores, expected, 1e-9)
    assert [s.n_truncated for s in scores] == [max(0, sum(map(len, tokens_of(*pair))) - 25) for pair in PAIRS]
    with pytest.raises(ConfigError, match=r"continuation: got 25 tokens, expected at most max_length=24"):
        scorer.score([("x", "c" * 25)])


@pytest.mark.parametrize("share", [True, False])
def test_batches_change_nothing_in_float32(share: bool) -> None:
    model = transformer(torch.float32)
    alone = [LMScorer(model, BYTES).score([pair])[0].logprob for pair in PAIRS]
    for pairs in (PAIRS, PAIRS[::-1], [*PAIRS, ("long " * 100, "and longer")]):
        scores = dict(zip(pairs, LMScorer(model, BYTES, share_prefix=share).score(pairs), strict=True))
        close([scores[pair] for pair in PAIRS], alone, 1e-5)


def test_the_order_of_requests_changes_no_bit() -> None:
    scorer = LMScorer(transformer(torch.float32), BYTES, batch_tokens=300)
    assert scorer.score(PAIRS[::-1]) == scorer.score(PAIRS)[::-1]


@settings(max_examples=15, deadline=None)
@given(batch_tokens=st.sampled_from([40, 200, 700]), done=st.sets(st.integers(0, 9)))
def test_batches_run_alone_after_an_interruption_change_no_bit(batch_tokens: int, done: set[int]) -> None:
    scorer = LMScorer(transformer(torch.float32), BYTES, batch_tokens=batch_tokens)
    whole, texts = scorer.score(PAIRS), ["".join(pair) for pair in PAIRS]
    rolling = scorer.rolling(texts)
    for batch in scorer.plan(PAIRS):
        if not done.issuperset(batch):
            assert scorer.score([PAIRS[i] for i in batch]) == [whole[i] for i in batch]
    for batch in scorer.plan(texts):
        if not done.issuperset(batch):
            assert scorer.rolling([texts[i] for i in batch]) == [rolling[i] for i in batch]


def test_greedy_is_what_decoding_would_write() -> None:
    model = transformer()
    (written,) = LMScorer(model, BYTES).generate([GenerationRequest("some", SamplingParams(max_new_tokens=3))])
    ids = list(b"some")
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 256]
    scores = LMScorer(model, BYTES).score_token_pairs([(ids[:4], ids[4:]), (ids[:4], other[4:]), (ids[:4], ids[4:5])])
    assert [score.greedy for score in scores] == [True, False, True]
    assert written.text == BYTES.decode(ids[4:])
    with pytest.raises(ConfigError, match=r"pairs: got one without tokens"):
        LMScorer(model, BYTES).score_token_pairs([([], [1])])


# Other people's models


def hugging_face(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64}
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads)).double()
    config = transformers.GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(config).double()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hugging_face(name: str) -> None:
    model = hugging_face(name)
    pairs = [*PAIRS, ("e" * 64, "f"), ("e" * 64, "ggggg")]  # up to the last position
    expected = [by_hand(model, *tokens_of(*pair), max_length=64) for pair in pairs]
    for share in (True, False):
        scorer = LMScorer(model, BYTES, share_prefix=share)
        assert (scorer.max_length, scorer.settings["share_prefix"]) == (64, share)
        close(scorer.score(pairs), expected, 1e-9)
    params = SamplingParams(max_new_tokens=8, temperature=1.0)
    requests = [GenerationRequest(text, params, sample) for text in ("a", "longer") for sample in range(2)]
    alone = [LMScorer(model, BYTES).generate([request])[0] for request in requests]
    assert LMScorer(model, BYTES).generate(requests) == alone


def test_gradients_modes_and_random_state_stay() -> None:
    model = transformer().train()
    list(model.modules())[3].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    scorer = LMScorer(model, BYTES)
    requests = [GenerationRequest("p", SamplingParams(max_new_tokens=2, temperature=1.0))]
    for call in (lambda: scorer.score(PAIRS), lambda: scorer.rolling(["text"]), lambda: scorer.generate(requests)):
        call()
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ConfigError, match=r"token ids"):
        scorer.score_token_pairs([([1], [300])])
    assert [module.training for module in model.modules()] == modes


def test_autocast() -> None:
    model = transformer(torch.float32)
    plain, narrow = (LMScorer(model, BYTES, dtype=dtype) for dtype in (None, torch.bfloat16))
    first, second = plain.score(PAIRS)[1].logprob, narrow.score(PAIRS)[1].logprob
    assert 1e-6 < abs(first - second) < 0.5
    assert (plain.settings["dtype"], narrow.settings["dtype"]) == (None, "bfloat16")


# Memory


class Small(Table):
    """A table in a machine that holds at most so many tokens at once."""

    def __init__(self, room: int) -> None:
        super().__init__(bigram().table.detach())
        self.room = room

    def forward(self, ids: Tensor) -> TransformerOutput:
        if ids.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(ids)


def test_a_batch_that_does_not_fit_is_halved_and_remembered() -> None:
    pairs = [("abcdefg", f"{i} continuation") for i in range(8)]
    expected = LMScorer(bigram(), BYTES).score(pairs)
    scorer = LMScorer(Small(50), BYTES)
    close(scorer.score(pairs), [score.logprob for score in expected], 1e-12)
    assert scorer.work.halvings == len(scorer.too_large) == 3  # of 8 and twice of 4
    again = LMScorer(Small(1000), BYTES)
    again.too_large |= scorer.too_large
    again.score(pairs)
    assert again.model.model.shapes == [(2, 20)] * 4
    assert again.work.halvings == 0


def test_one_row_that_does_not_fit_is_an_error() -> None:
    scorer = LMScorer(Small(5), BYTES)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score([("too long for it", "x")])
    with pytest.raises(torch.OutOfMemoryError):
        scorer.generate([GenerationRequest("too long for it", SamplingParams(max_new_tokens=3))])


def test_other_errors_are_not_taken_for_it() -> None:
    model = bigram()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match=r"a fault"):
        LMScorer(model, BYTES).score(PAIRS)


# Generation


def requests_of(prompts: Sequence[str], n_samples: int, **sampling: Any) -> list[GenerationRequest]:
    params = SamplingParams(**{"max_new_tokens": 12, "temperature": 1.0, **sampling})
    return [GenerationRequest(prompt, params, sample, seed=5) for prompt in prompts for sample in range(n_samples)]


@pytest.mark.parametrize("model", [transformer(), bigram(300)])
def test_a_sample_depends_on_its_request_alone(model: nn.Module) -> None:
    prompts = ["", "a", "a prompt", "another, longer prompt"]
    requests = requests_of(prompts, 16)
    whole = dict(zip(requests, LMScorer(model, BYTES).generate(requests), strict=True))
    few = requests_of(prompts, 4)[::-1]
    assert len({whole[request].text for request in requests}) > 50
    for batch_tokens in (1, 100):  # one row at a time, and batches with unequal numbers of samples
        scorer = LMScorer(model, BYTES, batch_tokens=batch_tokens)
        assert scorer.generate(few) == [whole[request] for request in few]
        batch = scorer.plan(few)[-1]  # after an interruption
        assert scorer.generate([few[i] for i in batch]) == [whole[few[i]] for i in batch]
    other = LMScorer(model, BYTES).generate([request._replace(seed=6) for request in few])
    assert other != [whole[request] for request in few]


def test_greedy_samples_are_written_once() -> None:
    model = bigram(300)
    requests = requests_of(["same"], 5, temperature=0.0)
    written = LMScorer(model, BYTES).generate(requests)
    assert len(set(written)) == 1
    assert {shape[0] for shape in model.shapes} == {1}


def test_long_prompts_are_cut_and_room_is_demanded() -> None:
    scorer = LMScorer(bigram(), BYTES, max_length=8)
    (found,) = scorer.generate([GenerationRequest("zzzzzzzzza", SamplingParams(max_new_tokens=3))])
    (short,) = scorer.generate([GenerationRequest("a", SamplingParams(max_new_tokens=3))])
    assert found == short._replace(n_truncated=5)
    with pytest.raises(ConfigError, match=r"max_new_tokens: got 8, expected less than max_length=8"):
        scorer.generate([GenerationRequest("a", SamplingParams(max_new_tokens=8))])
    assert scorer.generate([]) == []


# Bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_length": 0}, r"max_length: got 0"),
        ({"batch_tokens": 0}, r"batch_tokens: got 0"),
        ({"max_length": 8, "rolling_context": 9}, r"rolling_context: got 9, expected 1 to max_length=8"),
        ({"rolling_context": 0}, r"rolling_context: got 0"),
        ({"dtype": torch.float32}, r"dtype: got torch.float32, expected one of None, torch.bfloat16"),
    ],
)
def test_refuses_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LMScorer(bigram(), BYTES, **options)


def test_refuses_models_that_look_ahead() -> None:
    with pytest.raises(ConfigError, match=r"model: got a Transformer that is not causal"):
        LMScorer(Transformer(TransformerConfig(n_layers=1, d_model=8, n_heads=1, causal=False)), BYTES)


def test_refuses_what_is_not_text() -> None:
    scorer: Any = LMScorer(bigram(), BYTES)
    with pytest.raises(ConfigError, match=r"requests: got \('a', \['b'\]\), expected pairs of texts"):
        scorer.score([("a", ["b"])])
    with pytest.raises(ConfigError, match=r"documents: got one text"):
        scorer.rolling("text")


def test_nan_is_an_error() -> None:
    table = torch.zeros(257, 257)
    table[ord("b"), 3] = math.nan
    scorer = LMScorer(Table(table), BYTES)
    for call in (
        lambda: scorer.score([("ab", "c")]),
        lambda: scorer.rolling(["abc"]),
        lambda: scorer.generate([GenerationRequest("ab", SamplingParams(max_new_tokens=1))]),
    ):
        with pytest.raises(NonFiniteError, match=r"logits: got NaN or infinity"):
            call()
    assert scorer.score([("bc", "d")])[0].logprob == pytest.approx(-math.log(257))  # not where it is scored


def test_tokens_that_the_model_does_not_have_are_an_error() -> None:
    narrow = Transformer(TransformerConfig(n_layers=1, d_model=8, n_heads=1, vocab_size=100, vocab_rows=100))
    with pytest.raises(ConfigError, match=r"token ids: got .*expected 0 to 99"):
        LMScorer(narrow, BYTES, prefix_token_id=0).score([("zebra", "s")])
    with pytest.raises(ConfigError, match=r"token ids: got .*expected 0 to 99"):
        LMScorer(narrow, BYTES, prefix_token_id=0).score([("", "z")])
    with pytest.raises(ConfigError, match=r"token ids: got .*expected 0 to 199"):
        LMScorer(uniform(200), BYTES).score([("", "😀")])
    with pytest.raises(ConfigError, match=r"model: got logits of shape"):
        LMScorer(nn.Identity(), BYTES).score([("a", "b")])
