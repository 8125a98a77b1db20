import io

import torch
from effml_shared.loop import Budget, Loop
from effml_shared.progress import ProgressBar
from effml_shared.schedules import cosine
from rich.console import Console


class Count:
    def next(self, batch_size):
        return torch.zeros(batch_size)

    def __call__(self, batch, plan):
        return {"loss": 1.5, "tokens": 10 * len(batch)}

    def state_dict(self):
        return {}


def show(terminal, expect=True, interval=0.0, within=""):
    output = io.StringIO()
    bar = ProgressBar(Console(file=output, force_terminal=terminal, width=120), interval=interval, within=within)
    if expect:
        bar.expect(400)
    for _ in range(2):
        Loop(Count(), Count(), cosine(50, 200), budget=Budget(samples=200), hooks=[bar]).run()
    return output.getvalue()


def test_without_a_terminal_it_prints_plain_lines():
    lines = show(terminal=False).splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("training  step 1  loss 1.500  ")
    assert "tok/s" in lines[0]
    assert lines[-1].endswith("0:00 left")
    assert "\x1b" not in "".join(lines)


def test_it_says_what_the_trial_belongs_to():
    assert show(terminal=False, within="1/3 toy: ").startswith("1/3 toy: training  step 1  ")


def test_the_time_left_knows_that_preparations_come_once(monkeypatch):
    now = 0.0
    monkeypatch.setattr("effml_shared.progress.time.monotonic", lambda: now)
    output = io.StringIO()
    bar = ProgressBar(Console(file=output, width=120), interval=0.0)
    bar.expect(400)
    now = 60.0  # reading data, importing

    class Slow(Count):
        def __call__(self, batch, plan):
            nonlocal now
            now += 2.0
            return super().__call__(batch, plan)

    for _ in range(2):
        Loop(Slow(), Count(), cosine(50, 200), budget=Budget(samples=200), hooks=[bar]).run()
        now += 8.0  # an evaluation after each trial, in which nothing is trained
    left = [line.split()[-2] for line in output.getvalue().splitlines()]
    assert left == ["0:14", "0:12", "0:10", "0:08", "0:10", "0:06", "0:03", "0:00"]


def test_lines_are_rationed():
    assert show(terminal=False, interval=1000.0) == ""


def test_on_a_terminal_it_draws_a_bar_and_cleans_up():
    drawn = show(terminal=True)
    assert "loss 1.500" in drawn
    assert "\x1b[?25h" in drawn  # the cursor is given back


def test_without_an_expectation_there_is_no_time_left():
    assert "left" not in show(terminal=False, expect=False)
