"""LOTION: train on the expectation of the loss under randomised rounding of the weights.

variance     rounding and its variance            curvature   what weighs it: estimates of the Gauss-Newton diagonal
penalty      the term and its gradient            shards      blocks of weights that are sharded over processes
method       `Lotion`, in any training loop       report      predicted cost of casting, layer by layer
smoothing    the expectation itself, if small     gaussian    the same by noise on the weights, without curvature
compiled     the gradient in C, on a CPU          configuration    what it is told, and which weights it takes
"""

from effml_quant.lotion.configuration import LotionConfig
from effml_quant.lotion.method import Lotion

__all__ = ["Lotion", "LotionConfig"]
