"""One step of GRPO, sampling, reward and update, against TRL's trainer with the same Llama, prompts and rewards.

    python packages/effml-rl/benchmarks/bench_grpo.py --table
    python packages/effml-rl/benchmarks/bench_grpo.py --precisions float32 --rounds 3 --steps 5 --threads 2

One JSON line per case on stdout. Contenders:

    effml       `GRPOTrainer` on the Hugging Face Llama that TRL trains
    effml own   the same weights in effml's `Transformer`
    trl         `GRPOTrainer` of TRL, its generation by transformers, no vLLM

Before anything is timed, all must give one gradient on one batch of rollouts, to 1e-5 of its norm: TRL's own loss is
called with the completions that effml sampled. Timed are steps of rounds in turn, the first of each left out; `seconds`
is their median and `seconds_sampling` that part of it spent in sampling and rewards. Every contender draws by itself,
at temperature 1 from nearly the same weights, so that lengths agree in distribution; `tokens` is their mean per step.
`times_faster` is that of the contender over TRL, of medians of samples per second. `gflop` counts the products of one
step, 2N per token sampled and 6N per token of the update, to which TRL gives every completion with its prompt and effml
each prompt once; `gflop_per_s` says how near the machine's peak that comes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from effml_rl import GRPOTrainer
from effml_rl.policy_config import PolicyConfig, dapo
from effml_shared.benchmarks import publish, settings
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

KEYS = (
    "precision",
    "contender",
    "seconds",
    "seconds_sampling",
    "samples_per_s",
    "times_faster",
    "tokens",
    "gflop_per_s",
    "gradient_off",
)
LR = 1e-5


def tokenizer(vocab: int) -> Any:
    """Return one of Hugging Face with a word per id, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab - 3)} | {"<pad>": vocab - 3, "<eos>": vocab - 2, "<unk>": vocab - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def llama(options: argparse.Namespace) -> nn.Module:
    """Return an untrained Llama of Hugging Face."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=options.width,
            intermediate_size=options.d_ff,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 32,
            num_key_value_heads=options.width // 32,
            max_position_embeddings=4 * (options.prompt + options.length),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=options.vocab - 2,
        )
    )


def own(model: nn.Module, options: argparse.Namespace) -> Transformer:
    """Return effml's Transformer with a Llama's weights."""
    config = TransformerConfig(
        n_layers=options.layers,
        d_model=options.width,
        n_heads=options.width // 32,
        d_ff=options.d_ff,
        vocab_size=options.vocab,
        vocab_rows=options.vocab,
        norm_eps=float(model.config.rms_norm_eps),  # type: ignore[union-attr, arg-type]
        tied=True,
    )
    result = Transformer(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    result.load_state_dict(state)
    ids = torch.arange(64)[None] % options.vocab
    with torch.no_grad():
        off = float((result(ids).logits - model(ids).logits).abs().max())
    if not off <= 1e-4:
        raise SystemExit(f"effml own: got logits that are {off} off, expected those of the Llama")
    return result


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return the share of even words."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(len(text.split()), 1) for text in completions]


def prompts(options: argparse.Namespace) -> list[str]:
    return [" ".join(f"w{(i * 7 + j * 3) % 500}" for j in range(options.prompt)) for i in range(256)]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)


class Effml:
    """effml's trainer on a model."""

    def __init__(self, model: nn.Module, precision: str, options: argparse.Namespace) -> None:
        self.options, self.model, self.place = options, model, 0
        self.trainer = GRPOTrainer(
            model, reward, config(precision, options), tokenizer=tokenizer(options.vocab), optimizer=adamw(model)
        )
        self.sampling = 0.0
        collect = self.trainer._step.collect

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = collect(*arguments)
            self.sampling = time.perf_counter() - start
            return found

        self.trainer._step.collect = timed  # type: ignore[assignment]

    def round(self) -> list[dict[str, float]]:
        steps = []
        for _ in range(self.options.steps + 1):
            chosen = [prompts(self.options)[(self.place + i) % 256] for i in range(self.options.prompts)]
            self.place += self.options.prompts
            start = time.perf_counter()
            metrics = self.trainer.step(chosen)
            steps.append(
                {
                    "seconds": time.perf_counter() - start,
                    "sampling": self.sampling,
                    "tokens": metrics["length"] * self.options.prompts * self.options.samples,
                }
            )
        return steps[1:]


def config(precision: str, options: argparse.Namespace) -> PolicyConfig:
    """Return TRL's defaults: token_mean of the clipped loss, grouped advantages, no KL."""
    return dapo(
        prompts_per_step=options.prompts,
        samples=options.samples,
        max_completion=options.length,
        clip=(0.2, 0.2),
        refills=0,
        overlong_margin=None,
        precision=precision,
        lr=LR,
    )


class Trl:
    """TRL's trainer on a model."""

    def __init__(self, model: nn.Module, precision: str, options: argparse.Namespace) -> None:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig
        from trl import GRPOTrainer as Trainer

        self.options, self.model, self.steps = options, model, []  # type: ignore[var-annotated]
        outer = self

        class Clock(TrainerCallback):
            def on_step_begin(self, *arguments: Any, **more: Any) -> None:
                self.start = time.perf_counter()

            def on_step_end(self, *arguments: Any, **more: Any) -> None:
                outer.steps.append({"seconds": time.perf_counter() - self.start, **outer.sampled})

        class Timed(Trainer):  # type: ignore[misc, valid-type]
            def _generate_and_score_completions(self, inputs: Any) -> Any:
                start = time.perf_counter()
                found = super()._generate_and_score_completions(inputs)
                tokens = float(found["completion_mask"].sum())
                outer.sampled = {"sampling": time.perf_counter() - start, "tokens": tokens}
                return found

        arguments = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=options.prompts * options.samples,
            num_generations=options.samples,
            max_completion_length=options.length,
            max_steps=options.steps + 1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=precision == "bfloat16",
            report_to=[],
            logging_steps=10**6,
            save_strategy="no",
            disable_tqdm=True,
            loss_type="dapo",
            beta=0.0,
        )
        self.trainer = Timed(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts(options)]),
            processing_class=tokenizer(options.vocab),
            callbacks=[Clock()],
        )
        self.trainer.remove_callback(PrinterCallback)

    def round(self) -> list[dict[str, float]]:
        self.steps.clear()
        self.trainer.train()
        return list(self.steps[1:])


