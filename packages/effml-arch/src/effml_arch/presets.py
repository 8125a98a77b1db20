"""The Transformers that the papers behind effml train, by name, as functions that return a `TransformerConfig`.

    olmo-*   the controls of the Recurrent Transformer (arXiv 2604.21215): LayerNorm with a scale, QK-norm over all
             heads, exact GELU, ALiBi, T5 vocabulary. Named by the parameters outside embedding and head.
    mx-nN    N layers of width 64 N (arXiv 2506.20752): the same block with rotary positions and 32,000 ids.
    gn-*     the plain RMSNorm blocks of arXiv 2510.09378, T5 vocabulary, GELU or SwiGLU with as many hidden channels.
             Called LLaMA-type there; that means rotary positions here.

That other papers of the group use the shapes of olmo-600m and olmo-1.2b is unverified, and so is the width 1408 of
olmo-300m-12l in the released training files, which say 1440 with 16 heads; 1408 is the paper's. Heads have 64 channels
except in gn-150m (48) and test-tiny (16).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.layers import TransformerConfig

__all__ = ["PRESETS", "gn", "mx", "olmo", "preset", "tiny"]

T5_IDS = 32_100  # padded to 32,128 rows


def olmo(n_layers: int, d_model: int) -> TransformerConfig:
    """Return the OLMo-style control of a Recurrent Transformer, with heads of 64 channels.

    >>> olmo(12, 1408).n_heads
    22
    """
    check_count("d_model", d_model, 64)
    return TransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=d_model // 64,
        d_ff=4 * d_model,
        vocab_size=T5_IDS,
        position="alibi",
        norm="layer",
        norm_eps=1e-5,
        qk_norm="full",
        mlp="gelu",
    )


def mx(n_layers: int) -> TransformerConfig:
    """Return the language model that arXiv 2506.20752 scales by depth: n layers, n heads, width 64 n."""
    return replace(olmo(n_layers, 64 * n_layers), vocab_size=32_000, position="rope")


def gn(n_layers: int, d_model: int, n_heads: int, *, mlp: str = "gelu") -> TransformerConfig:
    """Return a plain RMSNorm Transformer whose MLP is 4 d_model wide, SwiGLU's as well."""
    return TransformerConfig(
        n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_ff=4 * d_model, vocab_size=T5_IDS, mlp=mlp
    )


def tiny() -> TransformerConfig:
    """Return the smallest model in which everything differs: grouped queries, head QK-norm, SwiGLU, tied head."""
    return TransformerConfig(
        n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=256, vocab_size=128, qk_norm="head", tied=True
    )


PRESETS: dict[str, Callable[[], TransformerConfig]] = {
    "olmo-150m": partial(olmo, 12, 1024),
    "olmo-150m-6l": partial(olmo, 6, 1408),
    "olmo-300m": partial(olmo, 24, 1024),
    "olmo-300m-12l": partial(olmo, 12, 1408),
    "olmo-300m-6l": partial(olmo, 6, 2048),
    "olmo-600m": partial(olmo, 24, 1408),
    "olmo-1.2b": partial(olmo, 24, 2048),
    "gn-45m": partial(gn, 4, 512, 8),
    "gn-45m-swiglu": partial(gn, 4, 512, 8, mlp="swiglu"),
    "gn-150m": partial(gn, 12, 768, 16),
    "gn-150m-swiglu": partial(gn, 12, 768, 16, mlp="swiglu"),
    "test-tiny": tiny,
}


def preset(name: str, **changes: Any) -> TransformerConfig:
    """Return a named configuration with fields changed; `mx-n6` and its like exist for every depth.

    Raises:
        ConfigError: there is no such name or field; the message has the nearest.

    >>> preset("olmo-150m", position="rope").n_layers
    12
    """
    depth = re.fullmatch(r"mx-n([1-9]\d*)", name)
    if depth is None and name not in PRESETS:
        raise ConfigError(f"preset: got {name!r}, expected {_nearest(name, [*PRESETS, 'mx-n6'])}")
    config = PRESETS[name]() if depth is None else mx(int(depth[1]))
    known = [field.name for field in fields(config)]
    for field in changes:
        if field not in known:
            raise ConfigError(f"preset: got a field {field!r}, expected {_nearest(field, known)}")
    return replace(config, **changes)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{near[0]!r} perhaps" if near else f"one of {', '.join(known)}"
