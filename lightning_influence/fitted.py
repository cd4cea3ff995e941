"""What a query must have in common with the fit that wrote the store: the model, its weights and, where it is read, the
dataset."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint, Manifest
from lightning_influence.errors import QueryError, StoreError
from lightning_influence.replay import TrainingData


def header(
    module: LightningModule,
    length: int,
    fingerprint: str,
    *,
    reduction: str,
    look_ups: Collection[str] = (),
    hyper_parameters: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of a store that holds weights and curvature alone."""
    return Manifest(
        dataset_length=length,
        dataset_fingerprint=fingerprint,
        parameters=Manifest.describe(module.named_parameters()),
        selected=(),
        mode="replay",
        shard_size=max(1, length),
        dtype="float32",
        module_class=f"{type(module).__module__}.{type(module).__qualname__}",
        hyper_parameters=hyper_parameters,
        settings={"reduction": reduction, "look_ups": sorted(look_ups)},
    )


def rebuilt(kind: type[LightningModule], store: ArtifactStore) -> LightningModule:
    """The module of class `kind` with the hyper-parameters and the last weights of the store.

    Raises:
        StoreError: the store has no such hyper-parameters, or the class does not take them.
    """
    saved = store.manifest.hyper_parameters
    hint = "pass the module itself: InfluenceModule(module, store, estimator)"
    if saved is None:
        raise StoreError(
            f"{kind.__name__} cannot be rebuilt from the store",
            expected="hyper-parameters saved with save_hyperparameters(), of plain numbers, texts and lists",
            found="none",
            hint=hint,
        )
    with torch.inference_mode(False):
        try:
            module = kind(**_taken(kind, saved))
        except TypeError as error:
            raise StoreError(
                f"{kind.__name__} cannot be rebuilt from the hyper-parameters in the store",
                expected=f"arguments of {kind.__name__}: save_hyperparameters() in its __init__ keeps them",
                found=f"{saved} ({error})",
                hint=hint,
            ) from error
        check_model(module, store)
        checkpoints = store.checkpoints()
        if checkpoints:
            weights = store.weights(checkpoints[-1])
            for name, value in module.state_dict(keep_vars=True).items():
                if name in weights:  # a module that was fitted in another precision
                    value.data = value.data.to(weights[name].dtype)
            module.load_state_dict(weights, strict=False)
    return module


def _taken(kind: type[LightningModule], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved hyper-parameters that the class takes: those of a base class that saves its own too are left out."""
    takes = inspect.signature(kind).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return dict(saved)
    return {name: value for name, value in saved.items() if name in takes}


@contextmanager
def weights_at(module: LightningModule, store: ArtifactStore, checkpoint: Checkpoint) -> Iterator[None]:
    """The module has the weights of a checkpoint; its own are put back on the way out, after an exception too.

    Raises:
        StoreError: the weights do not fit the module.
    """
    with torch.inference_mode(False):
        state = module.state_dict()
        own = {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}
        try:
            load_weights(module, store.weights(checkpoint), own, store)
            yield
        finally:
            module.load_state_dict(own, strict=False)


def load_weights(
    module: LightningModule, weights: dict[str, Tensor], own: Collection[str], store: ArtifactStore
) -> None:
    """Put the weights of a checkpoint into a module whose tensors have the names `own`.

    Raises:
        StoreError: they do not fit.
    """
    try:
        result = module.load_state_dict(weights, strict=False)
        wrong = [name for name in result.missing_keys if name in own] + list(result.unexpected_keys)
        problem = f"a difference in {', '.join(wrong[:5])}" if wrong else None
    except RuntimeError as error:  # shapes that differ
        problem = str(error)
    if problem is not None:
        raise StoreError(
            f"the weights in {store.root} do not fit the module",
            expected="the parameters and buffers of the module that was fitted",
            found=problem,
            hint=f"pass the module that was fitted ({store.manifest.module_class}), with its hyper-parameters",
        )


def check_model(module: LightningModule, store: ArtifactStore) -> None:
    """Refuse a module that the store was not written with, and one that autograd cannot follow.

    Raises:
        StoreError: its parameters differ by name or shape.
        QueryError: a parameter was created under inference mode.
    """
    expected = {name: tuple(spec.shape) for name, spec in store.manifest.parameters.items()}
    found = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for name in dict.fromkeys((*expected, *found)):
        if expected.get(name) != found.get(name):
            raise StoreError(
                f"the store at {store.root} belongs to another model: parameter '{name}' differs",
                expected=f"shape {expected[name]}" if name in expected else "no such parameter",
                found=f"shape {found[name]}" if name in found else "no such parameter",
                hint=f"pass the module that was fitted ({store.manifest.module_class}), with its hyper-parameters",
            )
    for name, parameter in module.named_parameters():
        if parameter.is_inference():
            raise QueryError(
                f"parameter '{name}' was created under torch.inference_mode()",
                expected="parameters that autograd can follow",
                found="an inference tensor",
                hint="build or load the module outside inference mode",
            )


def check_training_data(loader: Any, store: ArtifactStore) -> None:
    """Refuse a loader of another training set.

    Raises:
        StoreError: another length, content or order.
        UnsupportedError: a loader that cannot be walked by position.
    """
    data, manifest = TrainingData.of(loader, forked=True), store.manifest
    if len(data) != manifest.dataset_length:
        raise StoreError(
            f"the store at {store.root} belongs to another training set",
            expected=f"{manifest.dataset_length} samples",
            found=f"{len(data)} samples",
            hint="pass the loader of the dataset that was fitted, unfiltered and in its order",
        )
    found = data.fingerprint()
    if found != manifest.dataset_fingerprint:
        raise StoreError(
            f"the store at {store.root} belongs to a training set of other content or order",
            expected=f"fingerprint {manifest.dataset_fingerprint}",
            found=f"fingerprint {found}",
            hint="pass the dataset that was fitted, in its order; sample ids are positions in it",
        )
