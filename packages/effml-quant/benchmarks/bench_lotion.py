"""What LOTION's penalty costs beside a language model's training step: same model, same batch, in turns.

    python packages/effml-quant/benchmarks/bench_lotion.py --table

One JSON line per case on stdout. A step is forward, backward and AdamW of the shared Transformer; `share` is the time
that curvature and penalty add, over the step without them: medians of the hooks' own time. `gb_s` counts the bytes that
must move per weight: 12 for the curvature (read the gradient, read and write the average), 20 for the penalty (read the
weight twice and the curvature, read and write the gradient).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from effml_quant.lotion import Lotion, LotionConfig
from effml_shared.benchmarks import in_turn, publish, say, settings
from effml_shared.steps import language_model_loss
from effml_shared.transformer import Transformer, TransformerConfig

KEYS = ("model", "weights", "tokens", "granularity", "step_ms", "lotion_ms", "share_percent", "gb_s")
MODELS = {
    "small": (TransformerConfig(n_layers=2, d_model=128, n_heads=4), 16, 128),
    "6M": (TransformerConfig(n_layers=6, d_model=288, n_heads=6), 16, 256),
    "25M": (TransformerConfig(n_layers=8, d_model=512, n_heads=8), 8, 256),
}


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per model and granularity."""
    for name in options.models:
        config, batch, seq = MODELS[name]
        model = Transformer(config)
        ids = torch.randint(config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model: Any = model, ids: Any = ids, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            loss, count = language_model_loss(model, {"input_ids": ids, "labels": ids})
            (loss / count).backward()
            optimizer.step()

        for granularity in ("tensor", "channel"):
            lotion = Lotion(model, LotionConfig("int4", granularity=granularity))
            count = batch * (seq - 1)
            step()

            def extra(lotion: Lotion = lotion, count: int = count) -> None:
                lotion.accumulate(count)
                lotion.add_penalty_()

            times = in_turn({"step": step, "lotion": extra}, options.samples)
            samples = {key: [round(1e3 * value, 3) for value in values] for key, values in times.items()}
            medians = {key: statistics.median(values) for key, values in samples.items()}
            weights = sum(weight.numel() for weight in lotion.weights.values())
            yield {
                "model": name,
                "weights": weights,
                "tokens": batch * seq,
                "granularity": granularity,
                "step_ms": round(medians["step"], 2),
                "lotion_ms": round(medians["lotion"], 3),
                "share_percent": round(100 * medians["lotion"] / medians["step"], 2),
                "gb_s": round(32 * weights / medians["lotion"] / 1e6, 2),
                "samples_ms": samples,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = publish(settings(options), cases(options), KEYS, table=options.table)
    if any(row["share_percent"] > 5 for row in found):
        say("the penalty takes more than 5% of a step in some case: see share_percent")


if __name__ == "__main__":
    main()
