import numpy as np
import pytest
from effml_eval.statistics.scores import check_level, cluster_index, cluster_sums, score_vector
from effml_shared.errors import ConfigError


def test_vector_is_float64_whatever_comes():
    for values in ([1, 0], (True, False), np.array([1, 0, 5], np.int8)[:2], np.array([1.0, 9.0, 0.0])[::2]):
        vector = score_vector("scores", values)
        assert vector.dtype == np.float64
        assert vector.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"scores: got shape \(0,\)"),
        (1.0, r"scores: got shape \(\), expected \(questions,\)"),
        ([[1.0]], r"scores: got shape \(1, 1\)"),
        ([0.0, float("nan"), float("inf")], "scores: got nan at index 1"),
        ([0.0, float("-inf")], "scores: got -inf at index 1"),
        (["a"], "scores: got .* expected numbers"),
        ([1.0, [2.0]], "scores: got .* expected numbers"),
    ],
)
def test_what_is_no_vector_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        score_vector("scores", values)


def test_labels_of_any_kind():
    index, count = cluster_index(["a", None, ("a",), 0, "a"], 5)
    assert index.tolist() == [0, 1, 2, 3, 0]
    assert count == 4
    assert cluster_sums(np.array([1.0, 2.0, 4.0]), ["b", "a", "b"]).tolist() == [5.0, 2.0]
    with pytest.raises(ConfigError, match="clusters: got 1 labels, expected one for each of 2 questions"):
        cluster_index("a", 2)


@pytest.mark.parametrize("level", [0, 1, 95, float("nan")])
def test_level(level):
    with pytest.raises(ConfigError, match="level"):
        check_level(level)
