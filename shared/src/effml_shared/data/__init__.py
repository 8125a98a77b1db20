"""Text as batches: tokenizers, corpora, word problems, packing, loaders whose position is part of the checkpoint."""

from effml_shared.data.corpora import DataConfig, read_documents
from effml_shared.data.loader import Loader, StreamingLoader, open_data
from effml_shared.data.mixtures import MixtureBuilder
from effml_shared.data.packing import Batch, PackedDataset
from effml_shared.data.solution_formats import FormatSpec
from effml_shared.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from effml_shared.data.word_problems import WordProblem, WordProblemGenerator

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "FormatSpec",
    "Loader",
    "MixtureBuilder",
    "PackedDataset",
    "StreamingLoader",
    "Tokenizer",
    "WordProblem",
    "WordProblemGenerator",
    "load_tokenizer",
    "open_data",
    "read_documents",
]
