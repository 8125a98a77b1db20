from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_eval.evaluation import evaluate
from effml_eval.scoring import GenerationRequest, LMScorer, SamplingParams
from effml_eval.tasks import (
    Document,
    GenerativeTask,
    MultipleChoiceTask,
    OpenQuestion,
    PerplexityTask,
    Task,
    choice_question,
)
from effml_shared import distributed
from effml_shared.data.tokenizers import ByteTokenizer
from effml_shared.errors import ConfigError, MissingExtra
from effml_shared.transformer import Transformer, TransformerConfig

harness = pytest.importorskip("effml_eval.harness", exc_type=ImportError)
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
instance = pytest.importorskip("lm_eval.api.instance")

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair.\n"
)
WORDS = TEXT.split()
LENGTH = 48


def tokenizer_of(template: str) -> Any:
    """Byte pairs learnt from the text, so that tokens merge across the boundary of a context."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 300, "special_tokens": ["<s>", "</s>"], "initial_alphabet": alphabet}
    trainer = tokenizers.trainers.BpeTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator([TEXT], trainer)
    specials = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=specials)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module", params=["$A", "<s> $A"], ids=["plain", "opening"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(request.param)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": LENGTH, "vocab_size": 300}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def theirs(model: Any, tokenizer: Any) -> Any:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    # Its cache of logits confuses requests of the same tokens that are divided at different places.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, logits_cache=False)


@pytest.fixture(scope="module")
def ours(model: Any, tokenizer: Any) -> Any:
    return harness.EffmlLM(model, tokenizer)


def transformer() -> Transformer:
    model = Transformer(TransformerConfig(n_layers=1, d_model=16, n_heads=1, vocab_size=258, init="normal"), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.double()


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [instance.Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def random_pairs(scorer: LMScorer) -> list[tuple[str, str]]:
    rng = random.Random(0)

    def some(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    contexts = ["", *[some(1, 8) for _ in range(30)], *[some(1, 4) + "  " for _ in range(20)]]
    contexts += [some(20, 40) for _ in range(20)]  # longer than the model can read
    pairs = [(rng.choice(contexts), rng.choice((" ", "")) + some(1, 3)[: rng.randint(1, 12)]) for _ in range(130)]
    places = [rng.randint(1, 200) for _ in range(40)]  # some within a token
    pairs += [(TEXT[max(0, i - 20) : i], TEXT[i : i + rng.randint(8, 16)]) for i in places]
    prompts = [GenerationRequest(rng.choice(contexts), SamplingParams(max_new_tokens=1)) for _ in range(30)]
    likely = [
        (prompt.prompt, written.text or "a") for prompt, written in zip(prompts, scorer.generate(prompts), strict=True)
    ]
    return pairs + likely


class Recorder:
    def __init__(self) -> None:
        self.kept: list[tuple[Any, ...]] = []

    def add_partial(self, *entry: Any) -> None:
        self.kept.append(entry)


# The same answers as the harness's own backend


def test_log_likelihoods_are_those_of_the_harness(theirs: Any, ours: Any) -> None:
    pairs = random_pairs(ours.scorer)
    requests = requests_of("loglikelihood", pairs)
    expected, found = theirs.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=0, abs=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({greedy for _, greedy in found}) == 2
    scores = ours.scorer.score(pairs)
    assert any(score.n_truncated for score in scores)
    assert any(score.boundary_merge for score in scores)
    assert [score.logprob for score in scores] == [nats for nats, _ in found]


def test_rolling_log_likelihoods_are_those_of_the_harness(theirs: Any, ours: Any) -> None:
    documents = ["a", "", "Ünïcode", TEXT, TEXT[:60], TEXT * 2, "a"]
    requests = requests_of("loglikelihood_rolling", [(document,) for document in documents])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, rel=0, abs=1e-9)
    plain = [score.logprob for score in ours.scorer.rolling(documents)]
    assert (plain == pytest.approx(expected, rel=0, abs=1e-9)) is not ours.scorer.tokenizer.opening


def test_generations_are_those_of_the_harness(theirs: Any, ours: Any) -> None:
    prompts = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(24)] + [TEXT]
    options = [
        {"until": ["\n", " it"], "max_gen_toks": 12},
        {"until": "e", "max_new_tokens": 9, "do_sample": False, "temperature": 0.7},
        {"until": [], "max_tokens": 6, "temperature": 0.0, "num_beams": 1},
    ]
    arguments = [(prompt, options[i % 3]) for i, prompt in enumerate(prompts)]
    requests = requests_of("generate_until", arguments)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests, disable_tqdm=True) == expected
    assert len(set(expected)) > 10


# Whole evaluations

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "t"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def questions(model: Any) -> list[dict[str, Any]]:
    """Questions of which the model answers some."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 30))) for _ in range(20)]
    asked = requests_of("generate_until", [(text, {"until": ["\n", "t"], "max_gen_toks": 8}) for text in texts])
    answers = harness.EffmlLM(model, tokenizer_of("$A")).generate_until(asked, disable_tqdm=True)
    return [
        {
            "question": text,
            "choices": rng.sample(WORDS, 4),
            "gold": rng.randrange(4),
            "answer": answer if answer and i % 2 else "none",
        }
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]


