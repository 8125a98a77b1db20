import io
import signal

from effml_shared.cli.terminal import continue_with, print_table, say
from effml_shared.errors import Interrupted
from rich.console import Console


def printed(rows, **how):
    output = io.StringIO()
    print_table(Console(file=output, width=80, **how), rows)
    return output.getvalue()


def test_a_table_has_the_keys_of_its_first_row():
    lines = printed([{"a": "x", "n [s]": 1.5}, {"a": "[bold]y", "n [s]": None}]).splitlines()
    assert [line.split() for line in lines[:3]] == [["a", "n", "[s]"], ["x", "1.5"], ["[bold]y", "–"]]
    assert printed([]) == ""


def test_verdicts_are_coloured_alone_and_behind_a_number():
    rows = [{"verdict": "holds"}, {"verdict": "1.2% (does not hold)"}, {"verdict": "2 (seeds)"}]
    drawn = printed(rows, force_terminal=True, color_system="standard")
    assert "\x1b[32mholds" in drawn
    assert "\x1b[31m1.2% (does not hold)" in drawn
    assert "m2 (seeds)" not in drawn


def test_one_line_on_stderr(capsys):
    say("two\nlines")
    assert capsys.readouterr().err == "two lines\n"


def test_what_continues_is_quoted_for_a_shell():
    stop = continue_with(["resume", "my runs"], Interrupted("", signal.SIGTERM))
    assert str(stop) == "interrupted; continue with: effml resume 'my runs'"
    assert stop.signum == signal.SIGTERM
    assert continue_with(["x"], KeyboardInterrupt()).signum == signal.SIGINT
