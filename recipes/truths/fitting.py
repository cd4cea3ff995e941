"""A plain fit by a Trainer in the batches of the retrained models, with callbacks and without Lightning's advice."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader


def plain_fit(module: LightningModule, loader: DataLoader[Any], epochs: int, callbacks: Sequence[Callback]) -> None:
    """Train on one CPU process; the loader's sampler decides the order."""
    with quiet_lightning():
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, loader)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's advice on hardware, loaders and logging, and its own use of a deprecated name."""
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for kind in (UserWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=kind, module="lightning")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
