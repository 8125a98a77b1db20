"""Text as batches: tokenizers, corpora, packing, and loaders whose position is part of the checkpoint."""

from effml_shared.data.corpora import DataConfig, read_documents
from effml_shared.data.loader import Loader, StreamingLoader, open_data
from effml_shared.data.packing import Batch, PackedDataset
from effml_shared.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "Loader",
    "PackedDataset",
    "StreamingLoader",
    "Tokenizer",
    "load_tokenizer",
    "open_data",
    "read_documents",
]
