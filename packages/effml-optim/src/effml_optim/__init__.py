"""effml-optim: SOAP, Shampoo and Muon as plain torch optimizers."""

from importlib.metadata import version

from effml_optim.muon import Muon
from effml_optim.param_groups import parameter_roles, split_params
from effml_optim.shampoo import Shampoo
from effml_optim.soap import SOAP

__all__ = ["SOAP", "Muon", "Shampoo", "__version__", "parameter_roles", "split_params"]

__version__ = version("effml-optim")
