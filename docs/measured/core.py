"""Numbers of shared/README.md."""

from __future__ import annotations

from measured.markdown import number, paragraph, settings
from measured.results import cases


def decoding() -> str:
    """Return what a token costs with the cache, beside the same model in Hugging Face's `generate`."""
    (ours,), (theirs,) = (
        cases("bench_decode", batch=16, context=512, contender=contender) for contender in ("transformer", "llama")
    )
    return paragraph(f"""
        Greedy decoding of 16 rows after 512 tokens, {ours["layers"]} layers of width {ours["width"]}, {settings(ours)}:
        {number(ours["ms_per_token"])} ms per step, against {number(theirs["ms_per_token"])} ms for the same model as a
        Llama in Hugging Face's `generate`, with equal tokens
        (`nox -s bench -- arch`, [raw](../docs/results/bench_decode.cpu.jsonl)).
    """)
