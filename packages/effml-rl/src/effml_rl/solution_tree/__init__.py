"""The solution-tree task: planning, execution and verification with exact ground truth.

task           problems of a world               dataset             three sets of them in one file
tables         the world itself                  examples            problems as numbers, text and token ids
tree_tokenizer words as ids                      attempt             what a model wrote, read
path_verifier  right or wrong                    plan_execute_verify three skills
knowledge      what training data tell           reference_solvers   ceilings without training
"""

from effml_rl.solution_tree.dataset import SolutionTreeDataset
from effml_rl.solution_tree.examples import Example, Examples
from effml_rl.solution_tree.knowledge import seen_pairs, solvable, unseen_pairs
from effml_rl.solution_tree.plan_execute_verify import Skills, corruptions, skills, verify_score
from effml_rl.solution_tree.task import SolutionTreeTask

__all__ = [
    "Example",
    "Examples",
    "Skills",
    "SolutionTreeDataset",
    "SolutionTreeTask",
    "corruptions",
    "seen_pairs",
    "skills",
    "solvable",
    "unseen_pairs",
    "verify_score",
]
