"""A temperature sweep of the solution-tree task against loops over `generate`, with one model, problems and counts.

    python packages/effml-rl/benchmarks/bench_sweep.py --table
    python packages/effml-rl/benchmarks/bench_sweep.py --problems 8 --n 8 --rounds 3

One JSON line per contender on stdout. All sample n completions of every problem at every temperature and verify them:

    effml         `TemperatureSweep` with `Sampler` on a Hugging Face Llama: each prompt is read once
    effml torch   the same where the C decoder does not serve, as on a GPU or with another architecture
    generate      `generate` of transformers, `num_return_sequences=n`, temperature by temperature, all problems at once

The world is that of the experiment `rl.wall`, in which the model is fine-tuned until its answers end and many of them
are right: `ended` and `accuracy`. Before anything is timed, greedy completions must be the same, token by token, in all
three, and each contender completes a first sweep. `seconds` is the median over rounds, contenders in turn;
`accuracy` that of all samples, whose difference between contenders is luck: `standard_error` is that of one of them.
`times_faster` is that over `generate`, the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from effml_rl import Sampler, SolutionTreeTask, SupervisedDataset, TemperatureSweep, supervised_loss
from effml_rl import sampler as sampler_module
from effml_rl.wall import SYNTHETIC_TEMPERATURES
from effml_shared.benchmarks import publish, settings
from effml_shared.data import Loader
from torch import nn

KEYS = ("contender", "seconds", "completions_per_s", "times_faster", "accuracy", "ended")


def trained_llama(task: SolutionTreeTask, options: argparse.Namespace) -> nn.Module:
    """Return a small Llama of Hugging Face after some steps of fine-tuning."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = task.tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=task.prompt_length + task.completion_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    model = LlamaForCausalLM(config)
    examples = task.sample(64 * options.steps, "sft")
    completions = examples.completions(tokenizer)
    ends = completions == tokenizer.eos_id
    until_end = ends.cumsum(1) - ends.long() == 0
    dataset = SupervisedDataset.from_padded(
        *examples.prompts(tokenizer), completions, until_end, prompt_loss=True, pad_id=tokenizer.pad_id
    )
    loader = Loader(dataset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * options.steps), 1 - step / options.steps)
    )
    for _ in range(options.steps):
        total, count = supervised_loss(model, loader.next(64))
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


class Generate:
    """The loop that people write."""

    def __init__(self, model: nn.Module, task: SolutionTreeTask) -> None:
        self.model, self.task = model, task

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], *, temperatures: Sequence[float], n: int) -> list[list[list[str]]]:
        tokenizer = self.task.tokenizer
        rows = [list(tokenizer.encode(prompt)) for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        found = []
        for temperature in temperatures:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
            out = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                max_new_tokens=self.task.completion_length,
                num_return_sequences=n,
                **({"do_sample": False} | how),
            )[:, width:]
            texts = [tokenizer.decode(until_end(row, tokenizer.eos_id)) for row in out.tolist()]
            found.append([texts[start : start + n] for start in range(0, len(texts), n)])
        return found


def until_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


class Sampled:
    """The sampler's completions, with or without its C decoder."""

    def __init__(self, sampler: Sampler, native: bool) -> None:
        self.sampler, self.native = sampler, native

    def __call__(self, prompts: Sequence[str], *, temperatures: Sequence[float], n: int) -> list[list[list[str]]]:
        kept = sampler_module.native_rows
        if not self.native:
            sampler_module.native_rows = lambda *arguments: None  # type: ignore[assignment]
        try:
            return self.sampler.completions(prompts, temperatures=temperatures, n=n)
        finally:
            sampler_module.native_rows = kept


def cases(model: nn.Module, task: SolutionTreeTask, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per contender."""
    examples = task.sample(options.problems, "sft", seed=1)
    prompts, targets = [one.prompt for one in examples], [one.completion for one in examples]
    sampler = Sampler(model, task.tokenizer, max_new_tokens=task.completion_length, keep_end=True)
    contenders: dict[str, Callable[..., Any]] = {
        "generate": Generate(model, task),
        "effml": Sampled(sampler, native=True),
        "effml torch": Sampled(sampler, native=False),
    }
    greedy = {name: make(prompts, temperatures=[0.0], n=1) for name, make in contenders.items()}
    for name, texts in greedy.items():
        if texts != greedy["generate"]:
            raise SystemExit(f"{name}: got other greedy completions than `generate`, expected the same")
    ended = {name: share_ended(make, prompts, task, options) for name, make in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    accuracy: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, make in contenders.items():
            sweep = TemperatureSweep(make, task.verifier, SYNTHETIC_TEMPERATURES, options.n, group=options.problems)
            start = time.perf_counter()
            matrix = sweep.run(prompts, targets)
            seconds[name].append(time.perf_counter() - start)
            accuracy[name] = float((matrix.outcomes == 1).mean())
    count = len(SYNTHETIC_TEMPERATURES) * options.problems * options.n
    for name, taken in seconds.items():
        faster = statistics.median(a / b for a, b in zip(seconds["generate"], taken, strict=True))
        share = accuracy[name]
        yield {
            "contender": name,
            "seconds": round(statistics.median(taken), 3),
            "completions_per_s": round(count / statistics.median(taken)),
            "times_faster": round(faster, 2),
            "accuracy": round(share, 4),
            "standard_error": round((share * (1 - share) / count) ** 0.5, 4),
            "ended": round(ended[name], 4),
            "completions": count,
            "temperatures": len(SYNTHETIC_TEMPERATURES),
            "seconds_all": [round(value, 3) for value in taken],
            "weights": sum(parameter.numel() for parameter in model.parameters()),
        }


def share_ended(
    make: Callable[..., Any], prompts: Sequence[str], task: SolutionTreeTask, options: argparse.Namespace
) -> float:
    """Return the share of all completions of a sweep that end before they are cut."""
    of_temperature = make(prompts, temperatures=SYNTHETIC_TEMPERATURES, n=options.n)
    texts = [text for of_prompt in of_temperature for texts in of_prompt for text in texts]
    return sum(task.tokenizer.eos_id in task.tokenizer.encode(text) for text in texts) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    for name, default in (
        ("layers", 4),
        ("width", 128),
        ("problems", 16),
        ("n", 16),
        ("steps", 500),
        ("rounds", 5),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    task = SolutionTreeTask(n_states=6, n_actions=6, n_contexts=6, n_problem=6, len_range=(2, 3), n_irrelevant=0)
    model = trained_llama(task, options)
    publish(settings(options, "transformers"), cases(model, task, options), KEYS, table=options.table)


if __name__ == "__main__":
    main()
