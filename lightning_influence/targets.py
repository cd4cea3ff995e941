"""Which parameters may change: target parameters K chosen by what the layers do on data, and kept in a store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from tqdm.auto import tqdm

from lightning_influence.artifacts import Artifact, ArtifactStore
from lightning_influence.errors import CaptureError, StoreError
from lightning_influence.gradients import TargetParameters, chosen_units
from lightning_influence.gradients.target import unit_layers
from lightning_influence.objective import Objective, PerSample, training_objective
from lightning_influence.replay import TrainingData, isolated, to_device

RULES = (
    "highest_outputs",
    "highest_gradients",
    "lowest_outputs",
    "lowest_gradients",
    "largest_weights",
    "random",
)
_KIND = "target"


def choose_target(
    module: LightningModule,
    dataloader: Any = None,
    *,
    ratio: float = 0.05,
    rule: str = "highest_outputs",
    seed: int = 0,
    sample_ids: Iterable[int] | None = None,
    per_sample_loss: PerSample | None = None,
    batch_size: int | None = None,
) -> TargetParameters:
    """Target parameters K: of every Linear and convolution with a trained weight the most important output units, up to
    ⌊ratio · numel⌋ entries a layer (Lyu et al. 2023, arXiv:2312.05586; the spending is `gradients.chosen_units`').

    The importance of unit o is, by rule,

    - ``"highest_outputs"``: the mean of |output_o| over the examined samples and their positions;
    - ``"highest_gradients"``: the mean of |∂(Σ_z ℓ(z))/∂output_o| over the same;
    - ``"lowest_outputs"``, ``"lowest_gradients"``: the negative of these;
    - ``"largest_weights"``: the Euclidean norm of row o of the weight with its trained bias; no data are needed;
    - ``"random"``: drawn with the seed; no data are needed.

    The model runs in eval mode and is left as it was. Padding counts among the positions: examine with ``batch_size=1``
    to do without it.

    Args:
        module: the model at the weights that are to change, on the device where it is to run.
        dataloader: the examined data, a DataLoader of a map-style dataset.
        ratio: share of every layer, between 0 and 1.
        seed: of ``"random"``.
        sample_ids: positions in the dataset, if not all of it is to be examined.
        per_sample_loss: the training loss of one sample, as in `GradientSnapshot`.
        batch_size: samples a batch; `None` is that of the loader. Padding apart, the result does not depend on it.

    Raises:
        CaptureError: an unknown rule; samples that are not there; a layer that took no part; and as from
            `gradients.chosen_units`.
        LossError, UnsupportedError: no loss for each sample; no DataLoader, or one of a stream.
    """
    if rule not in RULES:
        raise CaptureError("unknown rule", expected=", ".join(map(repr, RULES)), found=repr(rule), hint="choose one")
    origin: dict[str, Any] = {"rule": rule, "ratio": ratio, "seed": None, "num_samples": None}
    if rule == "random":
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: torch.randperm(_units(own), generator=generator) for name, own in unit_layers(module).items()}
        return chosen_units(module, ratio, drawn, {**origin, "seed": seed})
    if rule == "largest_weights":
        norms = {name: _row_norms(own.values()) for name, own in unit_layers(module).items()}
        return chosen_units(module, ratio, norms, origin)
    data = TrainingData.of(dataloader, forked=True)
    positions = _batches(len(data), sample_ids, data.batch_size if batch_size is None else batch_size)
    gradients, sign = rule.endswith("gradients"), -1 if rule.startswith("lowest") else 1

    @cache
    def means() -> dict[str, Tensor]:  # once, and not before the ratio has been looked at
        return _mean_sizes(module, data, positions, per_sample_loss, gradients=gradients)

    origin["num_samples"] = sum(map(len, positions))
    return chosen_units(module, ratio, lambda layer: sign * means()[layer], origin)


def record_target(store: ArtifactStore | str | os.PathLike[str], name: str, target: TargetParameters) -> None:
    """Keep K in the store of a fit that has ended, as ``targets/<name>.safetensors``, with its last checkpoint's step.
    No fit may be writing into the store meanwhile.

    Raises:
        StoreError: no store, or one without a checkpoint; a name with other characters than letters, digits, - and _,
            or one that is there already.
        CaptureError: K belongs to another model.
    """
    known = _opened(store)
    taken = recorded_targets(known)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in taken:
        raise StoreError(
            f"target parameters cannot be recorded as {name!r} in the store at {known.root}",
            expected="a new name of letters, digits, - and _",
            found=f"target parameters of the names {', '.join(taken)}" if name in taken else repr(name),
            hint="choose another name; what is recorded never changes",
        )
    target.check({parameter: spec.shape for parameter, spec in known.manifest.parameters.items()})
    if not known.checkpoints():
        raise StoreError(
            f"the store at {known.root} has no checkpoint, whose weights the target parameters would belong to",
            expected="at least one",
            found="none",
            hint="let the fit reach its first checkpoint",
        )
    at = known.checkpoints()[-1]
    meta: dict[str, Any] = {
        "shapes": [[parameter, list(shape)] for parameter, shape in target.shapes.items()],
        "origin": target.origin,
    }
    writable = ArtifactStore.resume(known.root, known.manifest, mark=None)
    path = f"targets/{name}.safetensors"
    writable.commit(writable.write(_KIND, path, target.masks, step=at.step, mark=at.mark, meta=meta))


def recorded_target(store: ArtifactStore | str | os.PathLike[str], name: str) -> TargetParameters:
    """K as `record_target` kept it.

    Raises:
        StoreError: no store, nothing of this name (those that there are are listed), or a damaged file.
    """
    known = _opened(store)
    files = _files(known)
    if name not in files:
        raise StoreError(
            f"the store at {known.root} has no target parameters {name!r}",
            expected=f"one of {', '.join(map(repr, files))}" if files else "target parameters that were recorded",
            found=repr(name) if files else "none of any name",
            hint="record them first: record_target(store, name, choose_target(module, dataloader))",
        )
    tensors, meta = known.tensors(files[name]), dict[str, Any](files[name].meta)
    try:
        target = TargetParameters(tensors, {n: tuple(shape) for n, shape in meta["shapes"]}, {**meta["origin"]})
        target.check({parameter: spec.shape for parameter, spec in known.manifest.parameters.items()})
    except (KeyError, TypeError, ValueError, CaptureError) as error:
        raise StoreError(
            f"{known.root / files[name].path} does not describe target parameters of this store's model",
            expected="the masks and facts that record_target wrote",
            found=f"{type(error).__name__}: {error}",
            hint="restore the file from a copy of the store, or read it with the version of the library that wrote it",
        ) from error
    return target


def recorded_targets(store: ArtifactStore | str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the target parameters that a store holds, sorted."""
    return tuple(_files(_opened(store)))


def _opened(store: ArtifactStore | str | os.PathLike[str]) -> ArtifactStore:
    return store if isinstance(store, ArtifactStore) else ArtifactStore.open(store)


def _files(store: ArtifactStore) -> dict[str, Artifact]:
    named = {file.path.rpartition("/")[2].removesuffix(".safetensors"): file for file in store.artifacts(_KIND)}
    return dict(sorted(named.items()))


def _units(parameters: Mapping[str, Tensor]) -> int:
    return len(next(iter(parameters.values())))


def _row_norms(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norms of the rows of several parameters side by side, (out,)."""
    rows = [parameter.detach().double().reshape(len(parameter), -1) for parameter in parameters]
    return torch.cat(rows, 1).square().sum(1).sqrt()


def _batches(length: int, sample_ids: Iterable[int] | None, batch_size: int) -> list[Sequence[int]]:
    """Positions of the examined samples, batch by batch."""
    ids: Sequence[int] = range(length) if sample_ids is None else [int(position) for position in sample_ids]
    if batch_size < 1 or not ids or min(ids) < 0 or max(ids) >= length:
        raise CaptureError(
            "these samples cannot be examined",
            expected=f"one or more positions in a dataset of {length}, and a batch_size of 1 or more",
            found=f"{len(ids)} positions{f', from {min(ids)} to {max(ids)}' if ids else ''}; batch_size={batch_size}",
            hint="sample ids are positions in the dataset of the loader",
        )
    return [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]


class _Listener:
    """Sums of the absolute values of the layers' outputs, or of the gradients at them, unit by unit."""

    def __init__(self, *, gradients: bool) -> None:
        self._gradients = gradients
        self._edges: list[tuple[str, int, GradientEdge]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def hook(self, layer: str, axis: int) -> Callable[[nn.Module, Any, Any], Any]:
        """A forward hook for the layer, whose units are along `axis` of its (first) output."""

        def heard(called: nn.Module, args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            if not self._gradients:
                self._add(layer, axis, value.detach())
            elif value.requires_grad:
                value = value.clone() if value._is_view() else value  # what is done to a view in place would bypass it
                self._edges.append((layer, axis, get_gradient_edge(value)))
                return (value, *output[1:]) if isinstance(output, tuple) else value
            return None

        return heard

    def backward(self, total: Tensor) -> None:
        """Take in ∂total/∂output for the calls since the last time; no `.grad` is touched."""
        calls = tuple(self._edges)
        if calls and total.requires_grad:
            found = torch.autograd.grad(total, [edge for *_, edge in calls], allow_unused=True)
            for (layer, axis, _), gradient in zip(calls, found, strict=True):
                if gradient is not None:
                    self._add(layer, axis, gradient)
        self._edges.clear()  # with those of parts that activation checkpointing has run again

    def means(self, layers: Iterable[str], num_samples: int) -> dict[str, Tensor]:
        """By layer, (out,) float64; CaptureError for a layer that took no part."""
        for layer in layers:
            if layer not in self._sums:
                raise CaptureError(
                    f"layer {layer!r} has no {'gradient' if self._gradients else 'output'} to be judged by",
                    expected="a layer that is called" + (" and that the loss depends on" if self._gradients else ""),
                    found=f"none in {num_samples} samples",
                    hint="freeze the layer (requires_grad_(False)) to leave it out, choose with rule='largest_weights' "
                    "or 'random', or examine more samples",
                )
        return {layer: (self._sums[layer] / self._counts[layer]).cpu() for layer in layers}

    def _add(self, layer: str, axis: int, values: Tensor) -> None:
        rows = values.movedim(axis, -1).flatten(0, -2) if values.ndim > 1 else values[None]  # (positions, out)
        found = rows.abs().sum(0, dtype=torch.float64)
        self._sums[layer] = self._sums[layer] + found if layer in self._sums else found
        self._counts[layer] = self._counts.get(layer, 0) + len(rows)


def _mean_sizes(
    module: LightningModule,
    data: TrainingData,
    positions: Sequence[Sequence[int]],
    per_sample_loss: PerSample | None,
    *,
    gradients: bool,
) -> dict[str, Tensor]:
    """The mean of |output| or of |∂(Σ_z ℓ(z))/∂output| over samples, positions and calls, by layer (out,)."""
    layers, count = unit_layers(module), sum(map(len, positions))
    # A MultiheadAttention never calls its output projection as a module, and returns what that puts out.
    callers: dict[nn.Module, nn.Module] = {
        part.out_proj: part for part in module.modules() if isinstance(part, nn.MultiheadAttention)
    }
    listener = _Listener(gradients=gradients)
    bar = tqdm(total=count, desc="target parameters", unit="sample", delay=2.0, leave=False)
    batches = data.batches(positions)
    with isolated(module) as manual_losses, closing(batches), bar, ExitStack() as hooks:
        for name, own in layers.items():
            layer, weight = module.get_submodule(name), next(iter(own.values()))
            heard = listener.hook(name, 1 - weight.ndim)  # (..., out), (..., out, L), (..., out, H, W), ...
            hooks.callback(callers.get(layer, layer).register_forward_hook(heard).remove)
        for ids, batch in zip(positions, batches, strict=True):
            placed = to_device(batch, module, None)
            found = training_objective(
                module, placed, len(ids), per_sample_loss=per_sample_loss, manual_losses=manual_losses
            )
            if gradients:
                listener.backward(_summed(found))
            bar.update(len(ids))
    return listener.means(layers, count)


def _summed(found: Objective) -> Tensor:
    """Σ_z ℓ(z) of a batch, whether `training_step` takes a mean or, by its one loss call, that sum."""
    call = found.call
    is_sum = found.losses is None and call is not None and call.reduction == "sum"
    return found.total if is_sum and call is not None and torch.equal(found.total, call.output) else found.summed()
