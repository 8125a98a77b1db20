"""effml-arch: the Recurrent Transformer by its exact tiled algorithm, baselines of equal size, and what they cost."""

from importlib.metadata import version

from effml_arch.cost_ledger import CostLedger, rt_cost, transformer_cost
from effml_arch.presets import PRESETS, preset
from effml_arch.recurrent import (
    RecurrentTransformer,
    RecurrentTransformerConfig,
    RecurrentTransformerLayer,
    convert_transformer,
    set_write_mix,
)
from effml_arch.sliding_window import SlidingWindowConfig, SlidingWindowTransformer
from effml_arch.streaming import stream_text
from effml_arch.width_search import match_width
from effml_arch.window_cache import WindowCache

__all__ = [
    "PRESETS",
    "CostLedger",
    "RecurrentTransformer",
    "RecurrentTransformerConfig",
    "RecurrentTransformerLayer",
    "SlidingWindowConfig",
    "SlidingWindowTransformer",
    "WindowCache",
    "__version__",
    "convert_transformer",
    "match_width",
    "preset",
    "rt_cost",
    "set_write_mix",
    "stream_text",
    "transformer_cost",
]

__version__ = version("effml-arch")
