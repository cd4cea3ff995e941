"""What happens before the first step: the training data are found, the manifest is written, the store is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_influence.artifacts import UNBOUNDED, ArtifactStore, Manifest
from lightning_influence.callbacks.capture_plan import CapturePlan
from lightning_influence.callbacks.replay_recorder import shard_size
from lightning_influence.callbacks.trainer_support import hyper_parameters, the_loader
from lightning_influence.fitted import header
from lightning_influence.gradients import Selection
from lightning_influence.objective import Reduction
from lightning_influence.replay import TrainingData


def training_data(trainer: Trainer, loader: Any, mode: str, *, ids_known: bool) -> TrainingData:
    """The training set as its loader holds it now: the user's `loader`, or the Trainer's if that is `None`.

    Raises:
        UnsupportedError: several loaders, or one that cannot be looked into.
    """
    chosen = loader if loader is not None else the_loader(trainer, mode)
    return TrainingData.of(chosen, forked=True, streams=mode == "in_flight" and ids_known)


def manifest_of(
    trainer: Trainer, module: LightningModule, data: TrainingData, plan: CapturePlan, mode: str, dtype: str
) -> Manifest:
    """The header of a new store, the same on every rank."""
    size = trainer.strategy.broadcast(shard_size(plan.bytes_per_sample(), data.batch_size))
    return Manifest(
        dataset_length=UNBOUNDED if data.length is None else data.length,
        dataset_fingerprint=trainer.strategy.broadcast(data.fingerprint()),
        parameters=Manifest.describe(module.named_parameters()),
        selected=plan.selection.names,
        mode=mode,
        shard_size=size,
        dtype=dtype,
        module_class=f"{type(module).__module__}.{type(module).__qualname__}",
        hyper_parameters=hyper_parameters(module),
        settings={
            "top_words": plan.top_words,
            "reduction": plan.check.reduction,
            "look_ups": sorted(plan.selection.input_only),
            **({} if plan.projection is None else {"projection": plan.projection.record()}),
        },
    )


def curvature_manifest(
    trainer: Trainer, module: LightningModule, data: TrainingData, selection: Selection, reduction: Reduction
) -> Manifest:
    """The header of a new store that holds weights and curvature alone, the same on every rank."""
    return header(
        module,
        len(data),
        trainer.strategy.broadcast(data.fingerprint()),
        reduction=reduction,
        look_ups=selection.input_only,
        hyper_parameters=hyper_parameters(module),
    )


def open_store(trainer: Trainer, root: Path, manifest: Manifest, *, recorded: int | None) -> ArtifactStore:
    """Create the store, or go on with it after `recorded` training batches; rank zero first, then the others.

    Raises:
        StoreError: the folder holds something else, or a store of another run.
    """
    rank, world = trainer.global_rank, trainer.world_size
    store: ArtifactStore | None = None
    for turn in (True, False):
        if turn == trainer.is_global_zero:
            if recorded is None:
                store = ArtifactStore.create(root, manifest, rank)
            else:
                store = ArtifactStore.resume(root, manifest, recorded, rank, world)
        trainer.strategy.barrier("influence-open")
    assert store is not None
    return store
