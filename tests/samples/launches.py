"""Fits on two gloo processes over several loaders at once, each rank writing what it saw (test_distributed.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler, Subset, WeightedRandomSampler

from lightning_influence.samples import SampleTracker
from tests.samples.harness import Model, Positions, Recorder, loader, trainer


class OddFirst(Sampler[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return iter([*range(1, self.length, 2), *range(0, self.length, 2)])

    def __len__(self) -> int:
        return self.length


class Reversed(BatchSampler):
    def __iter__(self) -> Any:
        return (batch[::-1] for batch in super().__iter__())


class Writing(Recorder):
    def __init__(self, path: str, tracked: bool) -> None:
        super().__init__(SampleTracker() if tracked else None)
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        Path(f"{self.path}-rank{trainer.global_rank}.json").write_text(json.dumps(vars(self.outcome)))


def distributed() -> CombinedLoader:
    """Lightning puts its distributed samplers into all of these."""
    return CombinedLoader(
        {
            "shuffled": loader(19, shuffle=True),
            "workers": loader(19, shuffle=True, num_workers=1, multiprocessing_context="fork"),
            "sampler": DataLoader(Positions(19), batch_size=4, sampler=OddFirst(19)),
            "batch sampler": DataLoader(
                Positions(), batch_sampler=Reversed(SequentialSampler(Positions()), 4, drop_last=False)
            ),
            "weighted": DataLoader(Positions(19), 3, sampler=WeightedRandomSampler([1.0, 2.0] * 9 + [1.0], 19)),
            "subset": [DataLoader(Subset(Positions(), range(20)), batch_size=3, shuffle=True, drop_last=True)],
        },
        "max_size_cycle",
    )


def undistributed() -> Any:
    return [DataLoader(Positions(), batch_sampler=[[3, 1], [2, 0, 5], [4]]), loader(9, num_workers=1)]


def fit(strategy: str, path: str, tracked: bool, distribute: bool) -> None:
    options: dict[str, Any] = {"strategy": strategy, "devices": 2, "use_distributed_sampler": distribute}
    if distribute:
        options |= {"reload_dataloaders_every_n_epochs": 1, "accumulate_grad_batches": 2}
    torch.manual_seed(7)
    model = Model(distributed) if distribute else Model()
    trainer(Writing(path, tracked), **options).fit(model, None if distribute else undistributed())


if __name__ == "__main__":
    folder = sys.argv[1]
    for launch in sys.argv[2:]:
        strategy, what, how = launch.split(":")
        fit(strategy, f"{folder}/{strategy}-{what}-{how}", how == "tracked", what == "distributed")
