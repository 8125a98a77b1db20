"""effml-quant: number formats to the bit, training in low precision and its instabilities, LOTION.

More in the rooms: `precision` (schemes on any model), `instability` (meters, interventions, scaling laws), `lotion`,
`qat` (baselines and their evaluation), `interchange` (other people's files).
"""

from importlib.metadata import version

from effml_quant.casting import fake_quantize
from effml_quant.formats import Format, formats
from effml_quant.lotion import Lotion, LotionConfig
from effml_quant.packing import pack_fp4, pack_fp6, pack_int4, unpack_fp4, unpack_fp6, unpack_int4
from effml_quant.precision import PrecisionScheme, PrecisionSwitch, apply_scheme
from effml_quant.qtensor import QTensor, quantize
from effml_quant.quantizer import Quantizer
from effml_quant.storage import load_quantized, save_quantized
from effml_quant.weights import quantize_weights_, what_if

__all__ = [
    "Format",
    "Lotion",
    "LotionConfig",
    "PrecisionScheme",
    "PrecisionSwitch",
    "QTensor",
    "Quantizer",
    "__version__",
    "apply_scheme",
    "fake_quantize",
    "formats",
    "load_quantized",
    "pack_fp4",
    "pack_fp6",
    "pack_int4",
    "quantize",
    "quantize_weights_",
    "save_quantized",
    "unpack_fp4",
    "unpack_fp6",
    "unpack_int4",
    "what_if",
]

__version__ = version("effml-quant")
