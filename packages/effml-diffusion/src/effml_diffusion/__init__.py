"""effml-diffusion: masked diffusion and flexible-length masked diffusion.

No method has landed yet.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("effml-diffusion")
