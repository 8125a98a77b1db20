"""Numbers of packages/effml-optim/README.md."""

from __future__ import annotations

from measured import markdown


def claims() -> str:
    return markdown.claims("optim.soap", "optim.seesaw")
