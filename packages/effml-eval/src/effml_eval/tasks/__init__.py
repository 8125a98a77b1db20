"""Benchmarks: what is asked, of which data, and how it is graded; kinds, readers of files, and six well-known ones."""

from effml_eval.tasks.generative_task import GenerativeTask
from effml_eval.tasks.multiple_choice_task import MultipleChoiceTask
from effml_eval.tasks.perplexity_task import PerplexityTask
from effml_eval.tasks.questions import ChoiceQuestion, Document, OpenQuestion, choice_question
from effml_eval.tasks.row_templates import choice_reader, document_reader, open_reader
from effml_eval.tasks.standard_tasks import arc, gsm8k, hellaswag, openbookqa, piqa, winogrande
from effml_eval.tasks.task import Task
from effml_eval.tasks.task_files import from_yaml
from effml_eval.tasks.task_registry import load_task, register_task, registered_tasks

__all__ = [
    "ChoiceQuestion",
    "Document",
    "GenerativeTask",
    "MultipleChoiceTask",
    "OpenQuestion",
    "PerplexityTask",
    "Task",
    "arc",
    "choice_question",
    "choice_reader",
    "document_reader",
    "from_yaml",
    "gsm8k",
    "hellaswag",
    "load_task",
    "open_reader",
    "openbookqa",
    "piqa",
    "register_task",
    "registered_tasks",
    "winogrande",
]
