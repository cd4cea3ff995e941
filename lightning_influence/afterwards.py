"""What is added to a store after the fit: a curvature at the weights of one of its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import DoublePrecision

from lightning_influence.artifacts import ArtifactStore, Checkpoint
from lightning_influence.curvature import (
    CurvatureStatistics,
    TrainingEvidence,
    refuse_labels,
    statistics_of,
    weight_decay_at,
    write_curvature,
)
from lightning_influence.curvature.rehearsal import rehearse
from lightning_influence.errors import QueryError, StoreError, UnsupportedError
from lightning_influence.fitted import check_model, check_training_data, weights_at
from lightning_influence.gradients import select
from lightning_influence.objective import Labels, PerSample
from lightning_influence.replay import TrainingData
from lightning_influence.self_check import self_check


def add_curvature(
    module: LightningModule,
    store: str | os.PathLike[str] | ArtifactStore,
    train_loader: Any,
    statistics: CurvatureStatistics | str = "ekfac",
    *,
    at: Checkpoint | None = None,
    parameters: str | Sequence[str] = "all",
    labels: Labels | None = None,
    at_most: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    per_sample_loss: PerSample | None = None,
) -> None:
    """Estimate a curvature at the weights of a checkpoint and write it into the store of a fit that has ended: bit for
    bit what `CurvatureSnapshot` writes during the fit, on one device and in full precision. The module is left as it
    was. No fit may be writing into the store meanwhile.

    Args:
        module: the module that was fitted, on the device where the walk is to run; its weights do not matter.
        store: its store, or the folder of that.
        train_loader: the training data that were fitted.
        statistics, parameters, labels, at_most, seed, batch_size, per_sample_loss: as in `CurvatureSnapshot`.
        at: the checkpoint, one of `store.checkpoints()`; `None` is the last.

    Raises:
        StoreError: no store, one of another model or dataset, or one that has this curvature already.
        QueryError: the store has no checkpoint.
        CurvatureError, CaptureError, LossError, UnsupportedError: as from `CurvatureSnapshot`.
    """
    chosen = statistics_of(statistics)
    refuse_labels(chosen, labels)
    _check_arguments(labels, seed, at_most=at_most, batch_size=batch_size)
    known = store if isinstance(store, ArtifactStore) else ArtifactStore.open(store)
    check_model(module, known)
    check_training_data(train_loader, known)
    at = _checkpoint(known, at, chosen.name)
    selection = select(module, parameters)
    data = _in_precision(TrainingData.of(train_loader, forked=True), module)
    with weights_at(module, known, at):
        check = self_check(module, selection, data, None, per_sample_loss)
        summed = data.batch_size if check.reduction == "sum" else 1
        decay = weight_decay_at(known, at, selection.names, summed_over=summed)
        evidence = TrainingEvidence(
            module,
            selection,
            data,
            labels=labels,
            seed=seed,
            at_most=at_most,
            batch_size=batch_size,
            per_sample_loss=per_sample_loss,
            reduction=check.reduction,
            decay=decay,
        )
        size, _ = rehearse(chosen, evidence)
        known.require_free(size, f"the curvature {chosen.name!r}", "fewer parameters, statistics='diagonal'")
        curvature = chosen.collect(evidence)
    writable = ArtifactStore.resume(known.root, known.manifest, mark=None)
    write_curvature(writable, at, chosen, curvature, evidence, decay)


@dataclass(frozen=True)
class _InDouble:
    """Collates samples and turns their numbers into float64, as a Trainer with precision="64-true" does."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> Any:
        return DoublePrecision().convert_input(self.collate(samples))


def _in_precision(data: TrainingData, module: LightningModule) -> TrainingData:
    """The training data in the precision of the module, if that is double."""
    double = all(p.dtype == torch.float64 for p in module.parameters() if p.is_floating_point())
    return replace(data, collate=_InDouble(data.collate)) if double else data


def _check_arguments(labels: object, seed: object, **positive: object) -> None:
    if labels not in (None, "exact", "sampled", "observed"):
        raise UnsupportedError(
            "unknown labels", expected='"exact", "sampled", "observed" or None', found=repr(labels), hint="choose one"
        )
    for name, value in {"seed": seed, **positive}.items():
        least = 0 if name == "seed" else 1
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and (value is not None or name == "seed"):
            raise UnsupportedError(
                f"{name} must be a whole number",
                expected=f"an int >= {least}",
                found=repr(value),
                hint=f"pass {name}={least} or more",
            )


def _checkpoint(store: ArtifactStore, at: Checkpoint | None, name: str) -> Checkpoint:
    """The checkpoint that is meant, which must not have the curvature yet."""
    known = {checkpoint.step: checkpoint for checkpoint in store.checkpoints()}
    if not known:
        raise QueryError(
            "the store holds no checkpoint, at whose weights a curvature could be estimated",
            expected="at least one",
            found=str(store.root),
            hint="let the fit reach its first checkpoint",
        )
    if at is not None and known.get(at.step) != at:
        raise StoreError(
            f"the store at {store.root} has no such checkpoint",
            expected=f"one of the steps {sorted(known)}",
            found=f"step {at.step}, of another store or a fit that was begun anew",
            hint="take the checkpoint from `store.checkpoints()`",
        )
    chosen = known[max(known)] if at is None else at
    if any(file.step == chosen.step and file.meta.get("name") == name for file in store.artifacts("curvature")):
        raise StoreError(
            f"the store at {store.root} has the curvature {name!r} of step {chosen.step} already",
            expected="one of a kind at each checkpoint",
            found=f"curvature-{name}.safetensors at that checkpoint",
            hint="choose another checkpoint with at=, or other statistics",
        )
    return chosen
