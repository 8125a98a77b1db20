"""Samplers of fixed length: `sampler(diffusion, init)` replaces the masks of a batch by tokens."""

from effml_diffusion.samplers.ancestral import Ancestral
from effml_diffusion.samplers.confidence import Confidence
from effml_diffusion.samplers.decoding import Callback, Decoding, SampleOutput, Sampler
from effml_diffusion.samplers.first_hitting import FirstHitting
from effml_diffusion.samplers.remdm import ReMDM

__all__ = ["Ancestral", "Callback", "Confidence", "Decoding", "FirstHitting", "ReMDM", "SampleOutput", "Sampler"]
