"""effml-eval: language models scored with intervals, and what an embedding space holds: sparse concepts and bridges.

Rooms: scoring, tasks, metrics, grading, statistics, evaluation (language models); activations, sae, concepts, explorer
(concepts); harness (an adapter for lm-evaluation-harness).
"""

from importlib.metadata import version

from effml_eval.concepts import ConceptReport, bridge_matrix, measure_concepts
from effml_eval.evaluation import EvalResult, compare, evaluate, recompute
from effml_eval.explorer.explorer_page import concept_explorer
from effml_eval.metrics import bits_per_byte, maj_at_k, pass_at_k, rm_at_k
from effml_eval.sae import SAEConfig, SparseAutoencoder, SparseCodes, train_sae
from effml_eval.scoring import LMScorer, SamplingParams, Scorer
from effml_eval.statistics import (
    ComparisonReport,
    Estimate,
    bootstrap_ci,
    holm,
    mcnemar,
    permutation_test,
    power_questions,
    wilson_interval,
)
from effml_eval.tasks import GenerativeTask, MultipleChoiceTask, PerplexityTask, Task, register_task

__all__ = [
    "ComparisonReport",
    "ConceptReport",
    "Estimate",
    "EvalResult",
    "GenerativeTask",
    "LMScorer",
    "MultipleChoiceTask",
    "PerplexityTask",
    "SAEConfig",
    "SamplingParams",
    "Scorer",
    "SparseAutoencoder",
    "SparseCodes",
    "Task",
    "__version__",
    "bits_per_byte",
    "bootstrap_ci",
    "bridge_matrix",
    "compare",
    "concept_explorer",
    "evaluate",
    "holm",
    "maj_at_k",
    "mcnemar",
    "measure_concepts",
    "pass_at_k",
    "permutation_test",
    "power_questions",
    "recompute",
    "register_task",
    "rm_at_k",
    "train_sae",
    "wilson_interval",
]

__version__ = version("effml-eval")
