"""effml-diffusion: masked diffusion of fixed and of flexible length, samplers, exact bounds, puzzles as data."""

from importlib.metadata import version

from effml_diffusion.corruption import Corruption
from effml_diffusion.diffusion_transformer import DiffusionBlock, DiffusionTransformer
from effml_diffusion.diffusion_transformer_config import PRESETS, DiffusionTransformerConfig
from effml_diffusion.flex import Canvas, Flex, FlexMDM, LengthGuidance, length_statistics
from effml_diffusion.generative_perplexity import GenerativePerplexity, generative_perplexity, load_judge
from effml_diffusion.insertion_head import InsertionHead
from effml_diffusion.likelihood import Bound, LogLikelihood
from effml_diffusion.low_rank import LowRankConfig
from effml_diffusion.masked_diffusion import LossOutput, MaskedDiffusion
from effml_diffusion.mauve import mauve_score
from effml_diffusion.retrofit import FlexWrapper
from effml_diffusion.samplers import Ancestral, Confidence, FirstHitting, ReMDM, SampleOutput
from effml_diffusion.schedules import Schedule, schedule
from effml_diffusion.text_quality import distinct_n, self_bleu, token_entropy
from effml_diffusion.trace import Trace
from effml_diffusion.trace_page import trace_page

__all__ = [
    "PRESETS",
    "Ancestral",
    "Bound",
    "Canvas",
    "Confidence",
    "Corruption",
    "DiffusionBlock",
    "DiffusionTransformer",
    "DiffusionTransformerConfig",
    "FirstHitting",
    "Flex",
    "FlexMDM",
    "FlexWrapper",
    "GenerativePerplexity",
    "InsertionHead",
    "LengthGuidance",
    "LogLikelihood",
    "LossOutput",
    "LowRankConfig",
    "MaskedDiffusion",
    "ReMDM",
    "SampleOutput",
    "Schedule",
    "Trace",
    "__version__",
    "distinct_n",
    "generative_perplexity",
    "length_statistics",
    "load_judge",
    "mauve_score",
    "schedule",
    "self_bleu",
    "token_entropy",
    "trace_page",
]

__version__ = version("effml-diffusion")
