"""effml-optim: SOAP, Shampoo and Muon as plain torch optimizers, and Seesaw schedules for any of them."""

from importlib.metadata import version

from effml_optim.muon import Muon
from effml_optim.noise_scale import NoiseScaleMonitor
from effml_optim.param_groups import parameter_roles, split_params
from effml_optim.seesaw import SeesawBatchSampler, SeesawPlan, SeesawScheduler, SeesawTrainerMixin
from effml_optim.sgd_risk import predict_linear
from effml_optim.shampoo import Shampoo
from effml_optim.soap import SOAP

__all__ = [
    "SOAP",
    "Muon",
    "NoiseScaleMonitor",
    "SeesawBatchSampler",
    "SeesawPlan",
    "SeesawScheduler",
    "SeesawTrainerMixin",
    "Shampoo",
    "__version__",
    "parameter_roles",
    "predict_linear",
    "split_params",
]

__version__ = version("effml-optim")
