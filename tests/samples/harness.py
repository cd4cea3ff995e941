"""A tiny fit whose batches carry the truth: every sample is its own position in the dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_influence.samples import SampleTracker

LOADER_WARNINGS = (
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",  # Lightning's own, on new torch
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:Consider setting `persistent_workers=True` in 'train_dataloader'",
)

Sample = dict[str, Any]


def features(position: int) -> Tensor:
    return torch.tensor([1.0, position / 7, (position % 3) - 1.0])


class Positions(Dataset[Sample]):
    """Sample i says that it is sample i; `label` tells datasets apart."""

    def __init__(self, length: int = 22, label: int = 0) -> None:
        self.length, self.label = length, label

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Sample:
        return {"x": features(position), "position": position, "label": self.label}


class Stream(IterableDataset[Sample]):
    def __iter__(self) -> Iterator[Sample]:
        return (Positions(14)[position] for position in range(14))


class Model(LightningModule):
    def __init__(self, loaders: Callable[[], Any] | None = None, batch_size: int = 4) -> None:
        super().__init__()
        self.linear, self.lr, self.batch_size = nn.Linear(3, 1), 0.01, batch_size
        if loaders is not None:
            self.train_dataloader = loaders  # type: ignore[method-assign]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = torch.zeros(())
        for part in parts(batch):
            if part is not None:
                loss = loss + (self.linear(part["x"]) - part["position"].reshape(-1, 1) / 20).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def parts(batch: Any) -> list[Any]:
    """The batches of the single loaders."""
    if isinstance(batch, dict):
        return [batch] if "x" in batch else [inner for part in batch.values() for inner in parts(part)]
    return [inner for part in batch for inner in parts(part)] if isinstance(batch, (list, tuple)) else [batch]


@dataclass
class Outcome:
    """What a fit did: the positions in its batches, what the tracker said of them, the weights at its end."""

    truth: list[list[list[int] | None]] = field(default_factory=list)  # by step, by loader
    known: list[list[list[int] | None]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class Recorder(Callback):
    def __init__(self, tracker: SampleTracker | None, every: int = 1) -> None:
        self.tracker, self.every, self.outcome = tracker, every, Outcome()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(7)  # here, because spawned processes start with random numbers of their own
        if self.tracker is not None and stage == "fit":
            self.tracker.attach(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every:
            return
        truth = [None if part is None else part["position"].reshape(-1).tolist() for part in parts(batch)]
        self.outcome.truth.append(truth)
        if self.tracker is not None:
            ids = self.tracker.pop(batch)
            rows = ids if isinstance(ids, list) else [ids]
            assert all(row is None or (row.dtype == torch.int64 and row.dim() == 1) for row in rows)
            self.outcome.known.append([None if row is None else row.tolist() for row in rows])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.outcome.weights = [value for p in pl_module.parameters() for value in p.flatten().tolist()]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.tracker is not None:
            self.tracker.detach(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.tracker is not None:
            self.tracker.detach(trainer)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(loaders: Callable[[], Any], tracker: SampleTracker | None, *, every: int = 1, **options: Any) -> Outcome:
    """One fit from the same start; `loaders` makes the loaders anew."""
    torch.manual_seed(7)
    recorder = Recorder(tracker, every)
    model = Model(loaders if options.get("reload_dataloaders_every_n_epochs") else None)
    module_brings_them = "reload_dataloaders_every_n_epochs" in options
    trainer(recorder, **options).fit(model, None if module_brings_them else loaders())
    return recorder.outcome


def loader(length: int = 22, label: int = 0, **options: Any) -> DataLoader[Sample]:
    options.setdefault("batch_size", 4)
    return DataLoader(Positions(length, label), **options)