@pytest.fixture
def task_manager(questions: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    for name, body in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{source}{body}")
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(model: Any, task_manager: Any, **options: Any) -> Any:
    from lm_eval import simple_evaluate

    options = {"tasks": list(TASKS), **options}
    return simple_evaluate(model=model, task_manager=task_manager, **options)


def numbers(results: Any) -> dict[str, float]:
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, values in results["results"].items()
        for metric, value in values.items()
        if metric.endswith(",none") and "stderr" not in metric
    }


def same_tasks(questions: list[dict[str, Any]]) -> list[Task[Any]]:
    rows = list(enumerate(questions))
    choices = [choice_question(str(i), row["question"], row["choices"], row["gold"]) for i, row in rows]
    opens = [OpenQuestion(id=str(i), prompt=row["question"], golds=(row["answer"],)) for i, row in rows]
    texts = [Document(id=str(i), text=row["question"]) for i, row in rows]
    sampling = SamplingParams(max_new_tokens=8, stop=("\n", "t"))
    return [
        MultipleChoiceTask(name="local_choice", questions=choices),
        GenerativeTask(name="local_answer", questions=opens, sampling=sampling),
        PerplexityTask(name="local_text", questions=texts, metrics=("word_ppl", "byte_ppl", "bits_per_byte")),
    ]


@pytest.mark.parametrize("tokenizer", ["$A"], indirect=True)
def test_evaluations_agree_with_the_harness_and_with_our_own(
    theirs: Any, ours: Any, task_manager: Any, questions: list[dict[str, Any]]
) -> None:
    found, expected = evaluated(ours, task_manager), evaluated(theirs, task_manager)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-9)
    assert len(numbers(found)) == 6
    own = evaluate(ours.scorer, same_tasks(questions)).to_harness_json()
    assert numbers(own) == pytest.approx(numbers(expected), rel=1e-9)
    for task, metric in (("local_choice", "acc"), ("local_choice", "acc_norm"), ("local_answer", "exact_match")):
        assert 0 < own["results"][task][f"{metric},none"] < 1
        error = f"{metric}_stderr,none"
        assert own["results"][task][error] == pytest.approx(expected["results"][task][error], rel=1e-9)


