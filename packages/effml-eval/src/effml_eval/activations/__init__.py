"""Where the rows come from that a dictionary is learnt from: files, stored embeddings, or a model while it runs.

embedding_files     one matrix in a file             embedding_shards       folders of several modalities, with pairs
embedding_mixture   modalities in proportion         image_text_embedders   models of the CLIP and SigLIP kind
hook_points         what a module computes           activation_buffer      the same, shuffled, while it is learnt from
"""

from effml_eval.activations.activation_buffer import ActivationBuffer
from effml_eval.activations.embedding_checks import check_embeddings, match_pairs
from effml_eval.activations.embedding_files import read_embeddings
from effml_eval.activations.embedding_mixture import EmbeddingMixture
from effml_eval.activations.embedding_shards import EmbeddingShards, ShardWriter, save_embeddings
from effml_eval.activations.hook_points import ModuleActivations, hidden_states
from effml_eval.activations.image_text_embedders import image_text_embedders

__all__ = [
    "ActivationBuffer",
    "EmbeddingMixture",
    "EmbeddingShards",
    "ModuleActivations",
    "ShardWriter",
    "check_embeddings",
    "hidden_states",
    "image_text_embedders",
    "match_pairs",
    "read_embeddings",
    "save_embeddings",
]
