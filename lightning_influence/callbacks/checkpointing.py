"""A checkpoint of a fit in the store: weights, the rates that led to them, and the optimizer's denominators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_influence.artifacts import Artifact, ArtifactStore, Checkpoint
from lightning_influence.callbacks.optimizer_record import OptimizerRecord, denominators
from lightning_influence.fitted import weights_at


def write_checkpoint(
    store: ArtifactStore, trainer: Trainer, module: LightningModule, rates: OptimizerRecord, *, epoch: int, mark: int
) -> tuple[Checkpoint, list[Artifact]]:
    """Write the present weights (rank zero); returns the checkpoint and its files, neither committed yet."""
    step = trainer.global_step
    files: list[Artifact] = []
    if trainer.is_global_zero:
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        files = store.write_weights(step, mark, module.state_dict(), frozen)
        scales = denominators(trainer.optimizers, module)
        if scales:
            files.append(store.write_preconditioner(step, mark, scales))
    return Checkpoint(step, epoch, mark, rates.groups(trainer.optimizers, module)), files


def commit_checkpoint(
    store: ArtifactStore, trainer: Trainer, rates: OptimizerRecord, checkpoint: Checkpoint, files: list[Artifact]
) -> None:
    """Make the checkpoint exist once every rank has committed its files, and begin new sums of rates."""
    trainer.strategy.barrier("influence-shards")
    if trainer.is_global_zero:
        store.commit_checkpoint(checkpoint, files)
    trainer.strategy.barrier("influence-checkpoint")
    rates.restart()


@contextmanager
def as_stored(store: ArtifactStore, module: LightningModule, checkpoint: Checkpoint) -> Iterator[None]:
    """The module as the checkpoint has it, should it have changed since that was written: by weight averaging, or by a
    hook that ran after the step. It is put back on the way out."""
    now = module.state_dict()
    moved = [n for n, value in store.weights(checkpoint).items() if n in now and not torch.equal(now[n].cpu(), value)]
    if not moved:
        yield
        return
    rank_zero_warn(
        f"'{moved[0]}' has changed since the checkpoint of optimizer step {checkpoint.step} was written, by weight "
        "averaging or a hook: the curvature is that of the checkpoint. HINT: give CurvatureSnapshot its own folder: "
        "there the last checkpoint has the weights of the end."
    )
    with weights_at(module, store, checkpoint):
        yield
