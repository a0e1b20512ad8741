"""Data for language models: text and conversations, tokenizers, packing, and the LightningDataModules that join them.

    documents.py      files -> Document(name, text) or Record    what can go wrong with files
    tokenizers.py     text -> ids                                bytes, or a Hugging Face tokenizer
    conversations.py  records -> ids, what is to be learnt       chat templates
    streams.py        ids -> one long array                      in memory or in files
    cache.py          files that one process builds              locks, checksums
    packing.py        array -> sequences of one length           text: labels, borders, positions
    samples.py        array -> sequences of whole samples        conversations
    order.py          sequences -> this rank's, in order         seed, epoch
    position.py       the loader that knows where it stands      resuming
    module.py         loaders over two sets
    text.py, chat.py  TextDataModule, ChatDataModule             split, limits, summaries

Imports point up this list.
"""

from lit_models.data.chat import ChatDataModule
from lit_models.data.packing import PackedDataset
from lit_models.data.streams import StreamBuilder, TokenStream
from lit_models.data.text import TextDataModule
from lit_models.data.tokenizers import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "ChatDataModule",
    "PackedDataset",
    "StreamBuilder",
    "TextDataModule",
    "TokenStream",
    "Tokenizer",
    "check_vocabulary",
    "load_tokenizer",
]
