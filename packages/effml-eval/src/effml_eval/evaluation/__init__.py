"""Evaluating: asking a model everything, keeping what it answers, and what follows from that, now or later.

evaluator        evaluate(): a model on tasks     answer_store, manifest   what is kept, and what it depends on
eval_result      estimates, samples, the record   regrading                other metrics of stored samples
model_directory  models to evaluate               result_comparison        two evaluations, question by question
"""

from effml_eval.evaluation.eval_result import EvalResult
from effml_eval.evaluation.evaluator import evaluate
from effml_eval.evaluation.model_directory import load_model
from effml_eval.evaluation.regrading import recompute
from effml_eval.evaluation.result_comparison import compare

__all__ = ["EvalResult", "compare", "evaluate", "load_model", "recompute"]
