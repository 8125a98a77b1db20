"""effml-quant: microscaling formats, training in low precision and its instabilities, LOTION.

No method has landed yet.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("effml-quant")
