"""`effml-eval run | compare | recompute | show`.

Whatever is wrong with the input is one line on stderr and exit code 2. The same command goes on with what Ctrl-C stops.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from effml_shared import distributed
from effml_shared.errors import ConfigError, EffmlError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} --help` shows how)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        with distributed.launched():
            options.command(options)
    except KeyboardInterrupt:
        _say("effml-eval: stopped; the same command goes on")
        return 130
    except (EffmlError, OSError) as error:
        _say(f"effml-eval: error: {error}")
        return 2
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="effml-eval", description="Evaluate language models.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=run)
        return sub

    def intervals(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--ci", help="normal, wilson, bootstrap or bca")
        sub.add_argument("--level", type=float, help="of the intervals, such as 0.95")
        sub.add_argument("--cluster", metavar="TAG", help="what questions that are not independent have in common")

    run = command("run", _run, "Evaluate a model; what was interrupted goes on where it was.")
    run.add_argument("model", metavar="MODEL", help="a directory: of Hugging Face, or with checkpoints")
    run.add_argument("tasks", metavar="TASK", nargs="+", help="NAME:FILE, such as piqa:valid.jsonl, or a YAML file")
    run.add_argument("--out", metavar="DIR", required=True, help="where answers and results are kept")
    run.add_argument("--tokenizer", help="byte, or a tokenizer.json (default: the model's own)")
    run.add_argument("--shots", metavar="NAME=FILE", action="append", default=[], help="examples of a task NAME:FILE")
    run.add_argument("--num-fewshot", type=int, default=0, metavar="N", help="examples before each question")
    run.add_argument("--limit", type=int, metavar="N", help="questions of each task")
    run.add_argument("--n-samples", type=int, default=1, metavar="N", help="of each answer that is generated")
    run.add_argument("--temperature", type=float, help="of samples (default: the task's, mostly greedy)")
    run.add_argument("--top-p", type=float, help="draw among the likeliest tokens of this share alone")
    run.add_argument("--max-new-tokens", type=int, metavar="N", help="of each sample (default: the task's, or 256)")
    run.add_argument("--seed", type=int, default=0, help="of samples, examples and bootstraps")
    run.add_argument("--device", help="such as cuda:0 (default: the GPU if there is one)")
    run.add_argument("--dtype", choices=["bfloat16", "float16"], help="compute in it (default: as the model is)")
    run.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="in one batch")
    run.add_argument("--max-length", type=int, metavar="N", help="tokens the model reads (default: what it says)")
    run.add_argument("--model-id", metavar="NAME", help="in the results (default: the directory's name)")
    intervals(run)
    compare = command("compare", _compare, "Compare two evaluations question by question.")
    compare.add_argument("first", metavar="DIR")
    compare.add_argument("second", metavar="DIR")
    compare.add_argument("--metric", help="default: the first of each task")
    compare.add_argument("--test", default="paired_t", help="paired_t, mcnemar, permutation or bootstrap")
    compare.add_argument("--correction", default="holm", help="of the p-values over tasks: holm or none")
    compare.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    recompute = command("recompute", _recompute, "Grade the samples of an evaluation anew, without the model.")
    recompute.add_argument("folder", metavar="DIR")
    recompute.add_argument("--metrics", nargs="+", metavar="NAME", help="such as acc_norm or pass@4")
    recompute.add_argument("--extractor", help="finds the answer, such as boxed or regex:PATTERN")
    recompute.add_argument("--equal", help="compares answers: exact, normalized, numeric or symbolic")
    recompute.add_argument("--out", metavar="DIR", help="keep the results there")
    intervals(recompute)
    show = command("show", _show, "Show the results of an evaluation.")
    show.add_argument("folder", metavar="DIR")
    show.add_argument("--task", help="this one alone")
    show.add_argument("--samples", type=int, default=0, metavar="N", help="the first N samples of each task too")
    show.add_argument("--harness", action="store_true", help="as JSON, with the names of lm-evaluation-harness")
    return parser


def _run(options: argparse.Namespace) -> None:
    import torch

    from effml_eval.evaluation.evaluator import evaluate
    from effml_eval.evaluation.model_directory import load_model
    from effml_eval.scoring import LMScorer, SamplingParams
    from effml_eval.tasks import load_task

    shots = {}
    for word in options.shots:
        name, equals, file = word.partition("=")
        if not equals or not any(task.partition(":")[0] == name for task in options.tasks):
            raise ConfigError(f"--shots: got {word!r}, expected NAME=FILE, with the name of one of the tasks")
        shots[name] = file
    tasks = []
    for task in options.tasks:
        name = task.partition(":")[0]
        tasks.append(load_task(task, **({"shots": shots[name]} if name in shots else {})))
    given = _given(options, "temperature", "top_p", "max_new_tokens")
    model, tokenizer = load_model(options.model, options.tokenizer)
    try:
        device = torch.device(options.device) if options.device else distributed.default_device()
        model.to(device)
    except RuntimeError as error:
        raise ConfigError(f"--device: got {options.device!r} ({str(error).partition(chr(10))[0]})") from None
    scorer = LMScorer(
        model,
        tokenizer,
        max_length=options.max_length,
        batch_tokens=options.batch_tokens,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
    )
    result = evaluate(
        scorer,
        tasks,
        out_dir=options.out,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        n_samples=options.n_samples,
        sampling=SamplingParams(**given) if given else None,
        seed=options.seed,
        model_id=options.model_id or Path(options.model).resolve().name,
        **_given(options, "ci", "level", "cluster"),
    )
    _print(f"{result.table()}\nresults: {Path(options.out) / 'results.json'}")


def _compare(options: argparse.Namespace) -> None:
    from effml_eval.evaluation.result_comparison import compare

    report = compare(
        options.first,
        options.second,
        options.metric,
        options.test,
        options.correction,
        names=(options.first, options.second),
        level=options.level,
    )
    _print(report.table())


def _recompute(options: argparse.Namespace) -> None:
    from effml_eval.evaluation.regrading import recompute

    result = recompute(
        options.folder,
        options.metrics,
        options.extractor,
        equal=options.equal,
        **_given(options, "ci", "level", "cluster"),
    )
    _print(result.table())
    if options.out is not None:
        result.save(options.out)
        _print(f"results: {Path(options.out) / 'results.json'}")


def _show(options: argparse.Namespace) -> None:
    from effml_eval.evaluation.eval_result import EvalResult

    result = EvalResult.load(options.folder)
    if options.task is not None:
        only = {options.task: result.samples(options.task)}
        result = EvalResult({options.task: result.metrics[options.task]}, result.record, only)
    if options.harness:
        _print(json.dumps(result.to_harness_json(), indent=1))
        return
    _print(f"{result.record['model']['id']}\n{result.table()}")
    for lines in result.lines.values():
        for line in lines[: options.samples]:
            _print(json.dumps(line, ensure_ascii=False))


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _print(text: str) -> None:
    if distributed.is_main():
        print(text)


def _say(line: str) -> None:
    if distributed.is_main():
        print(" ".join(line.split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
