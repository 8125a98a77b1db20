"""Say whether a completion is right: verdicts with a status, and no silent zeros."""

from effml_shared.data.answers import boxed_answer, extract_answer, last_number
from effml_shared.data.numbers import numbers_equal, parse_number

from effml_rl.verifiers.answer_match import ExactMatch, NumericMatch
from effml_rl.verifiers.program_match import CallMatch, ProgramMatch, fenced_code
from effml_rl.verifiers.reward_functions import RewardFunction, reward_function
from effml_rl.verifiers.symbolic_match import SymbolicMatch
from effml_rl.verifiers.verdict import Status, Verdict, Verifier
from effml_rl.verifiers.word_problem_match import WordProblemMatch

__all__ = [
    "CallMatch",
    "ExactMatch",
    "NumericMatch",
    "ProgramMatch",
    "RewardFunction",
    "Status",
    "SymbolicMatch",
    "Verdict",
    "Verifier",
    "WordProblemMatch",
    "boxed_answer",
    "extract_answer",
    "fenced_code",
    "last_number",
    "numbers_equal",
    "parse_number",
    "reward_function",
]
