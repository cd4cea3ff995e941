"""Two small text classifiers: plain LightningModules such as anyone has, which know nothing of influence.

Both give a text the same answer whatever it is padded to, because padding is masked wherever texts of
different lengths meet. ``forward`` takes token ids ``(B, T)``, padding id 0, and returns logits ``(B, C)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

OptimizerName = Literal["sgd", "adam", "adamw"]


class TextClassifier(LightningModule):
    """What the classifiers share: the loss, the accuracy and the optimizer; a subclass brings ``forward``.

    Args:
        num_classes: classes.
        optimizer: ``"sgd"`` (with ``momentum``), ``"adam"`` or ``"adamw"``.
        learning_rate: of the optimizer.
        momentum: of SGD.
        weight_decay: of the optimizer.
    """

    def __init__(
        self,
        num_classes: int,
        optimizer: OptimizerName,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        if optimizer not in ("sgd", "adam", "adamw"):
            raise ValueError(f"Expected the optimizer sgd, adam or adamw, found {optimizer!r}.")
        self.optimizer_name = optimizer
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        logits = self(batch["tokens"])  # (B, C)
        loss = F.cross_entropy(logits, batch["label"])
        self.train_accuracy(logits, batch["label"])
        size = len(batch["label"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        self.log(
            "train_accuracy",
            self.train_accuracy,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=size,
        )
        return loss

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on held-out texts."""
        logits = self(batch["tokens"])  # (B, C)
        size = len(batch["label"])
        self.test_accuracy(logits, batch["label"])
        self.log("test_loss", F.cross_entropy(logits, batch["label"]), batch_size=size)
        self.log("test_accuracy", self.test_accuracy, batch_size=size)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the logits (B, C)."""
        logits: Tensor = self(batch["tokens"])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one optimizer over all parameters."""
        parameters = self.parameters()
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(
                parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
            )
        kind = torch.optim.Adam if self.optimizer_name == "adam" else torch.optim.AdamW
        return kind(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)


class TextCNN(TextClassifier):
    """Embedding, convolutions over the words, the largest answer of each channel, one linear layer.

    Args:
        vocabulary_size: words, padding (id 0) included.
        num_classes: classes.
        embedding_dim: size of a word vector.
        channels: output channels of each convolution.
        kernel_size: words a convolution sees, an odd number.
        embedding_std: spread of the word vectors before training; large ones drown what few texts can teach.
        dropout: on the pooled channels.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_classes: int,
        *,
        embedding_dim: int = 128,
        channels: Sequence[int] = (50, 50),
        kernel_size: int = 5,
        embedding_std: float = 0.1,
        dropout: float = 0.5,
        optimizer: OptimizerName = "adam",
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(num_classes, optimizer, learning_rate, momentum, weight_decay)
        if not channels or kernel_size % 2 == 0:
            raise ValueError(
                f"Expected at least one convolution and an odd kernel size, found channels={list(channels)} "
                f"and kernel_size={kernel_size}."
            )
        channels = [int(width) for width in channels]  # a configuration's own list type stays out of checkpoints
        self.save_hyperparameters()
        widths = [embedding_dim, *channels]
        self.embedding = _word_embedding(vocabulary_size, embedding_dim, embedding_std)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(inputs, outputs, kernel_size, padding=kernel_size // 2) for inputs, outputs in pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, C) of token ids (B, T)."""
        words = (tokens != 0).unsqueeze(1)  # (B, 1, T)
        hidden: Tensor = self.embedding(tokens).transpose(1, 2)  # (B, D, T)
        for convolution in self.convolutions:
            hidden = convolution(hidden).relu() * words  # zero past the end, as at the edges of a longer tensor
        pooled = hidden.amax(dim=2)  # (B, K); never below zero, so masked places cannot win
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


class TextTransformer(TextClassifier):
    """Embedding, sinusoidal positions, transformer encoder, mean over the words, one linear layer.

    Args:
        vocabulary_size: words, padding (id 0) included.
        num_classes: classes.
        embedding_dim: size of a word vector, an even number.
        num_layers: encoder layers.
        num_heads: attention heads of a layer.
        feedforward_dim: hidden units of a layer's feed-forward part.
        embedding_std: spread of the word vectors before training.
        dropout: of the encoder.
        max_tokens: longest text.
    """

    positions: Tensor

    def __init__(
        self,
        vocabulary_size: int,
        num_classes: int,
        *,
        embedding_dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        feedforward_dim: int = 256,
        embedding_std: float = 0.02,
        dropout: float = 0.2,
        max_tokens: int = 512,
        optimizer: OptimizerName = "adam",
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(num_classes, optimizer, learning_rate, momentum, weight_decay)
        self.save_hyperparameters()
        self.embedding = _word_embedding(vocabulary_size, embedding_dim, embedding_std)
        positions = _sinusoids(max_tokens, embedding_dim) * embedding_std  # (T, D), no louder than the words
        self.register_buffer("positions", positions, persistent=False)
        layer = nn.TransformerEncoderLayer(
            embedding_dim, num_heads, feedforward_dim, dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, num_layers, norm=nn.LayerNorm(embedding_dim), enable_nested_tensor=False
        )
        self.head = nn.Linear(embedding_dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, C) of token ids (B, T)."""
        if tokens.shape[1] > len(self.positions):
            raise ValueError(f"Expected at most {len(self.positions)} tokens, found {tokens.shape[1]}.")
        padding = tokens == 0  # (B, T)
        hidden: Tensor = self.embedding(tokens) + self.positions[: tokens.shape[1]]  # (B, T, D)
        hidden = self.encoder(hidden, src_key_padding_mask=padding)
        words = (~padding).unsqueeze(2).to(hidden.dtype)  # (B, T, 1)
        mean = (hidden * words).sum(dim=1) / words.sum(dim=1).clamp(min=1)  # (B, D)
        logits: Tensor = self.head(mean)
        return logits


def _word_embedding(vocabulary_size: int, dim: int, std: float) -> nn.Embedding:
    """Return an embedding with normal word vectors of the given spread and zeros for padding (id 0)."""
    embedding = nn.Embedding(vocabulary_size, dim, padding_idx=0)
    with torch.no_grad():
        embedding.weight.mul_(std)
    return embedding


def _sinusoids(length: int, dim: int) -> Tensor:
    """Return the (length, dim) sine and cosine waves of Vaswani et al. (2017)."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))  # (D / 2,)
    angles = torch.arange(length).unsqueeze(1) * rates  # (T, D / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)