def test_a_model_of_our_own_by_its_registered_name(task_manager: Any) -> None:
    model = transformer()
    arguments = {"model": model, "tokenizer": ByteTokenizer(), "max_length": 64}
    results = evaluated("effml", task_manager, model_args=arguments, limit=5)
    config = results["config"]
    assert config["model_num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (config["model_dtype"], config["scoring"]["max_length"]) == ("float64", 64)
    direct = evaluated(harness.EffmlLM(model, ByteTokenizer(), max_length=64), task_manager, limit=5)
    assert numbers(results) == numbers(direct)
    assert len(numbers(results)) == 6


# The harness's cache, order, sampling


def test_every_answer_is_kept_in_the_cache_as_the_harness_asks_for_it(tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    class Counting(harness.EffmlLM):  # type: ignore[name-defined]
        asked = 0

        def _answer(self, kind: str, requests: Any, *rest: Any) -> Any:
            self.asked += len(requests)
            return super()._answer(kind, requests, *rest)

    model = Counting(transformer(), ByteTokenizer(), batch_tokens=64)
    asked: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [("a", "b"), ("a long context", "c"), ("a", "d")],
        "loglikelihood_rolling": [("text",), ("another",), ("",)],
        "generate_until": [("a", {"max_gen_toks": 3}), ("", {"until": "x", "max_gen_toks": 2})],
    }
    kept = Recorder()
    model.set_cache_hook(kept)
    answers = {kind: getattr(model, kind)(requests_of(kind, pairs)) for kind, pairs in asked.items()}
    expected = [(kind, args, answer) for kind in asked for args, answer in zip(asked[kind], answers[kind], strict=True)]
    assert sorted(map(repr, kept.kept)) == sorted(map(repr, expected))

    model.asked = 0
    cached = CachingLM(model, str(tmp_path / "answers.db"))
    for _ in range(2):
        for kind, pairs in asked.items():
            assert list(map(_plain, getattr(cached, kind)(requests_of(kind, pairs)))) == list(
                map(_plain, answers[kind])
            )
    assert model.asked == 8
    cached.dbdict.close()


def _plain(answer: Any) -> Any:
    return tuple(answer) if isinstance(answer, list) else answer


def test_repeats_are_samples_of_their_own_and_reproducible() -> None:
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 5, "until": []}
    requests = requests_of("generate_until", [("a", sampled), ("b", sampled)] * 6 + [("a", {"max_gen_toks": 5})] * 2)
    model = transformer()
    first = harness.EffmlLM(model, ByteTokenizer()).generate_until(requests)
    assert first[12] == first[13]
    assert len(set(first[0:12:2])) > 3
    assert harness.EffmlLM(model, ByteTokenizer(), batch_tokens=20).generate_until(requests) == first
    assert harness.EffmlLM(model, ByteTokenizer(), seed=1).generate_until(requests)[:12] != first[:12]
    assert harness.EffmlLM(model, ByteTokenizer()).generate_until(requests[1::2]) == first[1::2]


def test_where_the_harness_fails() -> None:
    model = harness.EffmlLM(transformer(), ByteTokenizer())
    (found,) = model.loglikelihood(requests_of("loglikelihood", [("  ", "a")]))
    (same,) = model.loglikelihood(requests_of("loglikelihood", [("", "  a")]))
    assert found == same
    assert len(model.generate_until(requests_of("generate_until", [("", {"max_gen_toks": 2})]))) == 1
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        assert getattr(model, kind)([]) == []
    with pytest.raises(ConfigError, match=r"continuation: got an empty text"):
        model.loglikelihood(requests_of("loglikelihood", [("a", "")]))


