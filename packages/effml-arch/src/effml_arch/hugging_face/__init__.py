"""The Recurrent Transformer as a model of Hugging Face's transformers, and baselines as transformers' own classes.

Importing this registers both classes: `AutoConfig` and `AutoModelForCausalLM` then read what `save_pretrained` wrote.
"""

from effml_shared.errors import require

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ModuleNotFoundError:
    require("transformers", extra="effml-arch[hf]", purpose="by effml_arch.hugging_face")
    raise

from effml_arch.hugging_face.baselines import from_hugging_face, to_hugging_face
from effml_arch.hugging_face.causal_lm import RecurrentTransformerForCausalLM
from effml_arch.hugging_face.configuration import HFRecurrentTransformerConfig

__all__ = [
    "HFRecurrentTransformerConfig",
    "RecurrentTransformerForCausalLM",
    "from_hugging_face",
    "to_hugging_face",
]

AutoConfig.register(HFRecurrentTransformerConfig.model_type, HFRecurrentTransformerConfig, exist_ok=True)
AutoModelForCausalLM.register(HFRecurrentTransformerConfig, RecurrentTransformerForCausalLM, exist_ok=True)
