"""What an evaluation asks of a language model, log-likelihoods and generations, and the engine that answers it."""

from effml_eval.scoring.language_model_scorer import LMScorer
from effml_eval.scoring.request_hash import request_hash, sample_seed
from effml_eval.scoring.scorer import (
    Generation,
    GenerationRequest,
    RollingScore,
    SamplingParams,
    Score,
    Scorer,
    ScoreRequest,
)

__all__ = [
    "Generation",
    "GenerationRequest",
    "LMScorer",
    "RollingScore",
    "SamplingParams",
    "Score",
    "ScoreRequest",
    "Scorer",
    "request_hash",
    "sample_seed",
]
