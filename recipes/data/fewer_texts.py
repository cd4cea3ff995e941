"""Fewer texts of any source, for programs whose cost grows with every text."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.data.corpus import Corpus, TextSource, subsample


@dataclass(frozen=True)
class FewerTexts:
    """A source of which `train_size` training texts are kept, chosen by hash; the held-out texts stay.

    Args:
        source: where the texts come from.
        train_size: how many are kept; None takes all of them.
    """

    source: TextSource
    train_size: int | None = None

    def load(self) -> Corpus:
        """The smaller corpus."""
        corpus = self.source.load()
        texts, labels = subsample(corpus.train_texts, corpus.train_labels, self.train_size, "train")
        return replace(
            corpus, train_texts=tuple(texts), train_labels=tuple(labels), flipped=(), original_train_labels=()
        )
