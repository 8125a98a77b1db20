"""`effml list | run | resume | report | compare | reproduce | sweep | cite | doctor`.

Every command ends with an answer. Whatever is wrong with the input is one line on stderr and exit code 2; Ctrl-C
leaves a checkpoint and prints the command that continues (exit code 130, SIGTERM 143).

    arguments    what can be typed            run          run, resume, report
    terminal     how answers are printed      compare      compare
    installed    list, cite, doctor           reproduce    reproduce            sweep    sweep
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from effml_shared import distributed
from effml_shared.cli.arguments import parse
from effml_shared.cli.terminal import say
from effml_shared.errors import EffmlError, Interrupted

__all__ = ["main", "parse"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    console = Console()
    try:
        options = parse(arguments)
        if not sys.stdout.isatty() and console.width < 100:
            console = Console(width=120)  # piped output is read in wide windows
        with distributed.launched():
            return options.command(options, console) or 0
    except Interrupted as stop:
        say(f"effml: {stop}")
        return 128 + stop.signum
    except KeyboardInterrupt:
        say("effml: stopped before anything could be saved")
        return 130
    except EffmlError as error:
        say(f"effml: error: {error}")
        return 2
    except OSError as error:  # what no floor below has put into better words: a read-only report, a closed pipe
        say(f"effml: error: {error}")
        return 2
