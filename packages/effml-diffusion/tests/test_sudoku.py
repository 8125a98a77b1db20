from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effml_diffusion.puzzles.archive import Archive
from effml_diffusion.puzzles.sudoku import Difficulty, Sudoku
from effml_shared.errors import ConfigError

# The example of the Wikipedia article on Sudoku, which falls to naked singles.
EASY = "53..7.... 6..195... .98....6. 8...6...3 4..8.3..1 7...2...6 .6....28. ...419..5 ....8..79"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def test_solves_a_known_puzzle() -> None:
    rules = Sudoku()
    assert rules.text(rules.solve(EASY)) == SOLVED
    assert rules.solve(torch.tensor(rules.parse(EASY)).view(9, 9)) == rules.parse(SOLVED)
    assert rules.grade(EASY) == Difficulty(naked=True, singles=True, guesses=0)
    assert rules.text(rules.parse(EASY)) == "".join(EASY.split())


def test_units_are_those_of_the_formula() -> None:
    for rules in (Sudoku(2, 3), Sudoku(3, 2), Sudoku(3, 3), Sudoku(1, 4)):
        expected = [
            [r, c, (r // rules.box_rows) * (rules.n // rules.box_columns) + c // rules.box_columns]
            for r in range(rules.n)
            for c in range(rules.n)
        ]
        assert rules.places.tolist() == expected


def test_what_is_wrong_with_a_puzzle_is_said_in_one_line() -> None:
    rules = Sudoku(2, 2)
    for puzzle, message in (
        ("1234", r"puzzle: got 4 cells, expected 16 for 4 x 4"),
        ([], r"puzzle: got 0 cells"),
        ("5" + "." * 15, r"puzzle: got '5' in row 1, column 1, expected a value from 1 to 4, or empty"),
        ("." * 15 + "x", r"puzzle: got 'X' in row 4, column 4"),
        ([0] * 15 + [-1], r"puzzle: got -1 in row 4, column 4"),
        ([0.5] * 16, r"puzzle: got 0\.5 in row 1, column 1"),
        (torch.full((16,), float("nan")), r"puzzle: got nan in row 1"),
        ("1" + "." * 14 + "1", r"several solutions, expected exactly one"),
        ("1...1...........", r"puzzle: got 1 in row 1, column 1 and row 2, column 1, expected it once"),
        ("123....4........", r"puzzle: got one with no solution"),
    ):
        for method in (rules.solve, rules.grade):
            with pytest.raises(ConfigError, match=message) as caught:
                method(puzzle)  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)


def test_counting_stops_at_its_limit() -> None:
    assert Sudoku(2, 2).count_solutions([0] * 16, limit=1000) == 288
    assert Sudoku(2, 2).count_solutions([0] * 16) == 2
    assert Sudoku(2, 2).count_solutions("123....4........") == 0


def test_puzzles_have_one_solution_each_and_do_not_depend_on_their_number() -> None:
    rules = Sudoku(2, 3)
    puzzles = rules.puzzles(8, 12, seed=5)
    assert puzzles.clues.shape == puzzles.solutions.shape == (8, 36)
    assert puzzles.clues.dtype == puzzles.solutions.dtype == torch.int64
    assert ((puzzles.clues > 0).sum(1) == 12).all()
    assert rules.valid(puzzles.solutions, puzzles.clues).all()
    for clues, solution in zip(*puzzles, strict=True):
        assert rules.solve(clues) == solution.tolist()
    assert torch.equal(rules.puzzles(3, 12, seed=5).clues, puzzles.clues[:3])
    assert not torch.equal(rules.puzzles(3, 12, seed=6).clues, puzzles.clues[:3])
    assert torch.equal(rules.grids(2, seed=1), rules.grids(5, seed=1)[:2])


def test_puzzles_of_thirty_clues_are_as_hard_as_the_public_ones() -> None:
    """84% of 2000 public puzzles with 30 clues (arXiv 2510.01384) fall to singles, most with hidden ones."""
    rules = Sudoku()
    grades = [rules.grade(clues) for clues in rules.puzzles(100, 30).clues]
    assert abs(sum(grade.singles for grade in grades) / 100 - 0.84) < 0.10
    assert sum(not grade.naked for grade in grades) / 100 > 0.6
    assert all((grade.guesses == 0) == grade.naked for grade in grades)


def test_only_a_full_and_right_grid_with_its_clues_is_valid() -> None:
    rules = Sudoku()
    grid = torch.tensor(rules.parse(SOLVED))[None]
    clues = torch.tensor(rules.parse(EASY))[None]
    assert rules.valid(grid).tolist() == rules.valid(grid, clues).tolist() == [True]
    assert rules.valid(grid.to(torch.uint8), clues).tolist() == [True]

    for cell in range(81):  # nine different values per unit, but one of them no digit
        for value in (0, 10, -1, 1000):
            changed = grid.clone()
            changed[0, cell] = value
            assert not rules.valid(changed).item()
    assert not rules.valid(torch.where(grid == 9, 0, grid)).item()

    renamed = torch.where(grid == 1, 2, torch.where(grid == 2, 1, grid))
    assert rules.valid(renamed).item()
    assert not rules.valid(renamed, clues).item()
    latin = (torch.arange(9)[:, None] + torch.arange(9)) % 9 + 1  # rows and columns are right, boxes are not
    assert not rules.valid(latin.reshape(1, 81)).item()
    assert rules.valid(grid[:0]).shape == (0,)


def test_valid_takes_whole_numbers_of_the_right_shape() -> None:
    for grids, clues in ((torch.zeros(2, 80, dtype=torch.long), None), (torch.zeros(2, 81), None)):
        with pytest.raises(ConfigError, match=r"grids: got .*expected integers \(2, 81\)"):
            Sudoku().valid(grids, clues)
    with pytest.raises(ConfigError, match=r"clues: got .*expected integers \(2, 81\)"):
        Sudoku().valid(torch.zeros(2, 81, dtype=torch.long), torch.zeros(1, 81, dtype=torch.long))


def test_impossible_requests() -> None:
    with pytest.raises(ConfigError, match=r"clues: got 2, expected an integer of at least 3"):
        Sudoku(2, 2).puzzles(1, 2)
    with pytest.raises(ConfigError, match=r"clues: got 3, expected more: none of 1000 grids"):
        Sudoku(2, 2).puzzles(1, 3)
    with pytest.raises(ConfigError, match=r"clues: got 17, expected at most 16"):
        Sudoku(2, 2).puzzles(1, 17)
    with pytest.raises(ConfigError, match=r"count: got 0"):
        Sudoku(2, 2).grids(0)
    with pytest.raises(ConfigError, match=r"box_rows, box_columns: got 5 x 5 cells, expected boxes of at most 16"):
        Sudoku(5, 5)
    with pytest.raises(ConfigError, match=r"box_rows: got 0"):
        Sudoku(0, 3)


def test_the_smallest_rules() -> None:
    assert Sudoku(1, 1).grids(1).tolist() == [[1]]
    assert Sudoku(1, 1).puzzles(1, 0).clues.tolist() == [[0]]
    assert Sudoku(1, 3).valid(Sudoku(1, 3).grids(4)).all()


def test_an_archive_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules, archive = Sudoku(2, 2), Archive(tmp_path)
    grids, puzzles = rules.grids(4, archive=archive), rules.puzzles(4, 5, archive=archive)
    assert torch.equal(grids, rules.grids(4))

    def refuse(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(Sudoku, "_grid", refuse)
    monkeypatch.setattr(Sudoku, "_puzzle", refuse)
    assert torch.equal(rules.grids(4, archive=archive), grids)
    assert torch.equal(rules.puzzles(4, 5, archive=archive).clues, puzzles.clues)
    with pytest.raises(AssertionError, match=r"made again"):
        rules.grids(4, seed=1, archive=archive)
