"""Training in low precision: which tensor has which format, and models that obey it.

scheme       one frozen description          linear       products with quantised operands, forward and backward
application  schemes on a model's modules    norms        encoded gains
switching    other schemes during a run      operations   activations, softmax, attention, residual sums
hadamard     the rotation of NVFP4's recipe
"""

from effml_quant.precision.application import ModelHandle, apply_scheme
from effml_quant.precision.linear import MXLinear, mx_linear
from effml_quant.precision.scheme import PrecisionScheme
from effml_quant.precision.switching import PrecisionSwitch

__all__ = ["MXLinear", "ModelHandle", "PrecisionScheme", "PrecisionSwitch", "apply_scheme", "mx_linear"]
