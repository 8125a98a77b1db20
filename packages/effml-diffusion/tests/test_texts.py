from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_diffusion.flex.texts import check_texts
from effml_shared.errors import ConfigError

NAMES: dict[str, Any] = {"mask_id": 8, "pad_id": 9, "max_length": 4}


def test_ragged_rows_and_padded_tensors_are_the_same_texts() -> None:
    ragged = check_texts([[1, 2, 3], [], [4]], [[True, False, True], [], [False]], None, **NAMES)
    padded = check_texts(ragged.ids.int(), ragged.fixed, None, **NAMES)
    assert all(torch.equal(a, b) for a, b in zip(ragged[:3], padded[:3], strict=True))
    assert ragged.lengths.tolist() == [3, 0, 1]
    assert ragged.n_free.tolist() == [1, 0, 1]
    assert ragged.ids.dtype == torch.int64


def test_rows_are_taken_with_all_that_belongs_to_them() -> None:
    closed = torch.tensor([[True, True, False], [False, False, False]])
    texts = check_texts([[1, 2], [3]], [[True, False], [False]], torch.zeros_like(closed), **NAMES)
    taken = texts._replace(closed=closed).take(torch.tensor([1, 0, 0]))
    assert taken.ids.tolist() == [[3, 9], [1, 2], [1, 2]]
    assert taken.lengths.tolist() == [1, 2, 2]
    assert taken.closed is not None
    assert taken.closed.tolist() == [closed[i].tolist() for i in (1, 0, 0)]
    assert texts.take(torch.tensor([0])).fixed.tolist() == [[True, False]]


def test_junctions_are_closed_between_given_tokens_and_ends_only() -> None:
    fixed = [[True, True, False]]
    for columns in ([0], [1], [0, 1]):
        closed = torch.zeros(1, 4, dtype=torch.bool)
        closed[0, columns] = True
        check_texts([[1, 2, 3]], fixed, closed, **NAMES)
    for column in (2, 3):
        closed = torch.zeros(1, 4, dtype=torch.bool)
        closed[0, column] = True
        with pytest.raises(ConfigError, match=r"closed: got True, expected it between fixed tokens"):
            check_texts([[1, 2, 3]], fixed, closed, **NAMES)
    check_texts([[1], [1, 2]], [[True], [True, True]], torch.ones(2, 3, dtype=torch.bool), **NAMES)
    check_texts([[], [1, 2]], [[], [True, True]], torch.ones(2, 3, dtype=torch.bool), **NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 2), None, None), r"x: got torch.float32 of shape \(2, 2\), expected integer ids"),
        ((torch.ones(2, dtype=torch.int64), None, None), r"x: got torch.int64 of shape \(2,\)"),
        ((torch.ones(2, 2, dtype=torch.bool), None, None), r"x: got torch.bool"),
        (([], None, None), r"rows: got shapes \[\]"),
        (([[1, 9]], None, None), r"x: got pad_id 9 at the end of a text"),
        (([[9, 1]], None, None), r"x: got 1, expected no token to the right of a pad \(9\)"),
        (([[1, 8]], None, None), r"x: got 8, expected no mask \(8\) and no negative id"),
        (([[1, -1]], None, None), r"x: got -1, expected no mask"),
        (([[1, 2, 3, 4, 5]], None, None), r"x: got 5, expected texts of at most max_length = 4 tokens"),
        (([[1, 2]], [[True]], None), r"fixed: got torch.bool \(1, 1\), expected bool \(1, 2\)"),
        (([[1, 2]], torch.ones(1, 2), None), r"fixed: got torch.float32"),
        (
            ([[1, 2], [1]], torch.ones(2, 2, dtype=torch.bool), None),
            r"fixed: got True, expected it within the texts only",
        ),
        (([[1, 2]], None, torch.zeros(1, 2, dtype=torch.bool)), r"closed: got torch.bool \(1, 2\), expected bool"),
    ],
)
def test_wrong_texts(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_texts(*arguments, **NAMES)
