"""Precision and coverage over temperatures: does training pass the wall, or only sharpen?

temperature_sweep   sample and verify              correct_matrix     the outcomes, kept
temperature_curves  accuracy, coverage, pass@k     precision_curves   problem by problem
distillation        slope against temperature      logit_scaling      the slope that is trivial
coverage_wall       the test
"""

from effml_rl.wall.correct_matrix import CorrectMatrix
from effml_rl.wall.coverage_wall import problems_needed, wall_test
from effml_rl.wall.distillation import distillation_index, temperature_area, temperature_sensitivity
from effml_rl.wall.logit_scaling import fit_scaling, scale_logits
from effml_rl.wall.precision_curves import delta_curve, sorted_precision
from effml_rl.wall.temperature_curves import (
    accuracy,
    best_over_temperature,
    chance_coverage,
    coverage,
    held_out_best,
    pass_at_k_curve,
    precision,
    union_coverage,
)
from effml_rl.wall.temperature_sweep import LANGUAGE_TEMPERATURES, SYNTHETIC_TEMPERATURES, TemperatureSweep

__all__ = [
    "LANGUAGE_TEMPERATURES",
    "SYNTHETIC_TEMPERATURES",
    "CorrectMatrix",
    "TemperatureSweep",
    "accuracy",
    "best_over_temperature",
    "chance_coverage",
    "coverage",
    "delta_curve",
    "distillation_index",
    "fit_scaling",
    "held_out_best",
    "pass_at_k_curve",
    "precision",
    "problems_needed",
    "scale_logits",
    "sorted_precision",
    "temperature_area",
    "temperature_sensitivity",
    "union_coverage",
    "wall_test",
]
