import dataclasses
import json
import math

from effml_eval.statistics.estimate import Estimate


def test_symmetric_interval_and_plain_json():
    estimate = Estimate.symmetric(0.5, 0.1, 2.0, 25, "normal")
    assert (estimate.ci_low, estimate.ci_high) == (0.3, 0.7)
    assert Estimate(**json.loads(json.dumps(dataclasses.asdict(estimate)))) == estimate


def test_unknown_error_has_an_infinite_interval():
    estimate = Estimate.symmetric(0.5, math.nan, 1.96, 1, "normal")
    assert (estimate.ci_low, estimate.ci_high) == (-math.inf, math.inf)
