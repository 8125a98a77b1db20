"""How stored answers become scores and estimates, for each kind of task; none of it needs the model."""

from typing import Any

from effml_shared.checks import check_choice

from effml_eval.grading.answer_grading import AnswerGrading
from effml_eval.grading.choice_grading import ChoiceGrading
from effml_eval.grading.grading import Grading, Intervals, Line, Paired
from effml_eval.grading.text_grading import TextGrading

__all__ = ["AnswerGrading", "ChoiceGrading", "Grading", "Intervals", "Line", "Paired", "TextGrading", "read_grading"]


def read_grading(record: dict[str, Any]) -> Grading:
    """Make a grading of what its `describe` returned.

    >>> read_grading(ChoiceGrading(("acc",)).describe())
    ChoiceGrading(metrics=('acc',))
    """
    kinds: dict[str, Any] = {"multiple_choice": ChoiceGrading, "generate": AnswerGrading, "rolling": TextGrading}
    fields = dict(record)
    kind = fields.pop("kind", None)
    check_choice("kind of task", kind, kinds)
    return kinds[kind](**{**fields, "metrics": tuple(fields["metrics"])})
