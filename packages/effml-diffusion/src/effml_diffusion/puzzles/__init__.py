"""Puzzles as data for sequence models, made offline: Sudoku, paths through mazes, texts of given lengths.

sudoku           boxes of any shape: puzzles with one solution, grades, validity     sudoku_search       solving them
sudoku_tokens    grids as token ids                                                  sudoku_symmetries   augmentation
sudoku_samples   grids as endless data                                               sample_stream       endless batches
maze             mazes and shortest paths                                            maze_paths          paths as data
length_mixture   one symbol, many lengths                                            hugging_face        as a `Dataset`
archive          made once, kept on disk
"""

from effml_diffusion.puzzles.archive import Archive
from effml_diffusion.puzzles.hugging_face import as_dataset, sample_dataset
from effml_diffusion.puzzles.length_mixture import LengthMixture
from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.maze_paths import MazePaths, remove_pads
from effml_diffusion.puzzles.sample_stream import SampleStream, Source
from effml_diffusion.puzzles.sudoku import Difficulty, Puzzles, Sudoku
from effml_diffusion.puzzles.sudoku_samples import SudokuSamples
from effml_diffusion.puzzles.sudoku_symmetries import Symmetries
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens

__all__ = [
    "Archive",
    "Difficulty",
    "LengthMixture",
    "Maze",
    "MazePaths",
    "Puzzles",
    "SampleStream",
    "Source",
    "Sudoku",
    "SudokuSamples",
    "SudokuTokens",
    "Symmetries",
    "as_dataset",
    "remove_pads",
    "sample_dataset",
]
