"""Linear dictionaries to compare sparse autoencoders with: each fits data and encodes new rows, in PyTorch alone."""

from effml_eval.concepts.baselines.ica import ICA, ica
from effml_eval.concepts.baselines.kmeans import KMeans, kmeans
from effml_eval.concepts.baselines.linear_dictionary import LinearDictionary, largest_codes
from effml_eval.concepts.baselines.matrix_factorization import NMF, SemiNMF, nmf, semi_nmf
from effml_eval.concepts.baselines.pca import PCA, pca

__all__ = [
    "ICA",
    "NMF",
    "PCA",
    "KMeans",
    "LinearDictionary",
    "SemiNMF",
    "ica",
    "kmeans",
    "largest_codes",
    "nmf",
    "pca",
    "semi_nmf",
]
