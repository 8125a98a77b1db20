"""A policy taught by examples, then by GRPO, with LOTION all along; exported to INT4, read back, sampled and scored."""

import math

import pytest
import torch
from effml_eval import GenerativeTask, LMScorer, SamplingParams, evaluate
from effml_eval.tasks import OpenQuestion
from effml_quant import Lotion, LotionConfig, QTensor, fake_quantize, load_quantized, save_quantized
from effml_quant.qat import quantized_weights, to_quantized
from effml_rl import GRPOTrainer, Sampler, SupervisedDataset, supervised_loss, token_logps
from effml_rl.policy_config import grpo
from effml_rl.verifiers import WordProblemMatch
from effml_shared.data import Loader
from effml_shared.data.miniature import MINIATURE_FORMATS, MiniatureTokenizer, miniature_problems
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep
from effml_shared.transformer import Transformer, TransformerConfig

TOKENIZER = MiniatureTokenizer()
CODE = MINIATURE_FORMATS[0]
CONFIG = TransformerConfig(n_layers=1, d_model=48, n_heads=4, d_ff=96, vocab_size=TOKENIZER.vocab_size)
PROBLEMS = miniature_problems(ops=(1, 1), numbers=(1, 9), ood_ops=(2, 2)).problems(400, "train")
STEPS, PROMPTS, SAMPLES = 6, 8, 4


class History(Hook):
    def __init__(self):
        self.rows = []

    def on_step(self, loop, metrics):
        self.rows.append(dict(metrics))


@pytest.fixture(scope="module")
def trained():
    """The policy, its LOTION and the metrics of each step of GRPO."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    lotion = Lotion(model, LotionConfig("int4", granularity="channel"))

    questions = [TOKENIZER.encode(problem.question) for problem in PROBLEMS]
    answers = [[*TOKENIZER.encode(CODE.render(problem)), TOKENIZER.eos_id] for problem in PROBLEMS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lotion.attach(optimizer)
    step = GradientStep(model, optimizer, lotion.counting(supervised_loss))
    data = Loader(SupervisedDataset(questions, answers))
    Loop(step, data, cosine(32, 40 * 32), budget=Budget(steps=40), hooks=[lotion]).run()
    lotion.detach()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lotion.attach(optimizer, n_terms=PROMPTS * SAMPLES)
    config = grpo(prompts_per_step=PROMPTS, samples=SAMPLES, max_completion=16)
    verifier = WordProblemMatch(formats=MINIATURE_FORMATS)
    trainer = GRPOTrainer(model, verifier, config, tokenizer=TOKENIZER, optimizer=optimizer, hooks=[lotion])
    history = History()
    trainer.fit([(p.question, p.answer) for p in PROBLEMS], budget=Budget(steps=STEPS), hooks=[history])
    return model.eval(), lotion, history.rows


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The policy as somebody else reads it: from a file of INT4 codes and what was not quantised."""
    model, lotion, _ = trained
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    save_quantized(path, {**model.state_dict(), **to_quantized(model, lotion.quantizer)}, {"format": "int4"})
    stored, metadata = load_quantized(path)
    assert metadata == {"format": "int4"}
    policy = Transformer(CONFIG, seed=1)
    policy.load_state_dict({n: t.dequantize() if isinstance(t, QTensor) else t for n, t in stored.items()})
    return policy.eval(), stored


def test_rewards_are_finite_and_the_penalty_is_part_of_every_step(trained):
    _, _, history = trained
    assert len(history) == STEPS
    assert all(math.isfinite(value) for metrics in history for value in metrics.values())
    assert all(0 <= metrics["reward"] <= 1 and metrics["penalty"] > 0 for metrics in history)
    assert any(0.1 < metrics["reward"] < 1 for metrics in history)  # an untrained policy is never right


def test_the_file_holds_the_weights_that_training_prepared_for_and_half_a_byte_for_each(trained, exported):
    model, lotion, _ = trained
    policy, stored = exported
    assert set(lotion.weights) == {name for name, tensor in stored.items() if isinstance(tensor, QTensor)}
    for name, parameter in policy.named_parameters():
        weight = model.get_parameter(name)
        if name in lotion.weights:
            assert stored[name].codes.nbytes == weight.numel() / 2
            weight = fake_quantize(weight.detach(), lotion.quantizer)
        assert torch.equal(parameter, weight), name


def test_the_exported_policy_samples_what_the_fake_quantised_one_does_and_agrees_on_its_likelihood(trained, exported):
    model, lotion, _ = trained
    policy, _ = exported
    questions = [problem.question for problem in PROBLEMS[:12]]
    batch = Sampler(policy, TOKENIZER, max_new_tokens=16).generate(questions, n=4)
    with quantized_weights(model, lotion.quantizer), torch.no_grad():
        theirs = Sampler(model, TOKENIZER, max_new_tokens=16).generate(questions, n=4)
        fake = token_logps(model, batch.input_ids, batch.attention_mask, batch.prompt_ids.shape[1]).logps
    with torch.no_grad():
        ours = token_logps(policy, batch.input_ids, batch.attention_mask, batch.prompt_ids.shape[1]).logps
    assert torch.equal(batch.completion_ids, theirs.completion_ids)
    assert torch.equal(ours, fake)
    mask = batch.completion_mask
    torch.testing.assert_close(ours[mask], batch.sampler_logps[mask], rtol=0, atol=2e-5)


def test_the_evaluation_reads_what_the_sampler_writes(exported):
    policy, _ = exported
    problems = PROBLEMS[:24]
    questions = [OpenQuestion(id=str(i), prompt=p.question, golds=(CODE.render(p),)) for i, p in enumerate(problems)]
    task = GenerativeTask(name="code", questions=questions, sampling=SamplingParams(max_new_tokens=16))
    result = evaluate(LMScorer(policy, TOKENIZER), task)
    sampler = Sampler(policy, TOKENIZER, max_new_tokens=16, temperature=0.0)
    batch = sampler.generate([problem.question for problem in problems], n=1)
    rows = zip(batch.completion_ids, batch.completion_mask, strict=True)
    written = [TOKENIZER.decode(ids[mask]) for ids, mask in rows]
    assert [line["output"] for line in result.samples("code")] == written
    assert result.metrics["code"]["exact_match"].value == sum(
        text == CODE.render(problem) for text, problem in zip(written, problems, strict=True)
    ) / len(problems)
