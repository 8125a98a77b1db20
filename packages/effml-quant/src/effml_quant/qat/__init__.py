"""Baselines of quantised training and deployment, all with one cast, one choice of weights and one evaluation."""

from effml_quant.qat.attachment import Attached, WeightMethod, attach
from effml_quant.qat.evaluation import cast_weights, evaluate, placed_weights, quantized_weights
from effml_quant.qat.export import to_quantized
from effml_quant.qat.gptq import gptq
from effml_quant.qat.lsq import LSQ
from effml_quant.qat.pact import PACT
from effml_quant.qat.straight_through import PTQ, RAT, STE

__all__ = [
    "LSQ",
    "PACT",
    "PTQ",
    "RAT",
    "STE",
    "Attached",
    "WeightMethod",
    "attach",
    "cast_weights",
    "evaluate",
    "gptq",
    "placed_weights",
    "quantized_weights",
    "to_quantized",
]
