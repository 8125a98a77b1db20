import dataclasses
import math
import random
import statistics

import pytest
from effml_shared.citations import Paper
from effml_shared.errors import ConfigError
from effml_shared.experiments import Claim, discover, find, interval, judge, one_line
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit

CLAIM = Claim("saved", "text", "40%", "%", at_least=40.0)
PAPER = Paper("On & On", "2401.00001", ["Ann Author"])


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ([45.0, 46.0, 47.0], "holds"),
        ([30.0, 31.0, 32.0], "does not hold"),
        ([38.0, 41.0, 44.0], "inconclusive"),
        ([60.0], "inconclusive"),
        ([60.0, 61.0, None], "inconclusive"),
        ([60.0, 61.0, math.nan], "inconclusive"),
        ([None, None], "inconclusive"),
        ([], "inconclusive"),
        ([40.0, 40.0, 40.0], "holds"),
    ],
)
def test_the_rule(effects, verdict):
    assert judge(CLAIM, effects).verdict == verdict


def test_the_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305 * statistics.stdev([1, 2, 3, 4]) / 2  # t table: 3 degrees of freedom, 97.5%
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-9)
    assert interval([7.0]) == (7.0, -math.inf, math.inf)
    mean, low, high = interval([1.0, math.inf])
    assert math.isnan(mean)
    assert (low, high) == (-math.inf, math.inf)


def test_the_interval_covers_as_often_as_it_says():
    generator = random.Random(0)
    draws = [interval([generator.gauss(1, 2) for _ in range(4)]) for _ in range(4000)]
    covered = sum(low <= 1 <= high for _, low, high in draws) / len(draws)
    assert covered == pytest.approx(0.95, abs=0.012)


def test_an_unknown_experiment_names_the_nearest(announced):
    with pytest.raises(ConfigError, match=r"did you mean toy\.linear"):
        find("toy.liner")


def test_a_package_that_cannot_be_imported_is_one_line(monkeypatch):
    class Broken:
        name = "broken.one"

        def load(self):
            raise ImportError("no module named x")

    monkeypatch.setattr("effml_shared.experiments.discover", lambda: {"broken.one": Broken()})
    with pytest.raises(ConfigError, match=r"experiment broken\.one cannot be imported"):
        find("broken.one")


def test_discovery_reads_entry_points():
    assert isinstance(discover(), dict)


class TestToy(ExperimentKit):
    @pytest.fixture(autouse=True)
    def _experiment(self, toy):
        self.experiment = dataclasses.replace(toy, paper="Author, arXiv 2401.00001", papers=(PAPER,))


@pytest.mark.parametrize(
    "papers",
    [(), (dataclasses.replace(PAPER, authors=()),), (dataclasses.replace(PAPER, arxiv="2401.00002"),), (PAPER, PAPER)],
    ids=["none", "nobody's", "another", "twice"],
)
def test_the_kit_asks_for_papers_that_can_be_cited(toy, papers):
    kit = ExperimentKit()
    kit.experiment = dataclasses.replace(toy, paper="Author, arXiv 2401.00001", papers=papers)
    with pytest.raises(AssertionError):
        kit.test_what_it_tests_again_can_be_cited()


def test_a_failure_stands_in_the_summary_until_it_is_mended(toy, tmp_path):
    def broken(config, run):
        raise ZeroDivisionError("division\nby zero")

    run = Run.create(tmp_path / "r", {"experiment": toy.name, "preset": "smoke"}, "")
    with pytest.raises(ZeroDivisionError):
        dataclasses.replace(toy, run=broken).execute(None, run)
    failed = Run(run.path).summary
    assert (failed["status"], failed["error"]) == ("failed", "ZeroDivisionError: division by zero")
    toy.execute(toy.configure("smoke"), Run(run.path))
    mended = Run(run.path).summary
    assert mended["status"] == "finished"
    assert "error" not in mended
    assert mended["seconds"] > failed["seconds"] >= 0  # of both sessions


def test_an_error_in_one_line():
    assert one_line(ConfigError("a: got 1,\n expected 2")) == "a: got 1, expected 2"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
