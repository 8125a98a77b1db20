import math

import pytest
from effml_quant.experiments import lotion
from effml_quant.experiments.lotion import experiment
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.report import write_report
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit


class TestLotionExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 80  # within a training on text


def make(path, preset, *overrides):
    config = experiment.configure(preset, overrides=overrides)
    return config, Run.create(path, {"experiment": experiment.name, "preset": preset}, to_yaml(config))


def test_effects_compare_methods_of_one_seed_at_what_each_deploys(tmp_path, monkeypatch):
    """Train nothing: losses by method, worse away from one learning rate."""
    rtn = {"PTQ": 2.0, "QAT": 1.95, "RAT": 2.1, "LSQ": 1.94, "LOTION": 1.92}
    rows = {"PTQ": 0.06, "QAT": 0.08, "RAT": 0.06, "LOTION": 0.02}

    class Text:
        def __init__(self, config, run):
            self.scales = config.scales

        def train(self, setting):
            lost = abs(math.log10(setting.lr / 8e-3)) + 0.001 * setting.seed
            loss = rtn[setting.method] + lost - 0.02 * (setting.scale == "channel")
            return {"rtn": dict.fromkeys(self.scales, loss), "full": 1.9, "rr": {}, "gptq": {}, "distance": {}}

    def train_rows(run, name, problem, how, quantizer, *, learning_rates, steps, draws):
        problem, _, method = name.partition("/")
        gain = 0.01 if problem.endswith("width 2") else 0.0
        loss = rows[method.partition(",")[0]] - gain * (method == "LOTION")
        good = [loss + 0.001 * seed for seed in range(10)]
        return {key: [[2 * x for x in good], *[good] * (len(learning_rates) - 1)] for key in ("rtn", "rr", "full")}

    monkeypatch.setattr(lotion, "Text", Text)
    monkeypatch.setattr(lotion, "train_rows", train_rows)
    config, run = make(tmp_path / "run", "cpu")
    verdicts = {verdict.claim.effect: verdict for verdict in experiment.execute(config, run)}
    assert verdicts["text_qat"].mean == pytest.approx(0.03)
    assert verdicts["text_ptq"].mean == pytest.approx(0.08)
    assert verdicts["channel_qat"].mean == pytest.approx(0.03)
    assert verdicts["quadratic_qat"].seeds == 10
    assert 60 < verdicts["quadratic_qat"].mean < 75
    assert verdicts["width"].mean == pytest.approx(0.01)
    assert {verdict.verdict for verdict in verdicts.values()} == {"holds"}
    table = [row for row in run.summary["table"] if row["problem"] == "text, int4 per tensor"]
    assert [row["method"] for row in table] == ["PTQ", "QAT", "RAT", "LSQ", "LOTION"]
    assert {row["learning rate"] for row in table} == {"0.008"}
    assert [row["method"] for row in run.summary["table"] if row["problem"] == "text, int4 per channel"] == [
        "PTQ",
        "QAT",
        "LOTION",
    ]


def test_a_training_that_diverges_counts_against_its_rate_and_the_run_goes_on(tmp_path):
    config, run = make(tmp_path / "run", "smoke", "learning_rates=[0.01,1e30]", "scales=[tensor]", "calibration=0")
    experiment.execute(config, run)
    assert run.summary["trials"]["QAT/scale=tensor/lr=1e+30/seed=0"]["loss"] is None
    assert "data:image" in write_report(run, experiment).read_text()
    hopeless, other = make(tmp_path / "other", "smoke", "learning_rates=[1e30]", "methods=[PTQ,QAT,LOTION]")
    with pytest.raises(ConfigError, match=r"learning_rates: PTQ per tensor, QAT per tensor"):
        experiment.execute(hopeless, other)
