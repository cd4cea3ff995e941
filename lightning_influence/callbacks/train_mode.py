"""In flight a module runs in train mode, which the self-check does not see: warnings if that couples samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_influence.gradients import GradientCapture, Gradients, Selection
from lightning_influence.objective import step_objective
from lightning_influence.replay import TrainingData, isolated, sample_gradients, to_device
from lightning_influence.self_check import SelfCheck, full_precision, reaches_selection

_SAME = 0.01  # relative distance of a row from itself beside other samples, far more than rounding makes
_SAME_IN_HALF = 0.2


def warn_of_train_mode(
    who: str, module: LightningModule, selection: Selection, check: SelfCheck, data: TrainingData, trainer: Trainer
) -> None:
    """Warn where the samples of a batch meet in train mode alone: by batch normalisation, or by mixing of the user's.

    For the latter the rows of some samples are compared with themselves beside other samples, under the same random
    numbers: dropout and noise stay what they are, mixup and the like do not. PyTorch's own modules stay in eval mode.
    `who`: the callback that is told of.
    """
    normalised = [name for name, part in module.named_modules() if isinstance(part, _BatchNorm)]
    if normalised:
        rank_zero_warn(
            f"{who}(mode='in_flight') sees '{normalised[0]}' in train mode, where batch normalisation mixes "
            "the samples of a batch: rows are the parts of the batch gradient, not gradients of single samples. "
            "HINT: mode='replay' runs in eval mode."
        )
    try:
        distance = _distance(module, selection, check, data, trainer)
    except Exception:  # a module may well do in train mode what cannot be repeated; then nothing is known
        return
    if distance > (_SAME if full_precision(trainer) else _SAME_IN_HALF):
        rank_zero_warn(
            f"{who}(mode='in_flight'): in train mode training_step mixes the samples of a batch (a row "
            f"changes by {distance:.0%} with the other samples), as mixup does: rows are the parts of the batch "
            "gradient, not gradients of single samples. HINT: mode='replay' runs in eval mode."
        )


def _distance(
    module: LightningModule, selection: Selection, check: SelfCheck, data: TrainingData, trainer: Trainer
) -> float:
    """Largest relative change of a row as the samples beside it change, in train mode; 0 with one sample."""
    count = check.num_samples
    if count < 3:
        return 0.0
    length = count if data.length is None else data.length
    positions = [i * (length - 1) // (count - 1) for i in range(count)]
    with isolated(module, trainer):
        size, batches, _ = replace(data, collate=_BesideOthers(data.collate)).alone(positions, ())
    (first, _), *others = batches
    rows = _rows(module, selection, check, first, size, trainer)
    own, largest = _products(rows, rows), 0.0
    for batch, kept in others:
        if _shapes(batch) != _shapes(first):
            continue  # random numbers are drawn by shape
        beside = _rows(module, selection, check, batch, size, trainer)
        squared = (own + _products(beside, beside) - 2 * _products(rows, beside)).clamp(min=0)
        relative = squared / own.clamp(min=max(1e-4 * float(own.mean()), 1e-30))
        largest = max(largest, float(relative[kept::2].max()) ** 0.5)
    return largest


def _shapes(batch: object) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def _products(a: Gradients, b: Gradients) -> Tensor:
    """Inner products of two batches' rows, one by one, over all parameters: (N,)."""
    return torch.stack([a[name].pairwise(b[name]).double().cpu() for name in a]).sum(0)


def _rows(
    module: LightningModule, selection: Selection, check: SelfCheck, batch: object, size: int, trainer: Trainer
) -> Gradients:
    capture = GradientCapture(selection, functional=check.functional)
    with isolated(module, trainer) as manual_losses:
        for part in module.modules():
            part.training = not type(part).__module__.startswith("torch.nn.")
        torch.manual_seed(0)
        meant = reaches_selection(selection, capture)
        placed = to_device(batch, module, trainer)
        rows, _ = sample_gradients(
            module,
            capture,
            size,
            lambda: step_objective(module, placed, size, manual_losses=manual_losses, meant=meant),
            trainer,
        )
    return rows


@dataclass(frozen=True)
class _BesideOthers:
    """Collates samples as they are, and so that those at the even or the odd places have others beside them.

    Half are replaced by copies of the other half, one way and the other, since only one of them need keep the longest
    sample and with it the batch's shape; and half change places among themselves, which always keeps it.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> list[tuple[Any, int]]:
        """Batches, and where the samples begin (0 or 1, then every second one) that are the first batch's."""
        even, odd = samples[::2], samples[1::2]
        evens, odds, turned = list(samples), list(samples), list(samples)
        evens[1::2] = even[: len(odd)]
        odds[::2] = [*odd, *odd][: len(even)]
        turned[1::2] = [*odd[1:], *odd[:1]]
        return [(self.collate(each), kept) for each, kept in ((samples, 0), (evens, 0), (odds, 1), (turned, 0))]
