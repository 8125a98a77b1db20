"""Comparisons of two models: every test, alignment by id, and what must not be compared."""

import dataclasses
import json
import math

import numpy as np
import pytest
from effml_eval.statistics.comparison import compare_scores
from effml_eval.statistics.paired_tests import holm, mcnemar, paired_t_test, permutation_test
from effml_shared.errors import ConfigError


def answers(seed: int, size: int = 40, p: float = 0.6) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {f"q{i}": float(rng.random() < p) for i in range(size)}


FIRST = {"sums": answers(0), "facts": answers(1, 30, 0.9)}
SECOND = {"facts": answers(2, 30, 0.3), "sums": dict(reversed(answers(3).items()))}


@pytest.mark.parametrize("test", ["paired_t", "mcnemar", "permutation", "bootstrap"])
def test_rows_pair_questions_by_id(test):
    report = compare_scores(FIRST, SECOND, test=test)
    assert [row.task for row in report.tasks] == ["sums", "facts"]
    for row in report.tasks:
        d = np.array([FIRST[row.task][q] - SECOND[row.task][q] for q in FIRST[row.task]])
        assert row.difference.value == pytest.approx(d.mean()) == pytest.approx(row.first - row.second)
        assert (row.wins, row.ties, row.losses) == ((d > 0).sum(), (d == 0).sum(), (d < 0).sum())
        assert row.difference.ci_low < d.mean() < row.difference.ci_high
        if test == "paired_t":
            assert row.p_value == paired_t_test(d)
        elif test == "mcnemar":
            assert row.p_value == mcnemar(row.wins, row.losses)
        elif test == "permutation":
            assert row.p_value == permutation_test(d)
    assert [row.p_adjusted for row in report.tasks] == holm([row.p_value for row in report.tasks])
    plain = compare_scores(FIRST, SECOND, test=test, correction="none")
    assert [row.p_adjusted for row in plain.tasks] == [row.p_value for row in report.tasks]


def test_tests_agree_on_a_clear_difference():
    found = [
        compare_scores({"t": FIRST["facts"]}, {"t": SECOND["facts"]}, test=test).tasks[0].p_value
        for test in ("paired_t", "mcnemar", "permutation", "bootstrap")
    ]
    assert max(found) < 0.01


def test_sides_are_antisymmetric():
    there, back = compare_scores(FIRST, SECOND), compare_scores(SECOND, FIRST)
    for row, mirrored in zip(there.tasks, reversed(back.tasks), strict=True):
        assert row.difference.value == -mirrored.difference.value
        assert (row.wins, row.losses) == (mirrored.losses, mirrored.wins)
        assert row.p_value == pytest.approx(mirrored.p_value)
    lower = compare_scores(FIRST, SECOND, higher_is_better=False)
    assert [(row.losses, row.wins) for row in lower.tasks] == [(row.wins, row.losses) for row in there.tasks]
    assert lower.macro == there.macro


