from __future__ import annotations

import pytest
from effml_eval.scoring.rolling_windows import rolling_windows
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

SLOTS = "P0123456789"


@pytest.mark.parametrize(
    ("context_len", "expected"),
    [
        (1, [("P012", "0123"), ("3456", "4567"), ("5678", "89")]),
        (2, [("P012", "0123"), ("2345", "456"), ("5678", "789")]),
    ],
)
def test_a_document_of_ten_tokens(context_len: int, expected: list[tuple[str, str]]) -> None:
    windows = rolling_windows(10, 4, context_len)
    assert [(SLOTS[w.start : w.stop - 1], SLOTS[w.stop - w.n_scored : w.stop]) for w in windows] == expected


@given(n_tokens=st.integers(0, 60), max_length=st.integers(1, 12), data=st.data())
def test_every_token_is_predicted_once_with_enough_context(n_tokens: int, max_length: int, data: st.DataObject) -> None:
    context_len = data.draw(st.integers(1, max_length))
    windows = rolling_windows(n_tokens, max_length, context_len)
    scored = [slot for w in windows for slot in range(w.stop - w.n_scored, w.stop)]
    assert scored == list(range(1, n_tokens + 1))
    for w in windows:
        assert w.start >= 0
        assert w.stop - 1 - w.start <= max_length
        assert w.start == 0 or w.stop - w.n_scored - w.start >= context_len


def test_one_window_where_the_document_fits() -> None:
    assert all(len(rolling_windows(7, 7, c)) == 1 for c in range(1, 8))


@pytest.mark.parametrize("arguments", [(-1, 4, 1), (3, 0, 1), (3, 4, 0), (3, 4, 5), (2.0, 4, 1)])
def test_refuses(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"got .*expected"):
        rolling_windows(*arguments)
