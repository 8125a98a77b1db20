"""The Recurrent Transformer (arXiv 2604.21215) and its exact tiled algorithm."""

from effml_arch.recurrent.conversion import convert_transformer, set_write_mix
from effml_arch.recurrent.layer import RecurrentContext, RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.model import RecurrentTransformer
from effml_arch.recurrent.schedule import pull_schedule, tile_schedule

__all__ = [
    "RecurrentContext",
    "RecurrentTransformer",
    "RecurrentTransformerConfig",
    "RecurrentTransformerLayer",
    "convert_transformer",
    "pull_schedule",
    "set_write_mix",
    "tile_schedule",
]
