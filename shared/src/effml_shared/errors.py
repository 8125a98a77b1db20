"""Errors a user can act on: each says in one line what was got, what was expected and what to do.

The command line prints an `EffmlError` as that one line and leaves with exit code 2. Anything else that reaches
the user as a traceback is a bug in effml.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EffmlError",
    "Interrupted",
    "MissingExtra",
    "NonFiniteError",
    "require",
]


class EffmlError(Exception):
    """Base of everything effml tells its user; the message is one line."""


class ConfigError(EffmlError, ValueError):
    """A configuration field or command-line argument is unknown, ill-typed or out of range."""


class DataError(EffmlError):
    """A corpus, tokenizer or dataset cannot be read or holds nothing to train on."""


class CheckpointError(EffmlError):
    """A checkpoint or run directory cannot be written, is damaged, or does not fit what is being restored."""


class NonFiniteError(EffmlError):
    """A loss or gradient became NaN or infinite; names the step, the parameter and the last good checkpoint."""


class MissingExtra(EffmlError, ImportError):
    """An optional dependency is needed and not installed; names the command that installs it."""


class Interrupted(EffmlError):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved a checkpoint. `signum` is the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency inside the function that needs it.

    Args:
        module: import name, such as `"tokenizers"`.
        extra: what to install, such as `"effml-shared[data]"`.
        purpose: completes "`module` is needed ...", such as `"to read Parquet files"`.

    Raises:
        MissingExtra: the module is not installed; the message holds the `pip install` line.

    >>> require("json", extra="effml-shared[data]", purpose="to read JSON").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(f"{module} is needed {purpose} and is not installed: run `pip install '{extra}'`") from None
