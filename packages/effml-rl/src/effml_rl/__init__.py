"""effml-rl: reinforcement learning of language models: sampler, verifiers, exact objectives, one trainer, the wall."""

from importlib.metadata import version

from effml_rl.advantages import advantages
from effml_rl.aggregation import aggregate
from effml_rl.expert_iteration import ExpertIteration, ExpertIterationConfig
from effml_rl.gae import gae
from effml_rl.kl import kl
from effml_rl.pass_at_k import majority_at_k, pass_at_k
from effml_rl.policy_config import PolicyConfig
from effml_rl.policy_loss import policy_loss, policy_metrics
from effml_rl.prompts import Prompt, PromptData
from effml_rl.rollout_batch import RolloutBatch
from effml_rl.sampler import Sampler
from effml_rl.sandbox import PythonSandbox
from effml_rl.solution_tree import SolutionTreeTask
from effml_rl.supervised import SupervisedDataset, supervised_loss
from effml_rl.token_logps import token_logps
from effml_rl.trainers import GRPOTrainer, PPOTrainer, RLOOTrainer
from effml_rl.value_loss import value_loss
from effml_rl.wall import CorrectMatrix, TemperatureSweep, wall_test

__all__ = [
    "CorrectMatrix",
    "ExpertIteration",
    "ExpertIterationConfig",
    "GRPOTrainer",
    "PPOTrainer",
    "PolicyConfig",
    "Prompt",
    "PromptData",
    "PythonSandbox",
    "RLOOTrainer",
    "RolloutBatch",
    "Sampler",
    "SolutionTreeTask",
    "SupervisedDataset",
    "TemperatureSweep",
    "__version__",
    "advantages",
    "aggregate",
    "gae",
    "kl",
    "majority_at_k",
    "pass_at_k",
    "policy_loss",
    "policy_metrics",
    "supervised_loss",
    "token_logps",
    "value_loss",
    "wall_test",
]

__version__ = version("effml-rl")
