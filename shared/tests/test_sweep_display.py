import io
import json

import pytest
from effml_shared.cli.sweep_display import SweepDisplay, position
from effml_shared.sweeps.directory import Sweep
from rich.console import Console


@pytest.fixture
def sweep(tmp_path, toy):
    return Sweep.create(tmp_path / "s", toy, "smoke", {"lr": ["0.1", "0.2", "0.3"]})


def step(run, content):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text(content)


def test_without_a_terminal_there_is_a_line_for_what_happens(sweep):
    output = io.StringIO()
    with SweepDisplay(sweep, Console(file=output, width=100), interval=0.0) as display:
        display.show({"lr=0.1": "queued"}, ["lr=0.2", "lr=0.3"])
        step(sweep.directory("lr=0.1"), '{"trial": "SGD/seed=0", "step": 3, "loss": 0.5}\n')
        display.show({"lr=0.1": "running", "lr=0.2": "queued"}, ["lr=0.3"])
        display.show({"lr=0.2": "queued"}, ["lr=0.3"])
    assert output.getvalue().splitlines() == [
        "lr=0.1: started",
        "lr=0.1: SGD/seed=0  step 3  loss 0.500",
        "lr=0.1: not begun",
    ]


def test_on_a_terminal_counts_and_positions_are_drawn_and_cleaned_up(sweep):
    output = io.StringIO()
    step(sweep.directory("lr=0.1"), '{"trial": "SGD/seed=0", "step": 3, "loss": 0.5}\n')
    with SweepDisplay(sweep, Console(file=output, force_terminal=True, width=100)) as display:
        display.show({"lr=0.1": "running", "lr=0.2": "queued"}, ["lr=0.3"])
    drawn = output.getvalue()
    assert "3 points: 1 running, 1 queued, 1 to come" in drawn
    assert "lr=0.1" in drawn
    assert "SGD/seed=0  step 3  loss 0.500" in drawn
    assert "\x1b[?25h" in drawn  # the cursor is given back


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "begins"),
        ('{"trial": "a", "step": 1', "begins"),
        ("nonsense\n", "begins"),
        ("[]\n", "begins"),
        ('{"trial": "a", "step": 1, "loss": null}\n', "a  step 1"),
        ('{"trial": "a", "step": 1, "loss": 2.0}\n{"trial": "a", "st', "a  step 1  loss 2.000"),
        ("x" * 20_000 + "\n" + json.dumps({"trial": "b", "step": 7}) + "\n", "b  step 7"),
    ],
)
def test_a_position_is_the_last_whole_line(tmp_path, content, words):
    step(tmp_path / "run", content)
    assert position(tmp_path / "run") == words


def test_a_run_that_is_not_there_yet_begins(tmp_path):
    assert position(tmp_path) == "begins"
