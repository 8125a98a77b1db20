"""What can be changed about a run in low precision while it goes on, and a run that goes on so.

    fp32               nothing is quantised any more
    bump_exponent      scales that saturate nothing: `rceil`, for every blocked tensor
    no_norm_quant      norms as they are in float32
    bf16_act           X in bfloat16 in both products; gradients keep their formats
    bf16_act_all       X and G in bfloat16, weights keep theirs
    forward_only       exact backward products
    no_gelu_quant      activation functions in float32
    bf16_weight        W in bfloat16 in the forward product
    bf16_weight_all    and in the backward one

An intervention is a function from scheme to scheme. It goes on from a checkpoint with the weights *and* the optimizer's
moments: starting these anew would look like a cure. State and cost: none.
Source: arXiv 2506.20752 and its code. `bump_exponent` there raises exponents element by element, by a mask over the
wrong axis; `no_gelu_quant` there changes nothing, since the activation is never quantised. Here both do what they say.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from effml_shared import distributed, seeding
from effml_shared.checkpoint import Checkpoint
from effml_shared.errors import ConfigError
from effml_shared.loop import Hook, Loop
from effml_shared.schedules import Clock

from effml_quant.precision.scheme import PrecisionScheme

if TYPE_CHECKING:
    from effml_quant.precision.application import ModelHandle

__all__ = ["INTERVENTIONS", "Continuation", "intervene", "run_intervention"]

Intervention = Callable[[PrecisionScheme], PrecisionScheme | None]
BF16 = "bfloat16"


def _resolved(scheme: PrecisionScheme, **fields: str | None) -> PrecisionScheme:
    """Set fields and keep what follows one of them by default at the format that it has."""
    followers = ("w_bwd", "a_bwd", "g_dw", "g_dx", "activation")
    kept = {role: scheme.format(role) for role in followers}
    return scheme.replace(**{**kept, **fields})


INTERVENTIONS: Mapping[str, Intervention] = MappingProxyType(
    {
        "fp32": lambda scheme: None,
        "bump_exponent": lambda scheme: scheme.replace(scale_rule="bump"),
        "no_norm_quant": lambda scheme: scheme.replace(norm_affine=None),
        "bf16_act": lambda scheme: _resolved(scheme, a_fwd=BF16, a_bwd=BF16),
        "bf16_act_all": lambda scheme: _resolved(scheme, a_fwd=BF16, a_bwd=BF16, g_dw=BF16, g_dx=BF16),
        "forward_only": lambda scheme: scheme.replace(quantize_backward=False),
        "no_gelu_quant": lambda scheme: scheme.replace(activation=None),
        "bf16_weight": lambda scheme: _resolved(scheme, w_fwd=BF16),
        "bf16_weight_all": lambda scheme: _resolved(scheme, w_fwd=BF16, w_bwd=BF16),
    }
)
"""By name, functions from a scheme to what takes its place; None: no quantising."""


def intervene(name: str, scheme: PrecisionScheme) -> PrecisionScheme | None:
    """Return the scheme after a named intervention.

    Raises:
        ConfigError: there is no such intervention; names the nearest.

    >>> intervene("bf16_act", PrecisionScheme()).format("g_dw").name
    'mxfp8_e4m3'
    """
    if name not in INTERVENTIONS:
        near = difflib.get_close_matches(str(name), INTERVENTIONS, n=1, cutoff=0.0)
        raise ConfigError(f"intervention: got {name!r}, did you mean {near[0]!r}? (all: {', '.join(INTERVENTIONS)})")
    return INTERVENTIONS[name](scheme)


class Continuation(Hook):
    """Start a `Loop` from a checkpoint of another run: its weights, optimizer, data, clock and random state.

    Place it first. A loop that has a checkpoint of its own goes on from that one. Other hooks start anew.

    Args:
        checkpoint: as `Checkpoints.load` returns it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def on_start(self, loop: Loop) -> None:
        """Put everything back, unless the loop has already done steps of its own."""
        if loop.clock.step:
            return
        state = copy.deepcopy(self.checkpoint.state)  # an optimizer goes on writing into the moments that it is given
        loop.step.load_state_dict(state["step"])
        loop.data.load_state_dict(state["data"])
        loop.clock = Clock(**state["clock"])
        if self.checkpoint.rank_state is not None:
            seeding.restore(self.checkpoint.rank_state["random"])
        else:  # another world size
            seeding.seed_all(seeding.derive_seed(loop.seed, "loop", distributed.rank(), self.checkpoint.step))


def run_intervention(
    name: str, loop: Loop, handle: ModelHandle, checkpoint: Checkpoint, scheme: PrecisionScheme | None = None
) -> Clock:
    """Continue a run from a checkpoint under a named intervention, to the end of the loop's budget.

    Args:
        name: one of `INTERVENTIONS`, or `"none"`: go on as before.
        loop: a new one of the same model, data and schedule; its budget counts from the start of the first run.
        handle: of the loop's model.
        checkpoint: of the run to be changed.
        scheme: that the run had. None: the one that the model has.

    Raises:
        ConfigError: the intervention is unknown, there is no scheme, or the budget ends before the checkpoint.
    """
    scheme = scheme or handle.scheme
    if scheme is None:
        raise ConfigError("scheme: got None on a model without one, expected that of the run to be changed")
    changed = scheme if name == "none" else intervene(name, scheme)
    if loop.budget.spent(Clock(**checkpoint.state["clock"])):
        raise ConfigError(
            f"budget: got {loop.budget}, expected more than the {checkpoint.step} steps of the checkpoint"
        )
    handle.set(changed)
    loop.hooks.insert(0, Continuation(checkpoint))
    return loop.run()
