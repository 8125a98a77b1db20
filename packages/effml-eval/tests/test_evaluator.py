from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_eval.evaluation.evaluator import evaluate
from effml_eval.scoring import Generation, GenerationRequest, LMScorer, RollingScore, SamplingParams, Score
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
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from effml_shared.transformer import Transformer, TransformerConfig, TransformerOutput
from torch import Tensor, nn

BYTES = ByteTokenizer()
WORDS = ("river", "stone", "cloud", "field", "night", "bread")


class Uniform(nn.Module):
    """A model that finds every byte equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(256, dtype=torch.float64))

    def forward(self, ids: Tensor) -> TransformerOutput:
        return TransformerOutput(logits=self.bias.expand(*ids.shape, 256))


class Bigram:
    """A scorer that knows how often a character followed another in a text, with one added to every count."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self.counts: dict[tuple[str, str], int] = {}
        for pair in pairwise(text):
            self.counts[pair] = self.counts.get(pair, 0) + 1

    def nats(self, first: str, second: str) -> float:
        total = sum(self.counts.get((first, other), 0) + 1 for other in self.characters)
        return math.log((self.counts.get((first, second), 0) + 1) / total)

    def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        found = []
        for context, continuation in requests:
            pairs = list(pairwise((context or " ")[-1] + continuation))
            best = [max(self.characters, key=lambda c: (self.nats(a, c), -ord(c))) for a, _ in pairs]
            greedy = all(b == c for (_, b), c in zip(pairs, best, strict=True))
            found.append(Score(sum(self.nats(*pair) for pair in pairs), greedy, len(pairs)))
        return found

    def rolling(self, documents: Sequence[str]) -> list[RollingScore]:
        return [
            RollingScore(
                sum(self.nats(*pair) for pair in pairwise(" " + text)), len(text), len(text), len(text.split())
            )
            for text in documents
        ]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        found = []
        for request in requests:
            text = request.prompt
            for _ in range(request.sampling.max_new_tokens):
                text += max(self.characters, key=lambda c: (self.nats(text[-1], c), -ord(c)))
            found.append(Generation(text[len(request.prompt) :], "length", request.sampling.max_new_tokens))
        return found


