"""A language model that looks a few words back, and a classifier that begins with its encoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from recipes.data.vocabulary import PADDING


class Encoder(nn.Module):
    """Word embeddings, and at every place a tanh layer over the last few of them.

    Args:
        vocabulary_size: words.
        width: of an embedding and of a feature.
        context: words that a feature sees, its own the last.
    """

    def __init__(self, vocabulary_size: int, width: int, context: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, width, padding_idx=PADDING)
        self.mix = nn.Linear(context * width, width)
        self.context = context

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) to features (B, T, width)."""
        embedded = F.pad(self.words(tokens), (0, 0, self.context - 1, 0))  # (B, context - 1 + T, width)
        seen = embedded.unfold(1, self.context, 1).transpose(2, 3)  # (B, T, context, width)
        features: Tensor = torch.tanh(self.mix(seen.flatten(2)))
        return features


class LanguageModel(LightningModule):
    """The next word from the last few: mean cross-entropy over the words of a batch.

    Args:
        vocabulary_size, width, context: of the encoder.
        learning_rate: of Adam.
    """

    def __init__(self, vocabulary_size: int, width: int = 48, context: int = 4, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = Encoder(vocabulary_size, width, context)
        self.next_word = nn.Linear(width, vocabulary_size)
        self.learning_rate = learning_rate

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean over all words that have one before them."""
        tokens = batch["tokens"]
        logits = self.next_word(self.encoder(tokens[:, :-1]))  # (B, T - 1, V)
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=PADDING)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class TextTask(LightningModule):
    """Class of a text from the mean of its features.

    Args:
        vocabulary_size, width, context: of the encoder.
        num_classes: classes.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_classes: int,
        width: int = 48,
        context: int = 4,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = Encoder(vocabulary_size, width, context)
        self.head = nn.Linear(width, num_classes)
        self.learning_rate = learning_rate

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) to logits (B, C); padding does not count."""
        counted = (tokens != PADDING).unsqueeze(2).to(self.head.weight.dtype)
        features = (self.encoder(tokens) * counted).sum(1) / counted.sum(1)
        logits: Tensor = self.head(features)
        return logits

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self(batch["tokens"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
