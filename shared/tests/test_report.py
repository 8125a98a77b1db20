import math
import re

import pytest
from effml_shared.errors import CheckpointError
from effml_shared.report import claims_table, mean_with_interval, number, write_report
from effml_shared.runs import Run


def make(toy, path):
    run = Run.create(path, {"experiment": toy.name, "preset": "smoke"}, "a: <1>\n")
    toy.execute(toy.configure("smoke"), run)
    return run


def test_the_page_stands_alone_and_escapes_what_it_shows(toy, tmp_path):
    page = write_report(make(toy, tmp_path / "r"), toy).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;linear&gt;" in page
    assert "<linear>" not in page
    assert "Adam &lt;b&gt;" in page
    assert page.count("<img") == 3
    assert re.search(r'class="verdict (holds|does|inconclusive)"', page)
    assert sorted(p.name for p in (tmp_path / "r" / "plots").iterdir()) == [
        "claims.png",
        "loss-against-optimizer-steps.png",
        "loss-against-training-seconds.png",
    ]


def test_it_can_be_drawn_before_anything_happened_and_half_way(toy, tmp_path):
    run = Run.create(tmp_path / "r", {"experiment": toy.name, "preset": "smoke"}, "")
    assert "No step has finished yet" in write_report(run, toy).read_text()
    (run.path / "metrics.jsonl").write_text('{"trial": "SGD/a", "step": 1, "seconds": 0.1, "loss": 2.0}\n{"trial": "S')
    page = write_report(run, toy).read_text()
    assert "figures below are partial" in page
    assert page.count("<img") == 2


@pytest.mark.parametrize(("size", "name"), [(9_000, r"plots/claims\.png"), (110_000, r"report\.html")])
def test_a_full_disk_keeps_the_page_that_was_there(toy, tmp_path, full_disk, size, name):
    run = make(toy, tmp_path / "r")
    before = write_report(run, toy).read_bytes()
    files = sorted(run.path.rglob("*"))
    with full_disk(size), pytest.raises(CheckpointError, match=rf"^cannot write .*/{name}: File too large"):
        write_report(run, toy)
    assert (run.path / "report.html").read_bytes() == before
    assert sorted(run.path.rglob("*")) == files


def test_numbers_and_their_absence():
    assert [number(v) for v in (None, float("nan"), 0.123456, 3, "x")] == ["–", "–", "0.1235", "3", "x"]
    verdict = {"claim": {"text": "t", "paper": "p", "unit": "%"}, "mean": None, "low": None, "high": None, "seeds": 0}
    (row,) = claims_table([{**verdict, "verdict": "inconclusive"}])
    assert row["measured"] == "–%"


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (0.0338, -0.054, 0.1216, ("0.034", "[-0.054, 0.122]")),
        (-0.001, -0.04, 0.038, ("-0.001", "[-0.040, 0.038]")),
        (-0.001, -4.1, 4.2, ("0.0", "[-4.1, 4.2]")),
        (12345.6, 12000.0, 12700.0, ("12346", "[12000, 12700]")),
        (30.357, 30.357, 30.357, ("30.4", "[30.4, 30.4]")),
        (0.0, 0.0, 0.0, ("0.0", "[0.0, 0.0]")),
        (3.456, None, None, ("3.46", "–")),
        (3.456, -math.inf, math.inf, ("3.46", "–")),
        (3.456, math.nan, math.nan, ("3.46", "–")),
        (math.inf, math.nan, math.nan, ("inf", "–")),
        (math.nan, None, None, ("–", "–")),
        (None, None, None, ("–", "–")),
    ],
)
def test_a_mean_has_the_digits_that_its_interval_justifies(mean, low, high, expected):
    assert mean_with_interval({"mean": mean, "low": low, "high": high}) == expected
