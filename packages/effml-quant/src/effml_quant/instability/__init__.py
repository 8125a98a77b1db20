"""Why training in block-scaled formats goes wrong, measured, and what to do about it while it runs.

proxy             a student-teacher residual MLP         spikes          of the loss; turns of the gradient norm
gradient_bias     the exact gradient at the same point   interventions   another scheme from a checkpoint on
trajectory_bias   that of another run                    guard           another scheme when a meter says so
clamping          what saturates, or shares a code       rescaling       the symmetry that moves gains
gain_lint         gains of a checkpoint, all formats     scaling_law     loss in parameters and tokens
probes            what all meters share
"""

from effml_quant.instability.clamping import ClampMeter, count_clamped
from effml_quant.instability.gain_lint import lint_gains
from effml_quant.instability.gradient_bias import GradientBiasMeter
from effml_quant.instability.guard import PrecisionGuard, Threshold
from effml_quant.instability.interventions import INTERVENTIONS, intervene, run_intervention
from effml_quant.instability.proxy import ProxyConfig, StudentTeacher
from effml_quant.instability.rescaling import fold_gains, rescale_gains
from effml_quant.instability.scaling_law import ScalingLaw, fit_scaling_law
from effml_quant.instability.spikes import SpikeDetector, find_spikes
from effml_quant.instability.trajectory_bias import GradientRecorder, TrajectoryMeter

__all__ = [
    "INTERVENTIONS",
    "ClampMeter",
    "GradientBiasMeter",
    "GradientRecorder",
    "PrecisionGuard",
    "ProxyConfig",
    "ScalingLaw",
    "SpikeDetector",
    "StudentTeacher",
    "Threshold",
    "TrajectoryMeter",
    "count_clamped",
    "find_spikes",
    "fit_scaling_law",
    "fold_gains",
    "intervene",
    "lint_gains",
    "rescale_gains",
    "run_intervention",
]
