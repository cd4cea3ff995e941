"""Tiny fits with curvature: a network on vectors, read without worker processes, and what a store says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import ArtifactStore
from lightning_influence.artifacts import Artifact, Checkpoint
from lightning_influence.curvature import Curvature, TrainingEvidence, statistics_of
from lightning_influence.fitted import weights_at
from lightning_influence.gradients import select
from lightning_influence.replay import TrainingData
from tests.callbacks.test_resume import contents

SAMPLES, INPUTS, CLASSES = 13, 4, 3


class Net(LightningModule):
    """Two layers with dropout between them; its optimizer and loss by name."""

    def __init__(self, optimizer: str = "adam", loss: str = "mean", classes: int = CLASSES, width: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.drop, self.head = nn.Linear(INPUTS, width), nn.Dropout(0.3), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.drop(torch.tanh(self.first(x))))
        return logits

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        match self.hparams["loss"]:
            case "mean":
                return F.cross_entropy(self(x), y)
            case "sum":
                return F.cross_entropy(self(x), y, reduction="sum")
            case "mse":
                return F.mse_loss(self(x), F.one_hot(y, self.head.out_features).to(x.dtype))
            case "own":
                return -self(x).log_softmax(1).gather(1, y[:, None]).mean()
        raise ValueError(self.hparams["loss"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        match self.hparams["optimizer"]:
            case "plain":
                return torch.optim.SGD(self.parameters(), lr=0.1)
            case "adam":
                optimizer: Any = torch.optim.Adam(self.parameters(), lr=0.02)
            case "adamw":
                optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
            case "decay":
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.01)
            case "sgd":
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Still(Net):
    """Without dropout: in train mode and in eval mode the same, whatever the random state."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.drop.p = 0.0


def vectors(length: int = SAMPLES, **kinds: Any) -> TensorDataset:
    draw = torch.Generator().manual_seed(11)
    x, y = torch.randn(length, INPUTS, generator=draw), torch.randint(0, CLASSES, (length,), generator=draw)
    return TensorDataset(x.to(kinds.get("dtype", torch.float32)), y)


def batches(dataset: Any = None, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    data = vectors() if dataset is None else dataset
    return DataLoader(data, batch_size=batch_size, **{"shuffle": True, **options})


def curvatures(store: ArtifactStore) -> dict[tuple[int, str], Artifact]:
    """By optimizer step and name."""
    return {(file.step, str(file.meta["name"])): file for file in store.artifacts("curvature")}


def everything(root: Path) -> dict[str, Any]:
    """What a store says, apart from file boundaries and facts: curvatures to the last bit, and all said of them."""
    store, found = ArtifactStore.open(root), contents(root)
    for (step, name), file in curvatures(store).items():
        found[f"{step} {name}"] = dict(file.meta)
        found |= {f"{step} {name} {field}": tensor for field, tensor in store.curvature(file).items()}
    return found


def estimate(
    module: LightningModule,
    store: ArtifactStore,
    at: Checkpoint,
    statistics: Any = "ekfac",
    data: Any = None,
    **how: Any,
) -> tuple[Curvature, TrainingEvidence]:
    """The curvature at the weights that the store has, without a Trainer, before weight decay."""
    with weights_at(module, store, at):
        evidence = TrainingEvidence(
            module, select(module, "all"), TrainingData.of(batches() if data is None else data), **how
        )
        return statistics_of(statistics).collect(evidence), evidence


def assert_same(store: ArtifactStore, file: Artifact, expected: Curvature) -> None:
    """Bit for bit."""
    tensors, _ = expected.state()
    stored = store.curvature(file)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor), name
