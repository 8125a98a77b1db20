"""How much of a tensor saturates, lands in a format's last code, or shares a code with the rest of its block.

Under the scale rule `floor`, a block's largest magnitude a is only known to lie in [2^e, 2^(e+1)), and what exceeds
c 2^e, c = max / 2^emax (1.75 in E4M3), is *clamped* to it. Values spread over binades lose little: 0.9% of Gaussian
ones clamp in E4M3. The gains of a norm are not spread. Near 1 and with a block maximum below it, all of (0.875, 1)
become 0.875: the whole block is off by one factor of up to 12.5%, which no averaging removes, and what training wrote
into the differences between gains is gone.

    clamp        share of elements with |v| > max X, X the scale of their block
    last code    share of elements that are rounded or clamped to the largest value
    codes        different values in a block after quantising, on average

State: none. Cost: a few passes over the tensor; counting codes sorts each block.
Source: arXiv 2506.20752, its sections on layer-norm gains and last-bucket activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_quant.blocks import Blocks
from effml_quant.casting import check_input, to_grid
from effml_quant.formats import Format
from effml_quant.instability.probes import Probe, undisturbed
from effml_quant.precision.norms import is_norm
from effml_quant.quantizer import Quantizer

__all__ = ["ClampCount", "ClampMeter", "count_clamped", "find_gains"]

Spec = str | Format | Quantizer


class ClampCount(NamedTuple):
    """What became of a tensor's elements; counts of two tensors add up with `+`.

    Attributes:
        elements, blocks: how many there are.
        clamped, last: elements that saturate; that end at the largest value.
        values, codes: different values within a block before and after quantising, summed over blocks.
        collapsed: blocks of several values that share one code.
    """

    elements: int = 0
    blocks: int = 0
    clamped: int = 0
    last: int = 0
    values: int = 0
    codes: int = 0
    collapsed: int = 0

    def __add__(self, other: ClampCount) -> ClampCount:  # type: ignore[override]
        return ClampCount(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def clamp_fraction(self) -> float:
        return self.clamped / max(self.elements, 1)

    @property
    def last_fraction(self) -> float:
        return self.last / max(self.elements, 1)

    @property
    def codes_per_block(self) -> float:
        return self.codes / max(self.blocks, 1)

    @property
    def collapsed_fraction(self) -> float:
        return self.collapsed / max(self.blocks, 1)


@torch.no_grad()
def count_clamped(x: Tensor, spec: Spec, **fields: Any) -> ClampCount:
    """Count what quantising a tensor along its last axis would clamp and merge.

    Args:
        x: any shape of at least one axis, floating.
        spec: name, `Format` or `Quantizer` with a scale. Stochastic rounding counts as to nearest.
        **fields: of `Quantizer`.

    Raises:
        ConfigError: the format has no blocks (bfloat16), or the tensor does not fit the quantiser.

    >>> count_clamped(torch.linspace(0.90, 0.99, 32), "mxfp8_e4m3")
    ClampCount(elements=32, blocks=1, clamped=32, last=32, values=32, codes=1, collapsed=1)
    """
    q = Quantizer.make(spec, **fields)
    if q.rounding == "stochastic":
        q = q.replace(rounding="rne")
    if q.scale_kind == "none":
        raise ConfigError(f"format: got {q.format.name}, expected one with a scale: nothing else clamps")
    check_input(x, q)
    if not x.numel():
        return ClampCount()
    grid = to_grid(x, q)
    blocks = grid.blocks
    real = blocks.split(torch.ones(x.shape, dtype=torch.bool, device=x.device))  # not padding
    high = torch.where(grid.negative, grid.scale.low, grid.scale.high)
    values = _distinct(blocks.split(x), real, blocks)
    codes = _distinct(torch.where(grid.negative, -grid.p, grid.p), real, blocks)
    counts = [((grid.z > high) & real).sum(), ((grid.p >= high) & real).sum()]
    counts += [values.sum(), codes.sum(), ((codes == 1) & (values > 1)).sum()]
    return ClampCount(x.numel(), codes.numel(), *torch.stack(counts).tolist())


def _distinct(view: Tensor, real: Tensor, blocks: Blocks) -> Tensor:
    """Return how many different values each block has; -0 is 0, and NaN differs from all, itself included."""
    inner = list(blocks.dims)
    outer = [axis for axis in range(view.ndim) if axis not in inner]
    rows, mask = (t.permute(*outer, *inner).flatten(len(outer)).flatten(0, -2) for t in (view, real))
    rows = torch.where(mask, rows, rows[:, :1])  # padding stands behind the first element, which is real
    ordered = rows.sort(dim=-1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)


_GAIN = re.compile(r"(?i)(norm|(?:^|[._])ln)[^.]*\.(weight|gamma|scale)$")


def find_gains(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gains of a model's norms by name; of a `state_dict`, going by names such as `ln_1.weight`.

    A gain is the `weight` (features) of what a scheme's `norm_affine` takes for a norm.
    """
    if isinstance(model, nn.Module):
        norms = [(name, module) for name, module in model.named_modules() if is_norm(module)]
        named = [(f"{name}.weight".lstrip("."), getattr(module, "weight", None)) for name, module in norms]
    else:
        named = [(name, tensor) for name, tensor in model.items() if _GAIN.search(name)]
    return {name: t.detach() for name, t in named if isinstance(t, Tensor) and t.ndim == 1 and t.is_floating_point()}


