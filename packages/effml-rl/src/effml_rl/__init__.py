"""effml-rl: reinforcement learning of language models with verifiers.

No method has landed yet.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("effml-rl")
