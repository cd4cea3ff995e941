"""Somebody's project, which knows nothing of influence: sentences, a LightningDataModule and a LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

SUBJECTS = ("cat", "dog", "bird", "stock", "bank", "market")
VERBS = ("sleeps", "runs", "sings", "rises", "falls", "grows")
PLACES = ("outside", "today", "again")
VOCABULARY = ("<pad>", "<unk>", *SUBJECTS, *VERBS, *PLACES, "the")
Sample = tuple[list[int], int]


def encoded(sentence: str) -> list[int]:
    return [VOCABULARY.index(word) if word in VOCABULARY else 1 for word in sentence.split()]


def sentences(count: int, first: int = 0) -> list[str]:
    made = []
    for n in range(first, first + count):
        made.append(f"the {SUBJECTS[n % 6]} {VERBS[(n + n // 6) % 6]}" + (f" {PLACES[n // 2 % 3]}" if n % 2 else ""))
    return made


def samples(count: int, first: int = 0) -> list[Sample]:
    """Animals are class 0, money is class 1."""
    return [(encoded(text), int((first + n) % 6 >= 3)) for n, text in enumerate(sentences(count, first))]


def collate(batch: Sequence[Sample]) -> dict[str, Tensor]:
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(text) for text, _ in batch], batch_first=True)
    return {"tokens": tokens, "label": torch.tensor([label for _, label in batch])}


class Library(LightningDataModule):
    """Training, validation and query loaders over sentences of different lengths."""

    def __init__(self, count: int = 20, batch_size: int = 6) -> None:
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def setup(self, stage: str) -> None:
        self.train_samples, self.held_out = samples(self.count), samples(5, self.count)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_samples, batch_size=self.batch_size, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=2, collate_fn=collate)

    def predict_dataloader(self) -> Any:
        return DataLoader(self.held_out, batch_size=2, collate_fn=collate)


class Reader(LightningModule):
    """Mean of word embeddings, a layer with batch normalisation and dropout, a head; it validates and logs."""

    def __init__(self, width: int = 8, rate: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.words = nn.Embedding(len(VOCABULARY), width, padding_idx=0)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        present = (tokens != 0).unsqueeze(-1)
        mean = (self.words(tokens) * present).sum(1) / present.sum(1)
        logits: Tensor = self.head(self.dropout(torch.relu(self.norm(self.hidden(mean)))))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["tokens"]), batch["label"])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch["tokens"])
        self.log("val_loss", F.cross_entropy(logits, batch["label"]), batch_size=len(logits))
        self.log("val_accuracy", (logits.argmax(1) == batch["label"]).float().mean(), batch_size=len(logits))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["rate"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]
