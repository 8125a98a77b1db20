"""Synthetic tasks with exact targets: word problems (prefix parity among them), recall and copying."""

from effml_arch.tasks.copying import Copying
from effml_arch.tasks.recall import Recall
from effml_arch.tasks.task import Task, TaskStream, accuracy
from effml_arch.tasks.word_problem import WordProblem

__all__ = ["Copying", "Recall", "Task", "TaskStream", "WordProblem", "accuracy"]