class ClampMeter(Probe):
    """Measure clamping of gains, weights and the inputs of linear layers while a model trains.

    The readings are `clamp/gains`, `clamp/weights`, `clamp/inputs` and, with `detail`, one of each per tensor; the same
    for `last/` (share in the last code) and `codes/` (different codes per block).

    Args:
        model: the module itself (of DDP: its `.module`).
        spec: format or quantiser to count under, whatever the model computes in.
        loss: `loss(model, batch)`, only its forward pass is used. None: no inputs are measured and no batch is needed.
        every, batches: see `Probe`.
        filter: `filter(name)` says whether a weight (`up.weight`) or input (`up.input`) is measured; None: all of
            `nn.Linear`. Gains always are.
        detail: readings per tensor too.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec = "mxfp8_e4m3",
        *,
        loss: Callable[[nn.Module, Any], Any] | None = None,
        every: int = 100,
        batches: Sequence[Any] | None = None,
        filter: Callable[[str], bool] | None = None,
        detail: bool = False,
    ) -> None:
        super().__init__(every, batches if loss is not None else [()])
        self.model, self.quantizer, self.loss = model, Quantizer.make(spec), loss
        self.filter, self.detail = filter or (lambda name: True), detail

    def count(self, *batches: Any) -> dict[str, dict[str, ClampCount]]:
        """Return counts by kind (`gains`, `weights`, `inputs`) and name of the tensor; batches add up."""
        linears = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        weights = {f"{name}.weight".lstrip("."): m.weight.detach() for name, m in linears.items()}
        found = {
            "gains": {name: count_clamped(t, self.quantizer) for name, t in find_gains(self.model).items()},
            "weights": {name: count_clamped(t, self.quantizer) for name, t in weights.items() if self.filter(name)},
        }
        if self.loss is None:
            return found
        inputs: dict[str, ClampCount] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def see(module: nn.Module, args: tuple[Any, ...]) -> None:
                inputs[name] = inputs.get(name, ClampCount()) + count_clamped(args[0], self.quantizer)

            return see

        named = {f"{name}.input".lstrip("."): module for name, module in linears.items()}
        handles = [m.register_forward_pre_hook(watch(name)) for name, m in named.items() if self.filter(name)]
        try:
            with undisturbed(self.model), torch.no_grad():
                for batch in batches:
                    self.loss(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {**found, "inputs": inputs}

    def measure(self, *batches: Any) -> dict[str, float]:
        """Return the readings."""
        readings: dict[str, float] = {}
        for kind, counts in self.count(*batches).items():
            totals = {kind: sum(counts.values(), ClampCount())} if counts else {}
            for name, count in {**totals, **(counts if self.detail else {})}.items():
                readings[f"clamp/{name}"] = count.clamp_fraction
                readings[f"last/{name}"] = count.last_fraction
                readings[f"codes/{name}"] = count.codes_per_block
        return readings
