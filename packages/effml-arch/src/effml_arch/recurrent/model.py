"""The Recurrent Transformer: the shared Transformer whose layers, or some of them, are recurrent.

Parameters, their names, their initial draw, cache and generation are those of the shared `Transformer`; only the layer
differs. Layers that `recurrent_layers` leaves out are standard ones. Cost: see `effml_arch.recurrent.layer`; without
gradients, neighbouring recurrent layers may run at once, see `effml_arch.recurrent.wavefront`.
Source: arXiv 2604.21215; stacks of both kinds of layers are our own.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, cast

from effml_shared.kv_cache import KVCache
from effml_shared.layers import Block, Context, TransformerConfig
from effml_shared.transformer import Transformer
from torch import Tensor, nn

from effml_arch.recurrent import wavefront
from effml_arch.recurrent.layer import (
    RecurrentContext,
    RecurrentTransformerConfig,
    RecurrentTransformerLayer,
    recurrent_context,
)

__all__ = ["RecurrentTransformer"]


def _layer(config: TransformerConfig, layer: int) -> nn.Module:
    recurrent = cast(RecurrentTransformerConfig, config)
    return RecurrentTransformerLayer(recurrent, layer) if recurrent.is_recurrent(layer) else Block(config, layer)


class RecurrentTransformer(Transformer):
    """A decoder called as the shared `Transformer`, from a `RecurrentTransformerConfig`.

    `wavefront` is read at every call and may be set on the model.

    >>> config = RecurrentTransformerConfig(n_layers=2, d_model=32, vocab_size=50, recurrent_layers=(1,))
    >>> [type(layer).__name__ for layer in RecurrentTransformer(config).model["layers"]]
    ['Block', 'RecurrentTransformerLayer']
    """

    block: Any = staticmethod(_layer)

    def __init__(self, config: RecurrentTransformerConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.wavefront = config.wavefront

    def _states(self, x: Tensor, context: Context) -> list[Tensor]:
        if not wavefront.wanted(self.wavefront, x):
            return super()._states(x, context)
        states, shared = [x], cast(RecurrentContext, context)
        stack = cast(nn.ModuleList, self.model["layers"])
        for recurrent, run in groupby(stack, lambda layer: isinstance(layer, RecurrentTransformerLayer)):
            layers: list[Any] = list(run)
            if recurrent and wavefront.serves(layers, x):
                states += wavefront.wavefront(layers, states[-1], shared)
            else:
                for layer in layers:
                    states.append(layer(states[-1], shared))
        return states

    def _context(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, doc_ids: Tensor | None, cache: KVCache | None
    ) -> Context:
        config = cast(RecurrentTransformerConfig, self.config)
        attention = None
        if not all(map(config.is_recurrent, range(config.n_layers))):
            attention = super()._context(x, mask, positions, doc_ids, cache).mask  # for the standard layers
            mask = mask if cache is None else None  # the cache has taken note of it
        context = recurrent_context(
            config, x, attention_mask=mask, position_ids=positions, doc_ids=doc_ids, cache=cache
        )
        context.mask = attention
        return context
