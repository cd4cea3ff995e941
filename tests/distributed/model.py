"""A small text classifier with everything that a callback could disturb, and a record of what its training did."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

SAMPLES, WORDS, BATCH, EPOCHS = 45, 30, 4, 2
STORED = ("embedding.weight", "head.weight", "head.bias")


class Sentences(Dataset[tuple[Tensor, int, int]]):
    """Sample i says that it is sample i."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(1)
        lengths = torch.randint(3, 8, (SAMPLES,), generator=drawn).tolist()
        self.words = [torch.randint(1, WORDS, (length,), generator=drawn) for length in lengths]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self.words[i], int(self.words[i].sum()) % 3, i


def collate(samples: list[tuple[Tensor, int, int]]) -> dict[str, Tensor]:
    """Pad to the longest text of the batch."""
    words, labels, positions = zip(*samples, strict=True)
    padded = nn.utils.rnn.pad_sequence(list(words), batch_first=True)
    return {"words": padded, "label": torch.tensor(labels), "position": torch.tensor(positions)}


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Sentences(), batch_size=BATCH, collate_fn=collate, **options)


class Classifier(LightningModule):
    """Dropout, a metric, step-wise logs, a counter and random numbers; `spare` is never used in a forward pass."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.spare = nn.Linear(2, 2) if spare else None
        self.embedding = nn.Embedding(WORDS, 6, padding_idx=0)
        self.dropout, self.head, self.mean = nn.Dropout(0.3), nn.Linear(6, 3), MeanMetric()
        self.calls: list[int] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = (batch["words"] != 0).unsqueeze(-1)
        mean = (self.embedding(batch["words"]) * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.head(self.dropout(mean.tanh()))
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["label"])
        self.calls.append(batch_idx)
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class Watch(Callback):
    """Writes down the samples of every batch, the reduced gradient of every step, and everything at the end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps: list[dict[str, Any]] = []
        self.ids: list[list[int]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(
            7 + trainer.global_rank
        )  # here, because a forked process starts with random numbers of its own
        numpy.random.seed(3), random.seed(3)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.ids.append(batch["position"].tolist())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = {name: p.grad.tolist() for name, p in pl_module.named_parameters() if name in STORED}
        rate = optimizer.param_groups[0]["lr"]
        self.steps.append({"ids": self.ids, "rate": rate, "gradients": gradients})
        self.ids = []

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        optimizer = trainer.optimizers[0]
        end = {
            "weights": digest(pl_module.state_dict()),
            "momentum": digest({str(i): s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}),
            "torch": digest({"": torch.get_rng_state()}),
            "numpy": numpy.random.random(),
            "python": random.random(),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "calls": pl_module.calls,
            "flags": [part.training for part in pl_module.modules()],
            "gradients": [p.grad is None for p in pl_module.parameters()],
            "attributes": sorted(k for k in vars(pl_module) if not k.startswith("_")),
        }
        Path(f"{self.path}-rank{trainer.global_rank}.json").write_text(json.dumps({"steps": self.steps, "end": end}))


def digest(tensors: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.detach().numpy().tobytes())
    return whole.hexdigest()


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})
