"""Seesaw: a batch that grows where the learning rate would decay.

plan          the schedule itself: rows, table, plot        decay_curves   what it can be made of
training      in a plain loop, a `DataLoader`, accelerate   huggingface    in Hugging Face's `Trainer`
"""

from effml_optim.seesaw.huggingface import SeesawTrainerMixin
from effml_optim.seesaw.plan import SeesawPlan
from effml_optim.seesaw.training import SeesawBatchSampler, SeesawScheduler

__all__ = ["SeesawBatchSampler", "SeesawPlan", "SeesawScheduler", "SeesawTrainerMixin"]
