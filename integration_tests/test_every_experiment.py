"""Every experiment that the packages announce, as `effml run NAME --preset smoke` runs it."""

import json

import pytest
from effml_shared.cli import main
from effml_shared.experiments import discover, find

EXPERIMENTS = {
    *("optim.soap", "optim.seesaw", "quant.mx", "quant.lotion", "arch.rt_state", "arch.rt_lm"),
    *("diffusion.order", "diffusion.flex", "rl.wall", "eval.sae", "eval.digits"),
}


def test_the_packages_announce_what_is_tested_here():
    assert set(discover()) == EXPERIMENTS


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_smoke(name, tmp_path, capsys):
    assert main(["run", name, "--preset", "smoke", "--out", str(tmp_path / "run"), "seeds=1"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert [verdict["claim"]["effect"] for verdict in summary["claims"]] == [
        claim.effect for claim in find(name).claims
    ]
    assert str(tmp_path / "run" / "report.html") in printed.replace("\n", "")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
