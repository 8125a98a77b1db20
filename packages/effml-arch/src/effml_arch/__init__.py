"""effml-arch: the Recurrent Transformer, its tiled algorithm and its baselines.

No method has landed yet.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("effml-arch")
