"""effml-quant: number formats to the bit, training in low precision and its instabilities, LOTION."""

from importlib.metadata import version

from effml_quant.casting import fake_quantize
from effml_quant.formats import Format, formats
from effml_quant.quantizer import Quantizer

__all__ = ["Format", "Quantizer", "__version__", "fake_quantize", "formats"]

__version__ = version("effml-quant")
