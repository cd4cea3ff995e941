"""What is written after the fit: a curvature at the weights of a checkpoint, or a store for a run without callbacks."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import DoublePrecision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint, ParameterGroup
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
from lightning_influence.fitted import check_model, check_training_data, header, weights_at
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


def link_checkpoint(
    module: LightningModule,
    store: str | os.PathLike[str],
    train_loader: Any,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    statistics: CurvatureStatistics | str | None = "ekfac",
    weight_decay: float = 0.0,
    parameters: str | Sequence[str] = "all",
    labels: Labels | None = None,
    at_most: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    per_sample_loss: PerSample | None = None,
) -> ArtifactStore:
    """A store for a run that was trained elsewhere, from its weights and its training data: no training is needed. It
    is what `StageLinker(pretrain=...)` and `InfluenceModule` take. The module is left as it was.

    Args:
        module: of the architecture that was trained.
        store: a new or empty folder.
        train_loader: the data that it was trained on; sample ids are positions in its dataset.
        checkpoint: a Lightning checkpoint, a file of a state_dict (torch's or safetensors), a state_dict; `None` takes
            the weights that the module has. Files are read without executing anything.
        statistics: the curvature to estimate at once; `None` leaves it to `add_curvature`, or to `MatrixFree()`.
        weight_decay: of the training, as its SGD or Adam had it: the factor of θ beside the gradient of what
            `training_step` returns.
        parameters, labels, at_most, seed, batch_size, per_sample_loss: as in `CurvatureSnapshot`.

    Returns:
        The store. Its learning rates are not known: TracIn counts them as 1.

    Raises:
        StoreError: a folder that is not empty; weights that do not fit the module, or cannot be read.
        CurvatureError, CaptureError, LossError, UnsupportedError: as from `CurvatureSnapshot`.
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)) or not 0 <= weight_decay < 1e300:
        raise UnsupportedError(
            "this is no weight decay",
            expected="a number, 0 or more",
            found=repr(weight_decay),
            hint="pass the optimizer's weight_decay",
        )
    if not isinstance(store, (str, os.PathLike)):
        raise UnsupportedError(
            "the store is to be a new folder", expected="a str or a Path", found=repr(store), hint="pass a path"
        )
    chosen = None if statistics is None else statistics_of(statistics)
    if chosen is not None:
        refuse_labels(chosen, labels)
    _check_arguments(labels, seed, at_most=at_most, batch_size=batch_size)
    data = TrainingData.of(train_loader, forked=True)
    own = {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    made: ArtifactStore | None = None
    try:
        if checkpoint is not None:
            _load(module, _weights_of(checkpoint), checkpoint)
        check = self_check(module, select(module, parameters), _in_precision(data, module), None, per_sample_loss)
        manifest = header(module, len(data), data.fingerprint(), reduction=check.reduction)
        made = ArtifactStore.create(store, manifest)
        names = tuple(name for name, p in module.named_parameters() if p.requires_grad)
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        group = ParameterGroup("elsewhere", 0, names, 1.0, 1.0, {"weight_decay": float(weight_decay)})
        made.commit_checkpoint(Checkpoint(0, 0, 0, (group,)), made.write_weights(0, 0, module.state_dict(), frozen))
        if chosen is not None:
            add_curvature(
                module, made, train_loader, chosen, parameters=parameters, labels=labels, at_most=at_most,
                seed=seed, batch_size=batch_size, per_sample_loss=per_sample_loss,
            )  # fmt: skip
    except BaseException:
        if made is not None:
            shutil.rmtree(made.root)  # it was empty or new: the same call can be made again
        raise
    finally:
        module.load_state_dict(own, strict=False)
    return ArtifactStore.open(store)


def _weights_of(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """A state_dict, from wherever it is."""
    if isinstance(checkpoint, Mapping):
        found: Any = checkpoint
    else:
        try:
            path = Path(checkpoint)
            safe = path.suffix == ".safetensors"
            found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, TypeError, ValueError, EOFError, SafetensorError, pickle.PickleError) as error:
            raise StoreError(
                f"{checkpoint} cannot be read as a checkpoint",
                expected="a Lightning checkpoint, or a state_dict as torch.save or safetensors write it, of tensors "
                "and plain values alone",
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                hint="a file with objects in it is not read, since that would execute them: load it yourself and pass "
                "its state_dict",
            ) from error
    inner = found.get("state_dict") if isinstance(found, Mapping) else None
    found = inner if isinstance(inner, Mapping) else found
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise StoreError(
            "this checkpoint holds no weights",
            expected='a state_dict, or a dictionary with one as "state_dict"',
            found=type(found).__name__,
            hint="pass module.state_dict(), or the file that Trainer.save_checkpoint wrote",
        )
    return found


def _load(module: LightningModule, weights: Mapping[str, Any], checkpoint: object) -> None:
    """Put the weights into the module, all of its parameters."""
    where = "the checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    try:
        wrong = [name for name in module.load_state_dict(weights, strict=False).missing_keys]
        problem = f"nothing for {', '.join(wrong[:5])}" if wrong else None
    except RuntimeError as error:  # shapes that differ
        problem = str(error)
    if problem is not None:
        raise StoreError(
            f"the weights in {where} do not fit {type(module).__name__}",
            expected="all of its parameters and buffers, by its names",
            found=problem,
            hint="pass the module that was trained, with its hyper-parameters, or rename the entries of the state_dict",
        )


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
