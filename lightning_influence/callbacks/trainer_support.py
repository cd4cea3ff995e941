"""What the callbacks ask of a Trainer: a strategy they can serve, one folder, one loader, plain hyper-parameters."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lightning_influence.errors import UnsupportedError

_TRIALS: WeakKeyDictionary[Trainer, dict[str, Path]] = WeakKeyDictionary()  # given folder -> that of a fast_dev_run


def refuse_strategy(trainer: Trainer) -> None:
    """UnsupportedError for strategies that shard parameters: no process holds the whole gradient of a layer there."""
    served = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if not served or isinstance(trainer.strategy, DeepSpeedStrategy):  # DeepSpeed calls itself a kind of DDP
        raise UnsupportedError(
            "this strategy is not served",
            expected="a single device, or ddp / ddp_fork / ddp_spawn",
            found=type(trainer.strategy).__name__,
            hint="fit with strategy='ddp', or save checkpoints and replay them afterwards on one device",
        )


def shared_folder(trainer: Trainer, folder: str | Path | None) -> Path:
    """The folder of rank zero on every rank: `folder`, or `influence` below the Trainer's log directory.

    A `fast_dev_run` gets a temporary one, so that the real run finds its folder empty; callbacks that share a folder
    share that one too.
    """
    if not getattr(trainer, "fast_dev_run", False):
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "influence" if folder is None else folder
        return Path(trainer.strategy.broadcast(str(folder)))
    chosen = str(trainer.strategy.broadcast(str(folder)))
    trials = _TRIALS.setdefault(trainer, {})
    if chosen not in trials:
        trials[chosen] = Path(trainer.strategy.broadcast(tempfile.mkdtemp(prefix="influence-")))
    return trials[chosen]


def the_loader(trainer: Trainer, mode: str) -> Any:
    """The Trainer's one training loader.

    Raises:
        UnsupportedError: there are several.
    """
    loader = trainer.train_dataloader
    while isinstance(loader, (list, tuple, dict)) and len(loader) == 1:
        loader = next(iter(loader.values() if isinstance(loader, dict) else loader))
    if isinstance(loader, (list, tuple, dict)):
        raise UnsupportedError(
            f"mode='{mode}' attributes to one training set",
            expected="one training loader",
            found=f"{len(loader)} loaders",
            hint="pass the one whose samples are to be attributed as `dataloader=` of the callback",
        )
    return loader


def hyper_parameters(module: LightningModule) -> dict[str, Any] | None:
    """The module's saved hyper-parameters where they are plain JSON, so that a query can rebuild it; else `None`."""
    saved = dict(module.hparams) if module.hparams else {}
    plain: dict[str, Any] = {}
    for name, value in saved.items():
        try:
            plain[str(name)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            return None
    return plain
