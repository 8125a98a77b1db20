"""A benchmark: questions, the requests that put them to a model, and how answers are graded.

A task only says what to ask and what to make of the answers; it never sees a model. Requests and answers are the plain
values of `scoring.scorer`, and a graded line holds all that its scores follow from, so that other metrics can be had
later without the model and without the task's data.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError

from effml_eval.grading.grading import Grading, Line
from effml_eval.scoring.request_hash import canonical_json
from effml_eval.scoring.scorer import GenerationRequest, SamplingParams
from effml_eval.tasks.questions import Question
from effml_eval.tasks.rows import RowReader, read_rows

__all__ = ["Asking", "Request", "Task"]

Request = tuple[str, str] | str | GenerationRequest
Asked = TypeVar("Asked", bound=Question)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a whole evaluation asks: how many samples of each answer, how they are drawn, and from which seed.

    Attributes:
        sampling: None: as each task says.
        n_samples: of each generated answer.
        seed: of samples and of the choice of examples.
    """

    sampling: SamplingParams | None = None
    n_samples: int = 1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Task(ABC, Generic[Asked]):
    """What all kinds of tasks have.

    Args:
        name: unique in an evaluation.
        questions: of one kind.
        shots: questions from which examples are taken, of other data.
        shot_choice: `"random"` examples for each question, or the `"first"` ones for all.
        description: stands first in every prompt.
        separator: behind the description and every example.
        version: raised by whatever changes its numbers.
        dataset: where it is from, such as name and revision; recorded.

    Raises:
        ConfigError: there is no question, or two have one id.
    """

    kind: ClassVar[str]
    question_type: ClassVar[type[Question]]

    name: str
    questions: Sequence[Asked]
    shots: Sequence[Asked] = ()
    shot_choice: str = "random"
    description: str = ""
    separator: str = "\n\n"
    version: int = 1
    dataset: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("shot_choice", self.shot_choice, ("random", "first"))
        check_count("version", self.version, 0)
        if not self.name or "/" in self.name:
            raise ConfigError(f"name: got {self.name!r}, expected the name of a task, without a slash")
        if not self.questions:
            raise ConfigError(f"task {self.name}: got no questions, expected at least one")
        for question in [*self.questions, *self.shots]:
            if not isinstance(question, self.question_type):
                expected = f"expected {self.question_type.__name__}"
                raise ConfigError(f"task {self.name}: got a {type(question).__name__}, {expected}")
        twice = [id for id, count in Counter(question.id for question in self.questions).items() if count > 1]
        if twice:
            raise ConfigError(f"task {self.name}: got {len(twice)} ids more than once, such as {twice[0]!r}")

    @classmethod
    def from_jsonl(
        cls, path: str | Path, read: RowReader[Asked], *, shots: str | Path | None = None, **options: Any
    ) -> Self:
        """Make a task of the rows of a local file.

        Args:
            path: .jsonl, .jsonl.gz or .parquet.
            read: makes a question of a row and its number.
            shots: file of the examples.
            options: of the task; its name is that of the file if none is given.

        Raises:
            DataError: a file cannot be read.
            ConfigError: a row lacks a field or holds what it should not; names the row.
        """
        content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""
        questions = read_rows(path, read)
        return cls(
            **{
                "name": Path(path).name.partition(".")[0],
                "dataset": {"name": Path(path).name, "sha256": content},
                "questions": questions,
                "shots": () if shots is None else read_rows(shots, read),
                **options,
            }
        )

    @property
    def content_hash(self) -> str:
        """sha256 of all questions and possible examples."""
        records = [[asdict(question) for question in group] for group in (self.questions, self.shots)]
        return hashlib.sha256(canonical_json(records).encode()).hexdigest()

    @property
    @abstractmethod
    def grading(self) -> Grading:
        """How answers are graded."""

    @abstractmethod
    def requests(self, question: Asked, prefix: str, asking: Asking) -> list[Request]:
        """Return what to ask a model; the prefix (description and examples) opens every prompt."""

    @abstractmethod
    def lines(self, question: Asked, answers: Sequence[Any]) -> list[Line]:
        """Return what was answered, not yet graded, a line per sample, from the answers in the order of requests."""
