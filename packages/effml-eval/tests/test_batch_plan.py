from __future__ import annotations

from effml_eval.scoring.batch_plan import cut, plan_rows
from effml_eval.scoring.token_boundaries import Row
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(1, 9), max_size=20)


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    tokens = draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), max_size=15))
    return [Row(tuple(row), draw(st.integers(1, len(row) - 1))) for row in tokens]


@given(LENGTHS, st.integers(1, 30))
def test_stretches_fit_and_leave_nothing_out(lengths: list[int], budget: int) -> None:
    stretches = [lengths[stretch] for stretch in cut(lengths, budget)]
    assert [length for stretch in stretches for length in stretch] == lengths
    assert all(len(stretch) == 1 or len(stretch) * max(stretch) <= budget for stretch in stretches)


@given(rows(), st.integers(1, 40))
def test_a_batch_alone_is_the_batch_among_all(rows: list[Row], budget: int) -> None:
    plan = plan_rows(rows, budget)
    assert sorted(i for batch in plan for i in batch) == list(range(len(rows)))
    for batch in plan:
        again = plan_rows([rows[i] for i in batch], budget)
        assert len(again) == 1
        assert sorted(again[0]) == list(range(len(batch)))


@given(rows(), st.integers(1, 40), st.randoms())
def test_the_plan_does_not_depend_on_the_order_of_rows(rows: list[Row], budget: int, random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    plan = [[rows[i] for i in batch] for batch in plan_rows(rows, budget)]
    shuffled = [[rows[order[i]] for i in batch] for batch in plan_rows([rows[i] for i in order], budget)]
    assert [set(batch) for batch in shuffled] == [set(batch) for batch in plan]


def test_the_longest_comes_first_and_choices_of_one_context_stay_together() -> None:
    near, far = (1, 2, 3), (4, 5)
    rows = [Row((*far, 6, 7), 2), Row((*near, 8), 1), Row((*far, 9), 1), Row((*near, 7, 7, 7), 3)]
    assert plan_rows(rows, budget=1000) == [[3, 1, 0, 2]]
    assert plan_rows(rows, budget=10) == [[3, 1], [0, 2]]


def test_equal_inputs_count_once() -> None:
    rows = [Row((1, 2, 3, token), 1) for token in range(50)]
    assert plan_rows(rows, budget=3) == [list(range(50))]
