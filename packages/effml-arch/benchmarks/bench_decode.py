"""Decoding with a cache: the Recurrent Transformer, the Transformer of equal parameters, and Hugging Face's loop.

    python packages/effml-arch/benchmarks/bench_decode.py --table
    python packages/effml-arch/benchmarks/bench_decode.py --layers 12 --width 768 --heads 12 --contexts 512 --table

One JSON line per case on stdout. All models have one shape (RMSNorm, SwiGLU, rotary positions) and the same weights.
`recurrent` and `transformer` go through `effml_shared.generation.generate`; `llama` is a `LlamaForCausalLM` with the
Transformer's weights in its own `generate`, if `transformers` is installed. Greedy throughout.

Before anything is timed, both models' tokens are compared with those of a full recomputation at every step, in float64,
and Llama's with the Transformer's: `equal`. `prefill_ms` is the time to the first token of a prompt, in which a
recurrent layer takes its positions in sequence. `ms_per_token` is a decoding step of the whole batch, a generation of
`--new` further tokens less one that stops after the first, by their number; contenders take turns, medians. `bound_ms`
is the time for the bytes that such a step must at least read at half of its new tokens, every weight once and the cache
of every row, at the bandwidth of a large sum measured here: small models fit into caches and may be below it, and what
is left of a step of a very small one is overhead of the framework.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from effml_arch import RecurrentTransformer, RecurrentTransformerConfig
from effml_arch.cost_ledger import decode_bytes
from effml_shared.benchmarks import publish, settings
from effml_shared.generation import generate
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

KEYS = ("batch", "context", "contender", "prefill_ms", "ms_per_token", "tokens_per_s", "bound_ms", "over_transformer")
VOCABULARY = 256

Decoder = Callable[[Tensor, int], Tensor]
"""Continue prompts (batch, context) by so many tokens; returns prompts and continuations."""


def ours(model: nn.Module) -> Decoder:
    return lambda ids, new: generate(model, ids, max_new_tokens=new).ids


def llama(model: Transformer) -> Decoder:
    """Return the loop of `transformers` on a Llama with a model's weights."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.rows,
            hidden_size=config.d_model,
            intermediate_size=config.ff_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_base,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,  # by default 2, which would end a row
            max_position_embeddings=1 << 20,
        )
    )
    theirs.load_state_dict(model.state_dict())
    theirs.to(next(model.parameters()).dtype).eval()

    def decode(ids: Tensor, new: int) -> Tensor:
        settings = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)

    return decode


def recompute(model: nn.Module, ids: Tensor, new: int) -> Tensor:
    """Decode without a cache."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def prompts(batch: int, context: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, context), generator=torch.Generator().manual_seed(1))


def check(models: Mapping[str, nn.Module], peers: Mapping[str, Decoder]) -> bool:
    """Say whether cached decoding gives the tokens that it should."""
    ids, found = prompts(2, 9), {}
    for name, model in models.items():
        model.double()
        found[name] = recompute(model, ids, 12)
        equal = torch.equal(generate(model, ids, max_new_tokens=12).ids, found[name])
        model.float()
        if not equal:
            return False
    return all(torch.equal(decode(ids, 12), found["transformer"]) for decode in peers.values())


def bandwidth() -> float:
    """Return the bytes per second at which a large tensor is summed."""
    large, seconds = torch.ones(64 << 20), []
    for _ in range(5):
        start = time.perf_counter()
        large.sum()
        seconds.append(time.perf_counter() - start)
    return large.nbytes / min(seconds)


def cases(
    config: TransformerConfig, decoders: Mapping[str, Decoder], speed: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield one row per batch, context and decoder."""
    for batch in options.batches:
        for context in options.contexts:
            ids = prompts(batch, context)
            seconds: dict[str, dict[int, list[float]]] = {n: {1: [], options.new + 1: []} for n in decoders}
            for turn in range(options.samples + 1):
                for name, decode in decoders.items():
                    for new, measured in seconds[name].items():
                        gc.collect()
                        start = time.perf_counter()
                        length = decode(ids, new).shape[1]
                        if turn:  # the first is the warm-up
                            measured.append(time.perf_counter() - start)
                        if length != context + new:
                            raise SystemExit(f"{name} stopped after {length - context} of {new} tokens")
            needed = decode_bytes(config, context + options.new // 2, batch, dtype=torch.float32)
            steps = {}
            for name, measured_of in seconds.items():
                first, whole = (statistics.median(measured) for measured in measured_of.values())
                steps[name] = (first, (whole - first) / options.new)
            for name, (first, step) in steps.items():
                yield {
                    "batch": batch,
                    "context": context,
                    "contender": name,
                    "prefill_ms": round(1e3 * first, 2),
                    "ms_per_token": round(1e3 * step, 3),
                    "tokens_per_s": round(batch / step),
                    "bound_ms": round(1e3 * needed / speed, 4),
                    "over_transformer": round(step / steps["transformer"][1], 2),
                    "bytes": needed,
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--new", type=int, default=64, help="tokens decoded after the first")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    config = TransformerConfig(
        n_layers=options.layers, d_model=options.width, n_heads=options.heads, vocab_size=VOCABULARY
    )
    standard = Transformer(config).eval()
    models = {
        "recurrent": RecurrentTransformer(RecurrentTransformerConfig(**asdict(config))).eval(),
        "transformer": standard,
    }
    peers = {"llama": llama(standard)} if importlib.util.find_spec("transformers") else {}
    speed = bandwidth()
    head = settings(options, "transformers")
    head |= {"equal": check(models, peers), "gb_per_s": round(speed / 1e9, 1)}
    decoders = {**{name: ours(model) for name, model in models.items()}, **peers}
    publish(head, cases(config, decoders, speed, options), KEYS, table=options.table)


if __name__ == "__main__":
    main()
