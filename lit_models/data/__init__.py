"""Text for language models: documents, tokenizers, packing, and the LightningDataModule that joins them.

    documents.py   files -> Document(name, text)      what can go wrong with files
    tokenizers.py  text -> ids                        bytes, or a Hugging Face tokenizer
    packing.py     ids -> sequences of one length     labels, borders, positions
    text.py        TextDataModule                     split, order, ranks

Imports point down that list, except that `packing` and `tokenizers` know nothing of each other.
"""

from lit_models.data.packing import PackedDataset, StreamBuilder, TokenStream
from lit_models.data.text import TextDataModule
from lit_models.data.tokenizers import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "PackedDataset",
    "StreamBuilder",
    "TextDataModule",
    "TokenStream",
    "Tokenizer",
    "check_vocabulary",
    "load_tokenizer",
]
