"""One evaluation for every method: put weights on their grid in place, measure, put the originals back.

Where the weights on the grid come from is the method's affair: a cast of what was trained (`cast_weights`), `gptq`, or
what a method at work in the model deploys (`Attached.deployed`, as LSQ with its learned steps needs).
Memory: one copy of the chosen weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_quant.casting import fake_quantize
from effml_quant.quantizer import Quantizer
from effml_quant.selection import WeightFilter, select_weights

__all__ = ["cast_weights", "evaluate", "placed_weights", "quantized_weights"]

CASTS = {"rtn": "rne", "rr": "stochastic"}


@torch.no_grad()
def cast_weights(
    model: nn.Module,
    quantizer: str | Quantizer,
    cast: str = "rtn",
    *,
    generator: torch.Generator | None = None,
    filter: WeightFilter | None = None,
) -> dict[str, Tensor]:
    """Return a model's weights on their grid, by parameter name.

    Args:
        cast: `"rtn"` (to nearest) or `"rr"` (randomised, unbiased).
        generator: of randomised rounding; None: torch's global one.
    """
    check_choice("cast", cast, CASTS)
    quantizer = Quantizer.make(quantizer, rounding=CASTS[cast])
    return {
        name: fake_quantize(weight, quantizer, generator=generator)
        for name, weight in select_weights(model, filter).items()
    }


@contextmanager
def placed_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model hold other weights for a while; the originals come back bit by bit, whatever happens.

    Args:
        weights: by parameter name, of the parameters' shapes.

    Raises:
        ConfigError: the model has no such parameter, or one of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        if name not in parameters or parameters[name].shape != weight.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ConfigError(
                f"{name}: got a weight of shape {tuple(weight.shape)}, expected that of the model's: {found}"
            )
    originals = {name: parameters[name].detach().clone() for name in weights}

    def put(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    try:
        put(weights)
        yield
    finally:
        put(originals)


@contextmanager
def quantized_weights(
    model: nn.Module,
    quantizer: str | Quantizer,
    cast: str = "rtn",
    generator: torch.Generator | None = None,
    filter: WeightFilter | None = None,
) -> Iterator[None]:
    """Let the model hold its weights cast; see `cast_weights` and `placed_weights`.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.7, 0.26]]))
    >>> with quantized_weights(layer, "int4"):
    ...     print(layer(torch.tensor([0.0, 1.0])).item())
    0.30000001192092896
    >>> layer(torch.tensor([0.0, 1.0])).item()
    0.25999999046325684
    """
    with placed_weights(model, cast_weights(model, quantizer, cast, generator=generator, filter=filter)):
        yield


def evaluate(
    model: nn.Module,
    loss: Callable[[nn.Module], float | Tensor],
    quantizer: str | Quantizer,
    cast: str = "rtn",
    draws: int = 1,
    *,
    generator: torch.Generator | None = None,
    filter: WeightFilter | None = None,
) -> float:
    """Return a loss at the cast weights; with `cast="rr"` the mean over independent draws.

    Args:
        loss: of a model, a scalar. Modes (`model.eval()`) are its own affair.
        draws: 1 with `"rtn"`, which has nothing to draw.
    """
    check_count("draws", draws, 1)
    if cast == "rtn" and draws > 1:
        raise ConfigError(f"draws: got {draws}, expected 1 with cast='rtn'")
    losses = []
    for _ in range(draws):
        with torch.no_grad(), quantized_weights(model, quantizer, cast, generator, filter):
            losses.append(float(loss(model)))
    return statistics.fmean(losses)
