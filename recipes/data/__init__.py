"""Data sets of the examples: where the texts come from, the words they are made of, and the loaders."""

from recipes.data.corpus import Corpus, Text, TextSource
from recipes.data.docstrings import Docstrings
from recipes.data.hub import HubTexts
from recipes.data.text_data_module import TextDataModule
from recipes.data.text_table import TextTable
from recipes.data.vocabulary import Vocabulary

__all__ = [
    "Corpus",
    "Docstrings",
    "HubTexts",
    "Text",
    "TextDataModule",
    "TextSource",
    "TextTable",
    "Vocabulary",
]
