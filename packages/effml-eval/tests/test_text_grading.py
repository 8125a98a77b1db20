from __future__ import annotations

import math
from typing import Any

import pytest
from effml_eval.grading import Intervals, TextGrading
from effml_shared.errors import ConfigError


def line(id: str, nats: Any, n_tokens: int, n_bytes: int) -> dict[str, Any]:
    sizes = {"n_tokens": [n_tokens], "n_bytes": n_bytes, "n_words": n_bytes}
    return TextGrading().grade({"doc_id": id, "sample": 0, "tags": {"book": "x"}, "lls": [nats], **sizes})


def test_ratios_of_sums() -> None:
    lines = [line("a", -2.0, 1, 5), line("b", -3.0, 9, 5), line("c", 0.0, 0, 0)]
    found = TextGrading(("token_ppl", "bits_per_byte")).estimate(lines, Intervals(seed=1))
    assert found["token_ppl"].value == pytest.approx(math.exp(0.5), rel=1e-12)
    assert found["bits_per_byte"].value == pytest.approx(0.5 / math.log(2), rel=1e-12)
    assert (list(found), found["token_ppl"].method, found["token_ppl"].n) == (
        ["token_ppl", "bits_per_byte"],
        "bootstrap percentile",
        2,
    )
    assert TextGrading(("token_ppl",)).estimate(lines, Intervals(ci="bca"))["token_ppl"].method == "bootstrap bca"
    assert lines[2]["scores"] == {}
    assert lines[0]["scores"]["bits_per_byte"] == pytest.approx(2 / math.log(2) / 5)


def test_only_bits_per_byte_are_of_documents() -> None:
    scores, weights, higher_is_better = TextGrading().paired(
        [line("a", -2.0, 1, 5), line("c", 0.0, 0, 0)], "bits_per_byte"
    )
    assert (scores, weights, higher_is_better) == ({"a": pytest.approx(2 / math.log(2))}, {"a": 5.0}, False)
    with pytest.raises(ConfigError, match=r"metric: got 'token_ppl', expected 'bits_per_byte'"):
        TextGrading().paired([line("a", -2.0, 1, 5)], "token_ppl")
    with pytest.raises(ConfigError, match=r"metrics: got 'ppl'"):
        TextGrading(("ppl",))