def transformer(dtype: torch.dtype = torch.float32) -> Transformer:
    config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=258, init="normal")
    model = Transformer(config, seed=1).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def choices(number: int = 5, **options: Any) -> MultipleChoiceTask:
    stream = random.Random(0)
    questions = [
        choice_question(
            f"q{i}",
            " ".join(stream.choices(WORDS, k=stream.randint(1, 5))),
            stream.sample(WORDS, 3),
            i % 3,
            tags={"passage": str(i // 2)},
        )
        for i in range(number)
    ]
    return MultipleChoiceTask(name="choices", questions=questions, **options)


def texts() -> PerplexityTask:
    stream = random.Random(1)
    documents = [Document(id=str(i), text=" ".join(stream.choices(WORDS, k=2 + 3 * i))) for i in range(4)]
    return PerplexityTask(name="texts", questions=documents)


def writing(**options: Any) -> GenerativeTask:
    questions = [
        OpenQuestion(id=str(i), prompt=f"{word} and", golds=(WORDS[i - 1],)) for i, word in enumerate(WORDS[:3])
    ]
    return GenerativeTask(
        **{"name": "writing", "questions": questions, "sampling": SamplingParams(max_new_tokens=4), **options}
    )


SAMPLED = SamplingParams(max_new_tokens=4, temperature=1.0)


def tasks() -> list[Task]:
    return [choices(neutral="", metrics=("acc", "acc_pmi", "nll")), texts(), writing(metrics=("exact_match", "maj@2"))]


def run(out_dir: Path | None = None, model: nn.Module | None = None, **options: Any) -> Any:
    scorer = LMScorer(transformer() if model is None else model, BYTES, batch_tokens=80, max_length=64)
    return evaluate(scorer, tasks(), out_dir=out_dir, n_samples=3, sampling=SAMPLED, **options)


def untimed(folder: Path) -> dict[str, bytes]:
    """Return the result files as they are, but for when."""
    record = json.loads((folder / "results.json").read_text())
    del record["started"], record["ended"]
    samples = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
    return {"results.json": json.dumps(record).encode(), **samples}


# What is known in closed form


def test_a_uniform_model() -> None:
    result = evaluate(Uniform(), [choices(9, metrics=("acc", "acc_norm", "prob", "brier")), texts()], tokenizer=BYTES)
    found = {name: estimate.value for name, estimate in result.metrics["choices"].items()}
    assert found == pytest.approx({"acc": 1 / 3, "acc_norm": 1 / 3, "prob": 1 / 3, "brier": 2 / 3}, rel=1e-12)
    found = {name: estimate.value for name, estimate in result.metrics["texts"].items()}
    assert found["token_ppl"] == pytest.approx(256, rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(8, rel=1e-12)
    assert result.metrics["choices"]["acc"].n == 9
    assert result.record["model"]["param_count"] == 256


def test_an_untrained_network_with_a_zero_head() -> None:
    model = transformer()
    assert model.lm_head is not None
    nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, texts(), tokenizer=BYTES)
    assert result.metrics["texts"]["token_ppl"].value == pytest.approx(258, rel=1e-5)
    assert result.metrics["texts"]["bits_per_byte"].value == pytest.approx(math.log2(258), rel=1e-5)


def test_a_bigram_scorer() -> None:
    scorer = Bigram("the cat sat on the mat that the cat had sat on ")
    questions = [
        choice_question("1", "the c", ["at", "on"], 0, delimiter=""),
        choice_question("2", "the", ["cat", "odd"], 1),
        choice_question("3", "on t", ["oo", "he", "nn"], 1, delimiter=""),
    ]
    result = evaluate(scorer, [MultipleChoiceTask(name="c", questions=questions), texts(), writing()], seed=3)
    by_hand = []
    for question in questions:
        lls = [sum(scorer.nats(*pair) for pair in pairwise(context[-1] + text)) for context, text in question.pairs]
        by_hand.append(float(max(range(len(lls)), key=lambda j: lls[j]) == question.gold))
    assert [sample["scores"]["acc"] for sample in result.samples("c")] == by_hand
    assert result.metrics["c"]["acc"].value == sum(by_hand) / 3 == 2 / 3
    bits = sum(-scorer.nats(*pair) for d in texts().questions for pair in pairwise(" " + d.text)) / math.log(2)
    n_bytes = sum(len(document.text) for document in texts().questions)
    assert result.metrics["texts"]["bits_per_byte"].value == pytest.approx(bits / n_bytes, rel=1e-12)
    assert [sample["finish_reason"] for sample in result.samples("writing")] == ["length"] * 3
    assert result.record["counts"]["length_stopped"] == 3


def test_normalised_and_unconditional_accuracy() -> None:
    class Known(Bigram):
        def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
            known = {" cat": (-6.0, -3.0), " dog": (-5.0, -1.0), " elephants": (-9.0, -7.5)}
            return [Score(known[text][context == ""], False, 1) for context, text in requests]

    question = choice_question("1", "It is a", ["cat", "dog", "elephants"], 2)
    task = MultipleChoiceTask(
        name="animals", questions=[question], neutral="", metrics=("acc", "acc_norm", "acc_pmi", "prob")
    )
    found = evaluate(Known("ab"), task).metrics["animals"]
    assert [found[name].value for name in ("acc", "acc_norm", "acc_pmi")] == [0, 1, 1]
    assert found["prob"].value == pytest.approx(0.013213, abs=1e-6)


# Interruptions


class Killed(BaseException):
    """The end of the process, which no handler survives."""


@contextmanager
def power_cut(after: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let nothing reach the disk after so many steps; of a file that was not flushed, any part may have."""
    stream, steps, flushed = random.Random(seed), [0], dict[str, int]()
    fsync, truncate = os.fsync, os.truncate

    def step(real: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any) -> Any:
            steps[0] += 1
            if steps[0] > after:
                raise Killed
            return real(*arguments)

        return stepped

    def torn(descriptor: int) -> None:
        name, size = os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size
        steps[0] += 1
        if steps[0] > after:
            if steps[0] == after + 1 and os.path.isfile(name):
                truncate(name, stream.randint(min(flushed.get(name, 0), size), size))  # the descriptor may only read
            raise Killed
        flushed[name] = size
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", torn)
        for name in ("replace", "truncate"):
            patch.setattr(os, name, step(getattr(os, name)))
        with suppress(Killed):
            yield steps


def test_a_kill_at_any_point_changes_no_byte_of_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with power_cut(10**9, 0, monkeypatch) as steps:
        run(tmp_path / "whole")
    whole, stream, found = untimed(tmp_path / "whole"), random.Random(0), set[int]()
    assert steps[0] > 25
    for i, after in enumerate(stream.sample(range(steps[0]), 20)):
        folder = tmp_path / str(i)
        with power_cut(after, i, monkeypatch):
            run(folder)
        assert not (folder / "results.json").exists() or after > steps[0] - 4
        run(folder)
        assert untimed(folder) == whole, f"killed after step {after} of {steps[0]}"
        found.add(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["known"])
    assert len(found) > 5  # the kills were at different places


def test_many_kills_of_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    for i, after in enumerate([7, 9, 12, 8, 11]):
        with power_cut(after, i, monkeypatch):
            run(tmp_path / "cut")
    run(tmp_path / "cut")
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")


def test_a_batch_with_an_answer_missing_is_run_whole(tmp_path: Path) -> None:
    run(tmp_path)
    whole = untimed(tmp_path)
    (shard,) = (tmp_path / "answers").glob("*.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:5] + lines[6:-1]) + lines[-1][:20])  # the last line damaged, one in between gone
    run(tmp_path)
    assert untimed(tmp_path) == whole
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[1]["lines"]["damaged"] == 1
    assert log[1]["known"] == log[1]["requests"] - 2
    assert 0 < log[1]["batches"] <= 2 < log[0]["batches"]
    assert log[1]["lines"]["duplicates"] > 0  # the others of those batches
    run(tmp_path)
    assert untimed(tmp_path) == whole
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[2])["batches"] == 0


def test_batches_that_did_not_fit_are_halved_again(tmp_path: Path) -> None:
    class Small(Transformer):
        most: Any = 0

        def forward(self, input_ids: Tensor | None = None, **options: Any) -> TransformerOutput:
            assert input_ids is not None
            if self.most and input_ids.numel() > self.most:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(input_ids, **options)

    def model(most: int) -> Small:
        small = Small(transformer().config, seed=1)
        small.load_state_dict(transformer().state_dict())
        small.most = most
        return small

    def run_with(most: int) -> None:
        evaluate(LMScorer(model(most), BYTES), tasks(), n_samples=3, sampling=SAMPLED, out_dir=tmp_path)

    run_with(66)
    whole = untimed(tmp_path)
    (shard,) = (tmp_path / "answers").glob("*.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    (first,) = (i for i, pair in enumerate(pairwise(lines)) if b"too_large" in pair[0] and b'"score"' in pair[1])
    shard.write_bytes(b"".join(lines[: first + 1] + lines[first + 2 :]))
    run_with(0)  # now all fits, and numbers would differ but for what was remembered
    assert untimed(tmp_path) == whole


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_evaluator as t
from pathlib import Path
from effml_eval.evaluation.answer_store import AnswerStore
add, left = AnswerStore.add, [int(sys.argv[2])]
def counted(self, *arguments):
    add(self, *arguments)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
AnswerStore.add = counted
t.run(Path(sys.argv[1]))
"""
    run(tmp_path / "whole")
    command = [sys.executable, "-c", script, str(tmp_path / "cut")]
    assert subprocess.run([*command, "3"], check=False).returncode == -signal.SIGKILL
    assert subprocess.run([*command, "-1"], check=False).returncode == 0
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")


@pytest.mark.slow
def test_several_processes_share_the_requests(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_evaluator as t
from effml_shared import distributed
from pathlib import Path
with distributed.launched():
    out = Path(sys.argv[1])
    results = [t.run(out, t.transformer(t.torch.float64)) for _ in range(2)]
    for result in results:
        (out / f"rank {{distributed.rank()}}").write_text(result.table())
""")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *launch, str(script), str(tmp_path / "two")], check=True, capture_output=True)
    alone = run(tmp_path / "one", transformer(torch.float64))
    tables = [(tmp_path / "two" / f"rank {rank}").read_text() for rank in range(2)]
    assert tables[0] == tables[1]
    both = json.loads((tmp_path / "two" / "results.json").read_text())["results"]
    for task, estimates in alone.metrics.items():
        found = {name: row["value"] for name, row in both[task].items()}
        assert found == pytest.approx({name: estimate.value for name, estimate in estimates.items()}, rel=1e-9)
    shards = {path.name[:10] for path in (tmp_path / "two" / "answers").glob("*.jsonl")}
    assert shards == {"rank-00000", "rank-00001"}
    logs = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert 0 < logs[0]["requests"] < json.loads((tmp_path / "one" / "log.jsonl").read_text())["requests"]
    assert logs[1]["batches"] == 0


def test_another_model_or_task_in_the_directory_is_refused(tmp_path: Path) -> None:
    scorer = LMScorer(transformer(), BYTES)
    evaluate(scorer, choices(), out_dir=tmp_path, num_fewshot=0)
    changed: list[tuple[Any, dict[str, Any], str]] = [
        (scorer, {"limit": 2}, r"tasks.choices.evaluated was 5 and is 2"),
        (scorer, {"seed": 1}, r"seeds.base was 0 and is 1"),
        (LMScorer(transformer(), BYTES, batch_tokens=64), {}, r"batch_tokens was 16384 and is 64"),
        (LMScorer(transformer(torch.float64), BYTES), {}, r"model.dtype was 'float32' and is 'float64'; .*sha256"),
        (scorer, {"resume": False}, r"expected a new directory"),
    ]
    for other, options, message in changed:
        with pytest.raises(ConfigError, match=message) as found:
            evaluate(other, choices(), out_dir=tmp_path, **options)
        assert "\n" not in str(found.value)
    evaluate(scorer, choices(metrics=("nll",)), out_dir=tmp_path, ci="bootstrap")  # no answer depends on these


def test_a_second_process_in_the_directory_is_refused(tmp_path: Path) -> None:
    class Nested(Bigram):
        def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
            with pytest.raises(CheckpointError, match=r"another process"):
                evaluate(Bigram("ab"), choices(), out_dir=tmp_path, model_id="m")
            return super().score(requests)

    evaluate(Nested("ab"), choices(), out_dir=tmp_path, model_id="m")


# Sampling


def test_a_sample_depends_on_its_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = transformer(torch.float64), {}
    for n_samples, batch_tokens in ((4, 16384), (16, 16384), (4, 1), (16, 64)):
        scorer = LMScorer(model, BYTES, batch_tokens=batch_tokens)
        result = evaluate(scorer, writing(), n_samples=n_samples, sampling=SAMPLED, seed=5)
        outputs = {(line["doc_id"], line["sample"]): line["output"] for line in result.samples("writing")}
        assert len(outputs) == 3 * n_samples
        found[n_samples, batch_tokens] = outputs
    assert found[16, 64] == found[16, 16384]
    assert found[4, 1] == found[4, 16384] == {key: found[16, 64][key] for key in found[4, 1]}
    assert len(set(found[16, 64].values())) > 40
    assert result.variance("writing").samples == 16
    for after in (9, 14):
        scorer = LMScorer(model, BYTES, batch_tokens=64)
        options: Any = {"n_samples": 16, "sampling": SAMPLED, "seed": 5, "out_dir": tmp_path / str(after)}
        with power_cut(after, 0, monkeypatch):
            evaluate(scorer, writing(), **options)
        result = evaluate(scorer, writing(), **options)
        assert {(line["doc_id"], line["sample"]): line["output"] for line in result.samples("writing")} == found[16, 64]


# Manners


def test_modes_random_state_and_gradients_are_left_alone() -> None:
    model = transformer().train()
    model.model["layers"].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    random.seed(7)
    before = torch.rand(3), random.random()
    torch.manual_seed(7)
    random.seed(7)
    result = evaluate(model, tasks(), tokenizer=BYTES, n_samples=2, sampling=SAMPLED)
    assert torch.equal(torch.rand(3), before[0])
    assert random.random() == before[1]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert result.record["model"]["weights_sha256"] is None  # not worth a pass over the weights in a training loop


def test_counts_and_clusters(tmp_path: Path) -> None:
    scorer = LMScorer(transformer(), BYTES, max_length=12)
    plain = evaluate(scorer, choices(6))
    assert plain.record["counts"]["requested"] == plain.record["counts"]["scored"] == 18
    assert plain.record["counts"]["truncated"] > 0
    assert "truncated" in plain.table()
    clustered = evaluate(scorer, choices(6), cluster="passage")
    assert clustered.metrics["choices"]["acc"].method == "normal, clustered"
    assert plain.metrics["choices"]["acc"].method == "normal"
    assert evaluate(scorer, choices(6), ci="wilson").metrics["choices"]["acc"].method == "wilson"
    assert evaluate(scorer, choices(6), limit=2).metrics["choices"]["acc"].n == 2


def test_examples_are_dropped_before_the_question_is_cut() -> None:
    shots = [choice_question(f"s{i}", "x" * 20, ["y", "z"], 0) for i in range(4)]
    task = choices(3, shots=shots)
    result = evaluate(LMScorer(transformer(), BYTES, max_length=100), task, num_fewshot=4)
    for line in result.samples("choices"):
        assert 0 < line["n_shots"] < 4
        assert line["n_shots"] + line["shots_dropped"] == 4
        assert line["truncated"] == 0
    assert result.record["counts"]["shots_dropped"] == sum(line["shots_dropped"] for line in result.samples("choices"))
    assert result.record["tasks"]["choices"]["n_shot"] == 4


def test_what_cannot_be_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Bigram("abc")
    for arguments, options, message in (
        ([[]], {}, r"tasks: got none"),
        ([[choices(), choices()]], {}, r"each of another name"),
        ([choices()], {"num_fewshot": 1}, r"num_fewshot: got 1 for task choices, which has 0"),
        ([choices()], {"cluster": "author"}, r"cluster: got 'author', expected a tag of task choices"),
        ([choices(metrics=("nll",))], {"ci": "wilson"}, r"ci: got 'wilson' for nll"),
        ([writing()], {"n_samples": 2}, r"n_samples: got 2 at temperature 0"),
        ([writing(metrics=("pass@2",))], {}, r"metrics: got pass@2 of 1 samples"),
        ([choices()], {"limit": 0}, r"limit: got 0"),
        ([choices()], {"tokenizer": BYTES}, r"tokenizer: got one for a scorer"),
        (["nonsense:file"], {}, r"task: got 'nonsense'"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(scorer, *arguments, **options)
    with pytest.raises(ConfigError, match=r"tokenizer: got None, expected that of the Transformer"):
        evaluate(transformer(), choices())
    with pytest.raises(ConfigError, match=r"model_id: got None for a Bigram with out_dir"):
        evaluate(scorer, choices(), out_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "is_sharded", lambda _: True)
        with pytest.raises(ConfigError, match=r"model: got one that is sharded over processes"):
            evaluate(transformer(), choices(), tokenizer=BYTES)
        patch.setattr(distributed, "world_size", lambda: 2)
        with pytest.raises(ConfigError, match=r"out_dir: got None with several processes"):
            evaluate(scorer, choices())

    class Broken(Bigram):
        def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
            return [Score(math.nan, False, 1) for _ in requests]

    with pytest.raises(NonFiniteError, match=r"got NaN for the request"):
        evaluate(Broken("ab"), choices())