@pytest.mark.parametrize(
    ("gen_kwargs", "expected"),
    [
        ({}, {"max_new_tokens": 7}),
        ({"until": "x", "max_gen_toks": 3, "max_tokens": 9}, {"max_new_tokens": 3, "stop": ("x",)}),
        ({"until": ["b", "", "a", "b"], "max_completion_tokens": 4}, {"max_new_tokens": 4, "stop": ("a", "b")}),
        ({"until": None, "temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 4, "min_p": 0.1},
            {"temperature": 0.5, "top_k": 4, "min_p": 0.1},
        ),
        ({"do_sample": False, "temperature": 0.5, "top_p": 0.9}, {}),
        ({"do_sample": True, "temperature": 0}, {}),
    ],
)
def test_generation_options(gen_kwargs: dict[str, Any], expected: dict[str, Any]) -> None:
    before = dict(gen_kwargs)
    found = harness.sampling_params(gen_kwargs, max_gen_toks=7)
    assert found == SamplingParams(**{"max_new_tokens": 7, **expected})
    assert gen_kwargs == before


@pytest.mark.parametrize(
    ("gen_kwargs", "match"),
    [
        ({"num_beams": 4}, r"generation_kwargs: got \{'num_beams': 4\}, expected nothing but until"),
        ({"repetition_penalty": 1.2}, r"generation_kwargs: got .*repetition_penalty"),
        ({"do_sample": True}, r"generation_kwargs: got do_sample without a temperature"),
        ({"temperature": -1}, r"temperature: got -1"),
        ({"max_gen_toks": 0}, r"max_new_tokens: got 0"),
        ({"top_p": 2, "temperature": 1}, r"top_p: got 2"),
    ],
)
def test_refuses_generation_options(gen_kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        harness.sampling_params(gen_kwargs)


# The tokenizer, and one process


def test_the_tokenizer(model: Any, tokenizer: Any, ours: Any, theirs: Any) -> None:
    for name in ("eot_token_id", "prefix_token_id", "max_length", "max_gen_toks", "rank", "world_size", "device"):
        assert getattr(ours, name) == getattr(theirs, name)
    for text in ("the age", "", "<s>the age"):
        for specials in (None, True, False):
            if (text, specials) != ("<s>the age", True):  # the harness opens it twice
                assert ours.tok_encode(text, specials) == theirs.tok_encode(text, specials)
    assert ours.tokenizer_name == type(tokenizer).__name__
    assert harness.EffmlLM(transformer(), ByteTokenizer()).tokenizer_name == "byte"
    assert ours.all_gather(torch.ones(2)).tolist() == [1, 1]
    assert ours.gather_object("mine") == ["mine"]
    ours.barrier()
    windows = [(("", "b"), [0, 5], [6]), ((None, None), [7], [8, 9])]
    found, expected = ours._loglikelihood_tokens(windows), theirs._loglikelihood_tokens(windows, True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected])


def test_chat_templates(model: Any) -> None:
    tokenizer = tokenizer_of("<s> $A")
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    adapter = harness.EffmlLM(model, tokenizer)
    history = [{"role": "user", "content": "Hello"}]
    assert adapter.apply_chat_template(history) == "[user]Hello[assistant]"
    assert adapter.apply_chat_template(history, add_generation_prompt=False) == "[user]Hello"
    assert adapter.chat_template(True) == tokenizer.chat_template
    bare = harness.EffmlLM(transformer(), ByteTokenizer())
    assert bare.chat_template(True) is None
    with pytest.raises(ConfigError, match=r"tokenizer: got a ByteTokenizer without a chat template"):
        bare.apply_chat_template(history)


@pytest.mark.slow
def test_processes_share_the_documents(task_manager: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads((tmp_path / "shared.json").read_text())
    alone = numbers(evaluated(harness.EffmlLM(transformer(), ByteTokenizer()), task_manager, limit=7))
    assert shared == pytest.approx(alone, rel=1e-12)


def evaluate_in_each_process(directory: Path) -> None:
    from lm_eval.tasks import TaskManager

    with distributed.launched():
        adapter = harness.EffmlLM(transformer(), ByteTokenizer(), data_parallel=True)
        results = evaluated(adapter, TaskManager(include_path=str(directory), include_defaults=False), limit=7)
        assert (results is not None) is distributed.is_main()
        if results is not None:
            (directory / "shared.json").write_text(json.dumps(numbers(results)))


def test_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "effml_eval.harness")
    with pytest.raises(MissingExtra, match=r"lm_eval is needed .*pip install 'effml-eval\[harness\]'"):
        import effml_eval.harness  # noqa: F401


if __name__ == "__main__":
    evaluate_in_each_process(Path(sys.argv[1]))
