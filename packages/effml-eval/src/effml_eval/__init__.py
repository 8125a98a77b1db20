"""effml-eval: evaluation of language models and concept autoencoders.

No method has landed yet.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("effml-eval")