def check_gradients(effml: Effml, trl: Trl) -> float:
    """Return the largest relative difference between the gradients on one batch, and leave all weights alone."""
    captured: list[Tensor] = []
    optimizer = effml.trainer._step.policy.optimizer
    original, optimizer.step = optimizer.step, lambda: captured.append(gradient(effml.model))  # type: ignore[method-assign]
    clip, effml.trainer._step.policy.clip_norm = effml.trainer._step.policy.clip_norm, None
    effml.trainer.step(prompts(effml.options)[: effml.options.prompts])
    optimizer.step = original  # type: ignore[method-assign]
    effml.trainer._step.policy.clip_norm = clip
    batch, rollouts = effml.trainer.last.batch, effml.trainer.last  # type: ignore[union-attr]
    groups = rollouts.scores.rewards.view(-1, effml.options.samples)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    trl.model.train()
    trl.model.zero_grad()
    trl.trainer.current_gradient_accumulation_steps = 1
    loss = trl.trainer.compute_loss(
        trl.model,
        {
            "prompt_ids": batch.prompt_ids,
            "prompt_mask": batch.prompt_mask.long(),
            "completion_ids": batch.completion_ids,
            "completion_mask": batch.completion_mask.long(),
            "advantages": advantages.flatten(),
            "num_items_in_batch": batch.completion_mask.sum(),
        },
    )
    loss.backward()
    reference = gradient(trl.model)
    trl.model.zero_grad()
    return float((captured[0] - reference).norm() / reference.norm())


def gradient(model: nn.Module) -> Tensor:
    named = sorted((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return torch.cat([tensor.flatten() for _, tensor in named])


def compare(precision: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check and time all contenders in one precision; yield one row for each."""
    base = llama(options)
    makers: dict[str, Callable[[], Effml | Trl]] = {
        "effml": lambda: Effml(clone(base, options), precision, options),
        "effml own": lambda: Effml(own(base, options), precision, options),
        "trl": lambda: Trl(clone(base, options), precision, options),
    }
    contenders = {name: make() for name, make in makers.items()}
    off = {"trl": 0.0}
    for name in ("effml", "effml own"):
        ours, theirs = contenders[name], contenders["trl"]
        off[name] = check_gradients(ours, theirs)  # type: ignore[arg-type]
        if precision == "float32" and not off[name] <= 1e-5:
            raise SystemExit(f"{name}: got a gradient that is {off[name]} off, expected TRL's on the same rollouts")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, contender in contenders.items():
            found[name] += contender.round()
    weights = sum(p.numel() for p in base.parameters())
    rate = {}
    for name in ("trl", "effml", "effml own"):
        median = {key: statistics.median(step[key] for step in found[name]) for key in ("seconds", "sampling")}
        tokens = statistics.fmean(step["tokens"] for step in found[name])
        count = options.prompts * options.samples
        rate[name] = count / median["seconds"]
        read = (count if name == "trl" else options.prompts) * options.prompt
        gflop = (2 * tokens + 6 * (tokens + read)) * weights / 1e9
        yield {
            "precision": precision,
            "contender": name,
            "seconds": round(median["seconds"], 4),
            "seconds_sampling": round(median["sampling"], 4),
            "samples_per_s": round(rate[name], 1),
            "times_faster": round(rate[name] / rate["trl"], 2),
            "tokens": round(tokens),
            "gflop": round(gflop, 1),
            "gflop_per_s": round(gflop / median["seconds"], 1),
            "gradient_off": off[name],
            "seconds_all": [round(step["seconds"], 4) for step in found[name]],
            "weights": weights,
        }


def clone(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    result = llama(options)
    result.load_state_dict(model.state_dict())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    for name, default in (
        ("layers", 4),
        ("width", 128),
        ("d-ff", 256),
        ("vocab", 512),
        ("prompts", 8),
        ("samples", 8),
        ("prompt", 16),
        ("length", 64),
        ("rounds", 10),
        ("steps", 5),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    try:
        import trl  # noqa: F401
    except ImportError:
        sys.exit("trl: not installed; `pip install trl` to compare")
    rows = itertools.chain.from_iterable(compare(precision, options) for precision in options.precisions)
    publish(settings(options, "trl", "transformers"), rows, KEYS, table=options.table)


if __name__ == "__main__":
    main()
