"""How sure an evaluation is: intervals, comparisons and what would make it surer.

estimate        the record of all of them        scores           per-question vectors, and clusters of questions
intervals       means: normal, Wilson            bootstrap        means and ratios of sums: percentile, BCa
paired_tests    t, McNemar, sign flips, Holm     power            questions a comparison needs
task_means      macro and micro                  variance_split   more questions or more samples?
comparison      two models, all tasks            control_variate  a reference model's help
"""

from effml_eval.statistics.bootstrap import bootstrap_ci, resampled_ratios
from effml_eval.statistics.comparison import ComparisonReport, TaskComparison, compare_scores
from effml_eval.statistics.control_variate import control_variate_mean
from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.intervals import mean_estimate, standard_error, wilson_interval
from effml_eval.statistics.paired_tests import (
    bootstrap_test,
    holm,
    mcnemar,
    paired_difference,
    paired_t_test,
    permutation_test,
)
from effml_eval.statistics.power import power_questions
from effml_eval.statistics.task_means import macro_mean, micro_mean
from effml_eval.statistics.variance_split import VarianceSplit, variance_split

__all__ = [
    "ComparisonReport",
    "Estimate",
    "TaskComparison",
    "VarianceSplit",
    "bootstrap_ci",
    "bootstrap_test",
    "compare_scores",
    "control_variate_mean",
    "holm",
    "macro_mean",
    "mcnemar",
    "mean_estimate",
    "micro_mean",
    "paired_difference",
    "paired_t_test",
    "permutation_test",
    "power_questions",
    "resampled_ratios",
    "standard_error",
    "variance_split",
    "wilson_interval",
]
