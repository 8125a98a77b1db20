import dataclasses

import pytest
from effml_shared.citations import Paper
from effml_shared.cli import main


def test_list_shows_claims_and_times(announced, capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "toy.linear" in shown
    assert "SGD beats Adam" in shown
    assert "smoke 1 s" in shown


def test_list_of_nothing_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("effml_shared.experiments.discover", dict)
    assert main(["list"]) == 0
    assert "install a package" in capsys.readouterr().out


@pytest.fixture
def cited(toy, monkeypatch):
    """Announce an experiment with a paper beside one without."""
    paper = Paper("On & On", "2401.00001", ["Ann Author"])
    experiments = {"toy.linear": toy, "toy.cited": dataclasses.replace(toy, name="toy.cited", papers=(paper,))}

    class Entry:
        def __init__(self, name):
            self.name = name

        def load(self):
            return experiments[self.name]

    monkeypatch.setattr("effml_shared.experiments.discover", lambda: {name: Entry(name) for name in experiments})


def test_cite_prints_each_paper_once(cited, capsys):
    assert main(["cite", "toy.cited", "toy.cited"]) == 0
    assert capsys.readouterr().out.count("@misc{author2024,") == 1


def test_cite_of_an_experiment_without_papers_is_an_error(cited, capsys):
    assert main(["cite", "toy.linear"]) == 2
    assert "got no BibTeX" in capsys.readouterr().err


def test_doctor_answers(capsys):
    assert main(["doctor"]) == 0
    assert "effml can run here" in capsys.readouterr().out
