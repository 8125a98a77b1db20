"""What an answer is worth: metrics of one question or one corpus, as pure functions of what the model returned.

multiple_choice   acc and its normalisations, Brier, NLL     text_likelihood   perplexity, bits per byte
n_sample          pass@k, pass^k, G-Pass@k, rm@k             majority          maj@k
extraction        where the answer stands in the text        equivalence       is it the gold one? as text, as number
                                                             formulas          as a formula
"""

from effml_eval.metrics.equivalence import (
    exact_equal,
    is_correct,
    normalize_text,
    normalized_equal,
    numeric_equal,
)
from effml_eval.metrics.extraction import EXTRACTORS, Extractor, extractor, regex_extractor
from effml_eval.metrics.formulas import symbolic_equal
from effml_eval.metrics.majority import answer_classes, maj_at_k
from effml_eval.metrics.multiple_choice import expected_calibration_error, multiple_choice_scores
from effml_eval.metrics.n_sample import g_pass_at_k, pass_all_at_k, pass_at_k, rm_at_k
from effml_eval.metrics.text_likelihood import bits_per_byte, perplexity, text_likelihood

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "answer_classes",
    "bits_per_byte",
    "exact_equal",
    "expected_calibration_error",
    "extractor",
    "g_pass_at_k",
    "is_correct",
    "maj_at_k",
    "multiple_choice_scores",
    "normalize_text",
    "normalized_equal",
    "numeric_equal",
    "pass_all_at_k",
    "pass_at_k",
    "perplexity",
    "regex_extractor",
    "rm_at_k",
    "symbolic_equal",
    "text_likelihood",
]
