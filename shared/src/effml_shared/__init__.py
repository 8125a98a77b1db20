"""effml-shared: the thin core under every effml package (see docs/architecture.md for its floors)."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("effml-shared")
