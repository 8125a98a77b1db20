"""Sparse autoencoders: sparse dictionaries of an embedding space, their encoders and their training.

autoencoder, autoencoder_config   the module               training      a step of the one loop, train_sae
sparsifiers, jumprelu, selection  who stays active         sparse_codes  values and indices
matching_pursuit, archetypal      other encoders, atoms    sparse_encode, sparse_decode, sparse_products, native  speed
revival, geometric_median         dead concepts, centre    atom_norms    unit atoms
model_files, peer_checkpoints     what is saved, and what other libraries saved
"""

from effml_eval.sae.archetypal import ArchetypalDictionary
from effml_eval.sae.autoencoder import SAEOutput, SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.geometric_median import geometric_median
from effml_eval.sae.jumprelu import jumprelu
from effml_eval.sae.matching_pursuit import matching_pursuit
from effml_eval.sae.peer_checkpoints import load_peer_autoencoder
from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.sparse_decode import sparse_decode
from effml_eval.sae.sparsifiers import batch_topk_codes, topk_codes
from effml_eval.sae.training import DictionaryStep, EmbeddingRows, SAETrainingConfig, TrainResult, train_sae

__all__ = [
    "ArchetypalDictionary",
    "DictionaryStep",
    "EmbeddingRows",
    "SAEConfig",
    "SAEOutput",
    "SAETrainingConfig",
    "SparseAutoencoder",
    "SparseCodes",
    "TrainResult",
    "batch_topk_codes",
    "geometric_median",
    "jumprelu",
    "load_peer_autoencoder",
    "matching_pursuit",
    "sparse_decode",
    "topk_codes",
    "train_sae",
]