def test_clusters_widen_the_interval():
    first = {"t": {i: float(i // 5 % 3 != 0) for i in range(60)}}
    second = {"t": dict.fromkeys(range(60), 0.0)}
    labels = {"t": {i: i // 5 for i in range(60)}}
    plain = compare_scores(first, second).tasks[0]
    clustered = compare_scores(first, second, clusters=labels).tasks[0]
    assert clustered.difference.value == plain.difference.value
    assert clustered.difference.stderr > 1.5 * plain.difference.stderr
    assert clustered.p_value > plain.p_value


@pytest.mark.parametrize("test", ["paired_t", "permutation", "bootstrap"])
def test_bits_per_byte_of_documents_of_different_sizes(test):
    rng = np.random.default_rng(4)
    n_bytes = dict(enumerate(rng.integers(10, 1000, 50).tolist()))
    first = {"text": {i: size * rng.normal(2.0, 0.1) for i, size in n_bytes.items()}}
    second = {"text": {i: first["text"][i] + n_bytes[i] * rng.normal(0.05, 0.1) for i in reversed(n_bytes)}}
    options = {"weights": {"text": n_bytes}, "higher_is_better": False}
    row = compare_scores(first, second, test=test, **options).tasks[0]
    total = sum(n_bytes.values())
    assert row.first == pytest.approx(sum(first["text"].values()) / total)
    assert row.difference.value == pytest.approx(row.first - row.second)
    assert row.difference.stderr == pytest.approx(0.1 * math.sqrt(sum(n**2 for n in n_bytes.values())) / total, rel=0.3)
    assert row.difference.ci_low < row.difference.value < row.difference.ci_high
    assert row.p_value < 0.05
    assert row.wins > row.losses


def test_rounding_is_no_win():
    row = compare_scores({"t": {0: 0.1 + 0.2, 1: 1.0}}, {"t": {0: 0.3, 1: 1.0}}).tasks[0]
    assert (row.wins, row.ties, row.losses, row.p_value) == (0, 2, 0, 1)


def test_table_is_aligned():
    report = compare_scores(FIRST, SECOND, metric="acc", names=("candidate", "b"))
    title, *lines = report.table().splitlines()
    assert title == "acc: candidate minus b, paired_t"
    assert len(lines) == 4
    assert lines[3].startswith("macro mean  70 ")
    ends = [line.index(word) + len(word) for line, word in zip(lines, ("interval", "]", "]", "]"), strict=True)]
    assert len(set(ends)) == 1
    assert len({len(line) for line in lines[:3]}) == 1


def test_report_is_plain_json():
    report = compare_scores(FIRST, SECOND)
    stored = json.loads(json.dumps(dataclasses.asdict(report)))
    assert stored["tasks"][0]["difference"]["value"] == report.tasks[0].difference.value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: compare_scores({"t": {1: 0, 2: 1}}, {"t": {2: 1, 3: 0, 4: 0}}),
            "questions of task t: got different ones, 1 only in the first: 1; 2 only in the second: 3, 4; expected",
        ),
        (
            lambda: compare_scores({"t": dict.fromkeys(range(9), 0)}, {"t": {0: 0}}),
            r"8 only in the first: 1, 2, 3, 4, 5, \.\.\.; expected",
        ),
        (lambda: compare_scores(FIRST, {"sums": {}}), "tasks: got different ones, 1 only in the first: facts"),
        (lambda: compare_scores({}, {}), "tasks: got none"),
        (lambda: compare_scores({"t": {}}, {"t": {}}), "scores of task t: got shape"),
        (lambda: compare_scores({"t": {0: 1}}, {"t": {0: 1}}), "task t: got one independent question"),
        (lambda: compare_scores({"t": {0: 1, 1: math.nan}}, {"t": {0: 1, 1: 1}}), "scores of task t: got nan"),
        (lambda: compare_scores({"t": {0: 0.5, 1: 1}}, {"t": {0: 1, 1: 1}}, test="mcnemar"), "test: got 'mcnemar'"),
        (
            lambda: compare_scores(FIRST, SECOND, test="mcnemar", clusters={"sums": {q: q for q in FIRST["sums"]}}),
            "test: got 'mcnemar' for task sums, whose scores are not 0 or 1 and independent",
        ),
        (lambda: compare_scores(FIRST, SECOND, clusters={"sums": {}}), "clusters of task sums: got none for question"),
        (lambda: compare_scores(FIRST, SECOND, weights={"sums": {"q0": 1}}), "weights of task sums: got none for"),
        (lambda: compare_scores({"t": {0: 1, 1: 1}}, {"t": {0: 1, 1: 1}}, weights={"t": {0: 1, 1: 0}}), "weights of"),
        (lambda: compare_scores(FIRST, SECOND, test="anova"), "test: got 'anova', expected one of 'paired_t'"),
        (lambda: compare_scores(FIRST, SECOND, correction="bonferroni"), "correction: got 'bonferroni'"),
        (lambda: compare_scores(FIRST, SECOND, level=2), "level: got 2"),
    ],
)
def test_wrong_comparisons_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
