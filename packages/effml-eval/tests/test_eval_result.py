from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from effml_eval.evaluation.eval_result import EvalResult, graded_result
from effml_eval.grading import ChoiceGrading, Intervals, TextGrading
from effml_shared.errors import CheckpointError, ConfigError


def made(n: int = 4) -> EvalResult:
    about: dict[str, Any] = {"tags": {}, "sample": 0, "requests": 2, "shots_dropped": 1}
    choices = {"choices": ["a", "b"], "n_tokens": [1, 1], "truncated": 1, "boundary_merges": 0}
    sizes = {"n_tokens": [4], "n_bytes": 4, "n_words": 1}
    lines = {
        "texts": [{**about, **sizes, "doc_id": str(i), "lls": [-4.0]} for i in range(n)],
        "quiz": [{**about, **choices, "doc_id": str(i), "lls": [-1.0, -2.0], "target": int(i > 2)} for i in range(n)],
    }
    task = {"version": 3, "n_shot": 2, "questions": 9, "evaluated": n, "kind": "multiple_choice"}
    record = {
        "schema": 1,
        "config": {"level": 0.95, "limit": n},
        "tasks": dict.fromkeys(lines, task),
        "model": {"id": "m"},
        "git": {"commit": None},
    }
    gradings: dict[str, Any] = {"quiz": ChoiceGrading(("acc", "ece")), "texts": TextGrading(("byte_ppl",))}
    return graded_result(lines, gradings, record, Intervals())


def test_estimates_and_counts() -> None:
    result = made()
    assert result.metrics["quiz"]["acc"].value == 0.75
    assert result.metrics["texts"]["byte_ppl"].value == pytest.approx(math.e)
    assert result.record["results"]["quiz"]["acc"]["n"] == 4
    assert result.record["results"]["quiz"]["ece"]["stderr"] is None
    expected = {"requested": 16, "scored": 16, "truncated": 4, "boundary_merges": 0, "shots_dropped": 8}
    assert result.record["counts"] == {**expected, "unparsed": 0, "length_stopped": 0}
    assert [line["correct"] for line in result.samples("quiz")] == [1, 1, 1, 0]
    result.samples("quiz")[0]["correct"] = None
    assert result.samples("quiz")[0]["correct"] == 1
    with pytest.raises(ConfigError, match=r"task: got 'test', expected one of texts, quiz"):
        result.samples("test")


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    for result in (made(), made(1)):  # of a single question, intervals are infinite
        result.save(tmp_path / "saved")
        loaded = EvalResult.load(tmp_path / "saved")
        assert (loaded.record, loaded.lines) == (result.record, result.lines)
        assert str(loaded.metrics) == str(result.metrics)  # NaN is not itself
        assert loaded.table() == result.table()
        assert list(loaded.metrics) == list(result.metrics) == ["texts", "quiz"]
        assert "NaN" not in (tmp_path / "saved" / "results.json").read_text()


def test_a_table() -> None:
    lines = made().table().splitlines()
    assert [lines[0], *lines[2:]] == [
        "task   n  metric     value    ± SE      95% interval",
        "quiz   4  acc       0.7500  0.2500  [0.2600, 1.2400]  4 truncated, 4 shots dropped",
        "          ece       0.0189".replace("0.0189", f"{made().metrics['quiz']['ece'].value:.4f}"),
    ]


def test_the_names_of_the_harness() -> None:
    found = made().to_harness_json()
    assert found["results"]["quiz"]["acc,none"] == 0.75
    assert found["results"]["quiz"]["acc_stderr,none"] == pytest.approx(0.25)
    assert found["results"]["quiz"]["ece_stderr,none"] == "N/A"
    assert found["results"]["texts"]["byte_perplexity,none"] == pytest.approx(math.e)
    assert found["higher_is_better"] == {"quiz": {"acc": True, "ece": False}, "texts": {"byte_perplexity": False}}
    assert (found["versions"], found["n-shot"]) == ({"quiz": 3, "texts": 3}, {"quiz": 2, "texts": 2})
    assert found["n-samples"]["quiz"] == {"original": 9, "effective": 4}
    json.dumps(found, allow_nan=False)


def test_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got no results \(No such file or directory\)"):
        EvalResult.load(tmp_path)
    made().save(tmp_path)
    (tmp_path / "samples" / "quiz.jsonl").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"got no results \(damaged"):
        EvalResult.load(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 2}')
    with pytest.raises(CheckpointError, match=r"got results of schema 2, expected 1"):
        EvalResult.load(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"damaged"):
        EvalResult.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be made"):
        made().save(tmp_path / "results.json")
