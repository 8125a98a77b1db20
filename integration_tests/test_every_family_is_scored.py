"""Every causal model of the project under every scorer of the project: one number for one text, however it is asked."""

import pytest
import torch
from effml_arch import (
    RecurrentTransformer,
    RecurrentTransformerConfig,
    SlidingWindowConfig,
    SlidingWindowTransformer,
    convert_transformer,
)
from effml_diffusion import DiffusionTransformer, DiffusionTransformerConfig
from effml_eval import LMScorer, MultipleChoiceTask, PerplexityTask, evaluate
from effml_eval.tasks import Document, choice_question
from effml_quant import PrecisionScheme, apply_scheme
from effml_rl import Sampler, token_logps
from effml_shared.data import ByteTokenizer
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer, TransformerConfig

SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "vocab_size": 258}
TOKENIZER = ByteTokenizer()
TEXTS = ["Call me Ishmael.", "It was the best of times, it was the worst of times.", "é", "So it goes. " * 6]
QUESTIONS = [
    choice_question("blank", "", ["one", "three"], 0),
    *(choice_question(str(n), f"{n} + {n} =", [str(2 * n), str(n), "many more than that"], 0) for n in range(5)),
]
TASKS = [
    PerplexityTask(name="texts", questions=[Document(id=str(i), text=text) for i, text in enumerate(TEXTS)]),
    MultipleChoiceTask(name="sums", questions=QUESTIONS),
]


def randomised(model):
    """Make logits differ much, so that agreement means something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def hugging_face_recurrent():
    pytest.importorskip("transformers")
    from effml_arch.hugging_face import RecurrentTransformerForCausalLM

    return RecurrentTransformerForCausalLM.from_effml(FAMILIES["recurrent"]())


def llama():
    pytest.importorskip("transformers")
    from effml_arch.hugging_face import to_hugging_face

    return to_hugging_face(FAMILIES["transformer"]()).double().eval()


def in_low_precision():
    model = FAMILIES["transformer"]()
    apply_scheme(model, PrecisionScheme.recommended())
    return model


FAMILIES = {
    "transformer": lambda: randomised(Transformer(TransformerConfig(**SHAPE))),
    "tied, ALiBi": lambda: randomised(Transformer(TransformerConfig(**SHAPE, tied=True, position="alibi"))),
    "recurrent": lambda: randomised(RecurrentTransformer(RecurrentTransformerConfig(**SHAPE))),
    "recurrent, naive": lambda: randomised(
        RecurrentTransformer(RecurrentTransformerConfig(**SHAPE, backend="naive", recurrent_layers=(1,)))
    ),
    "sliding window": lambda: randomised(SlidingWindowTransformer(SlidingWindowConfig(**SHAPE, window=8))),
    "recurrent in Hugging Face": hugging_face_recurrent,
    "Llama": llama,
    "E4M3": in_low_precision,
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def result(model):
    return evaluate(LMScorer(model, TOKENIZER), TASKS)


def nats(model, ids, start):
    """Return the log-likelihood of ids[start:] from one plain forward pass."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        logps = model(ids).logits.double().log_softmax(-1)[0, :-1]
    return float(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def asked():
    """Return (context ids, continuation ids) of every request of both tasks, a text's context being the end token."""
    opening = [TOKENIZER.eos_id]
    texts = [(opening, list(TOKENIZER.encode(text))) for text in TEXTS]
    pairs = [pair for question in QUESTIONS for pair in question.pairs]
    return texts, [
        (list(TOKENIZER.encode(context)) or opening, list(TOKENIZER.encode(said))) for context, said in pairs
    ]


def scores(result):
    return [[ll for line in result.samples(name) for ll in line["lls"]] for name in ("texts", "sums")]


def test_the_evaluation_reports_the_likelihood_of_a_plain_forward_pass(model, result):
    for found, rows in zip(scores(result), asked(), strict=True):
        assert found == pytest.approx([nats(model, [*before, *said], len(before)) for before, said in rows], abs=1e-9)


def test_the_harness_is_told_the_same(model, result):
    pytest.importorskip("lm_eval")
    from effml_eval.harness import EffmlLM
    from lm_eval.api.instance import Instance

    def ask(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=words, idx=i) for i, words in enumerate(arguments)]

    harness = EffmlLM(model, TOKENIZER)
    pairs = [tuple(pair) for question in QUESTIONS for pair in question.pairs]
    texts, sums = scores(result)
    rolling = harness.loglikelihood_rolling(ask("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True)
    assert rolling == pytest.approx(texts, abs=1e-9)
    found = harness.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    assert [logprob for logprob, _ in found] == pytest.approx(sums, abs=1e-9)


def test_the_sampler_and_the_trainer_of_policies_agree_on_its_samples(model):
    batch = Sampler(model, TOKENIZER, max_new_tokens=6).generate(["2 + 2 =", "So it"], n=3)
    with torch.no_grad():
        trainer = token_logps(model, batch.input_ids, batch.attention_mask, batch.prompt_ids.shape[1]).logps
    rows = zip(batch.input_ids, batch.attention_mask, batch.completion_mask, trainer, strict=True)
    for ids, mask, completion, logps in rows:
        real = ids[mask].tolist()
        alone = nats(model, real, len(real) - int(completion.sum()))
        assert float(logps[completion].sum()) == pytest.approx(
            alone, abs=1e-4 if logps.dtype != torch.float64 else 1e-9
        )
    mask = batch.completion_mask
    torch.testing.assert_close(trainer[mask].float(), batch.sampler_logps[mask].float(), rtol=0, atol=2e-5)


def test_families_that_compute_the_same_have_the_same_scores():
    plain = FAMILIES["transformer"]()
    expected = scores(evaluate(LMScorer(plain, TOKENIZER), TASKS))
    window = SlidingWindowTransformer(SlidingWindowConfig(**SHAPE, window=256)).double()
    window.load_state_dict(plain.state_dict())
    same = {"no recurrence yet": convert_transformer(plain, write_mix=0.0), "a window for everything": window.eval()}
    for name, model in same.items():
        for found, theirs in zip(scores(evaluate(LMScorer(model, TOKENIZER), TASKS)), expected, strict=True):
            assert found == pytest.approx(theirs, abs=1e-9), name
    recurrent = scores(evaluate(LMScorer(convert_transformer(plain), TOKENIZER), TASKS))
    assert recurrent[0] != pytest.approx(expected[0], abs=1e-2)


def test_a_model_that_sees_what_follows_is_refused():
    config = DiffusionTransformerConfig(n_layers=1, d_model=32, n_heads=4, vocab_size=259)
    with pytest.raises(ConfigError, match=r"^model: got a DiffusionTransformer that is not causal"):
        LMScorer(DiffusionTransformer(config), TOKENIZER)
