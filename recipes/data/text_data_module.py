"""An ordinary LightningDataModule for text classification, which knows nothing of influence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from recipes.data.corpus import Corpus, Text, TextSource
from recipes.data.vocabulary import PADDING, Vocabulary

Sample = dict[str, Tensor]


class EncodedTexts(Dataset[Sample]):
    """Texts as samples ``{"tokens": (T,) int64, "label": () int64}``, encoded once."""

    def __init__(
        self, texts: Sequence[Text], labels: Sequence[int], vocabulary: Vocabulary, max_tokens: int | None
    ) -> None:
        self.tokens = [torch.tensor(vocabulary.encode(text, max_tokens)) for text in texts]
        self.labels = torch.tensor(labels, dtype=torch.int64)  # (N,)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        return {"tokens": self.tokens[index], "label": self.labels[index]}


def collate(samples: Sequence[Sample]) -> Sample:
    """Pad a batch to its own longest text: ``{"tokens": (B, T), "label": (B,)}``."""
    return {
        "tokens": pad_sequence([sample["tokens"] for sample in samples], batch_first=True, padding_value=PADDING),
        "label": torch.stack([sample["label"] for sample in samples]),
    }


class TextDataModule(LightningDataModule):
    """Loaders over a corpus of texts.

    After ``setup()``, which may be called early to size a model, texts, labels and words are attributes.

    Args:
        source: where the texts come from: ``Docstrings``, ``TextTable``, ``HubTexts`` (all in ``recipes.data``)
            or anything with a ``load() -> Corpus``.
        batch_size: texts a batch.
        max_tokens: longer texts are cut; None keeps them whole.
        vocabulary_size: the most frequent words that are kept; None keeps all.
        min_count: a word that occurs less often in the training texts is unknown.
        flip_fraction: part of the training labels replaced by another class, to see whether they are found.
        num_workers: worker processes of each loader.
        seed: of the flipped labels.
    """

    def __init__(
        self,
        source: TextSource,
        *,
        batch_size: int = 64,
        max_tokens: int | None = 128,
        vocabulary_size: int | None = None,
        min_count: int = 1,
        flip_fraction: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.vocabulary_size = vocabulary_size
        self.min_count = min_count
        self.flip_fraction = flip_fraction
        self.num_workers = num_workers
        self.seed = seed
        self._loaded: tuple[Corpus, Vocabulary, EncodedTexts, EncodedTexts] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Load and encode the texts; the second call does nothing."""
        if self._loaded is not None:
            return
        corpus = self.source.load()
        if self.flip_fraction:
            corpus = corpus.with_flipped_labels(self.flip_fraction, self.seed)
        vocabulary = Vocabulary.build(corpus.train_texts, self.vocabulary_size, self.min_count)
        train = EncodedTexts(corpus.train_texts, corpus.train_labels, vocabulary, self.max_tokens)
        test = EncodedTexts(corpus.test_texts, corpus.test_labels, vocabulary, self.max_tokens)
        self._loaded = corpus, vocabulary, train, test

    @property
    def corpus(self) -> Corpus:
        """The texts and labels as they were loaded."""
        return self._ready[0]

    @property
    def vocabulary(self) -> Vocabulary:
        """The words of the training texts; ``vocabulary.decode(id)`` gives a word back."""
        return self._ready[1]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of every class."""
        return self.corpus.label_names

    @property
    def train_texts(self) -> tuple[Text, ...]:
        """The training texts in dataset order: position i is training sample i."""
        return self.corpus.train_texts

    @property
    def train_labels(self) -> tuple[int, ...]:
        """The labels that the model is trained on, flipped ones included."""
        return self.corpus.train_labels

    @property
    def test_texts(self) -> tuple[Text, ...]:
        """The held-out texts in dataset order."""
        return self.corpus.test_texts

    @property
    def test_labels(self) -> tuple[int, ...]:
        """The held-out labels; they are never flipped."""
        return self.corpus.test_labels

    @property
    def flipped(self) -> tuple[bool, ...]:
        """Which training labels were flipped on purpose."""
        return self.corpus.flipped

    @property
    def original_train_labels(self) -> tuple[int, ...]:
        """The training labels before any was flipped."""
        return self.corpus.original_train_labels

    def train_dataloader(self) -> DataLoader[Sample]:
        """Training texts, shuffled."""
        return self._loader(self._ready[2], shuffle=True)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Held-out texts, in order."""
        return self._loader(self._ready[3], shuffle=False)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Held-out texts, in order."""
        return self.test_dataloader()

    @property
    def _ready(self) -> tuple[Corpus, Vocabulary, EncodedTexts, EncodedTexts]:
        if self._loaded is None:
            raise RuntimeError("The texts are not loaded yet. HINT: call setup() first.")
        return self._loaded

    def _loader(self, dataset: EncodedTexts, *, shuffle: bool) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
