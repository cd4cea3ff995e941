"""How far to go along an edit: the step that does best on held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import ConcatDataset, Subset
from tqdm.auto import tqdm

from lightning_influence.edits.soundness import trainer_at_hand
from lightning_influence.errors import QueryError
from lightning_influence.objective import PerSample, Reduction, training_objective
from lightning_influence.replay import TrainingData, isolated, walk

Criterion = Callable[[LightningModule], float]

_BETWEEN = 3  # steps tried on either side of the best of the given ones, up to its neighbours
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


@dataclass(frozen=True)
class LineSearch:
    """What a line search found.

    Attributes:
        step: the best step.
        value: the criterion there, higher is better.
        curve: (step, value) of every step that was tried, ascending.
    """

    step: float
    value: float
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Standing:
    """How a model does on some samples.

    Attributes:
        loss: mean training loss.
        accuracy: share of the samples whose label has the largest score; `None` where the loss does not tell.
    """

    loss: float
    accuracy: float | None


def search(apply: Callable[[float], LightningModule], criterion: Criterion, steps: Sequence[float]) -> LineSearch:
    """Try every step, then a few between the best one's neighbours; of equal values the smallest step wins.

    Raises:
        QueryError: no steps, or a criterion that is NaN for all of them.
    """
    curve: dict[float, float] = {}

    def tried(more: Sequence[float]) -> float:
        for step in tqdm(more, desc="line search", unit="step", delay=2.0, leave=False):
            curve[step] = float(criterion(apply(step)))
        told = [(value, -step) for step, value in curve.items() if value == value]
        if not told:
            raise QueryError(
                "no step of the line search could be judged",
                expected="steps, and a criterion that is a number for one of them",
                found=f"{len(curve)} steps, all NaN" if curve else "no steps",
                hint="look at the validation data and at criterion=",
            )
        return -max(told)[1]

    coarse = sorted({float(step) for step in steps})
    place = coarse.index(tried(coarse))
    ends = coarse[max(place - 1, 0) : place + 2]
    between = [a + (b - a) * part / (_BETWEEN + 1) for a, b in pairwise(ends) for part in range(1, _BETWEEN + 1)]
    best = tried(between)
    return LineSearch(best, curve[best], tuple(sorted(curve.items())))


def standing(
    module: LightningModule, loader: Any, per_sample_loss: PerSample | None = None, reduction: Reduction = "mean"
) -> Standing:
    """Mean loss and accuracy of a module on the samples of a loader, without a trace."""
    data = TrainingData.of(loader, forked=True)
    total, right, known = 0.0, 0.0, True
    with torch.inference_mode(False), trainer_at_hand(module), isolated(module) as manual_losses:
        for ids, batch in walk(data, [range(len(data))], module):
            found = training_objective(
                module,
                batch,
                len(ids),
                per_sample_loss=per_sample_loss,
                reduction=reduction,
                manual_losses=manual_losses,
            )
            total += float(found.summed().detach())
            margins = found.dynamics().get("margin")
            known = known and margins is not None
            right += 0.0 if margins is None else float((margins > 0).sum())
    if not len(data):
        raise QueryError("there are no held-out samples", expected="samples", found="none", hint="look at the loader")
    return Standing(total / len(data), right / len(data) if known else None)


def keeping(loader: Any, per_sample_loss: PerSample | None, reduction: Reduction) -> Criterion:
    """The negative mean loss on what is to be answered well."""
    return lambda module: -standing(module, loader, per_sample_loss, reduction).loss


def keeping_and_forgetting(
    keep: Any, forget: Any, per_sample_loss: PerSample | None, reduction: Reduction
) -> Criterion:
    """F1 = 2 (1 − a_t) a_r / (1 − a_t + a_r) of the accuracies on what is to be kept (a_r) and to be forgotten (a_t)
    (Lyu et al. 2023).

    Raises:
        QueryError: a loss that tells no accuracy.
    """

    def criterion(module: LightningModule) -> float:
        kept, target = (standing(module, loader, per_sample_loss, reduction).accuracy for loader in (keep, forget))
        if kept is None or target is None:
            raise QueryError(
                "the loss does not tell an accuracy",
                expected="cross-entropy over classes",
                found="another loss",
                hint="pass criterion=, a function module -> float, higher is better",
            )
        return removal_f1(target, kept)

    return criterion


def removal_f1(target_accuracy: float, retained_accuracy: float) -> float:
    """Harmonic mean of what was lost of the removed samples and kept of the others: 2(1 − a_t)a_r / (1 − a_t + a_r)
    (Lyu et al. 2023, arXiv:2312.05586)."""
    lost = 1 - target_accuracy
    return 2 * lost * retained_accuracy / (lost + retained_accuracy) if lost + retained_accuracy else 0.0


def refuse_training_set(loader: Any, fingerprints: Sequence[str]) -> None:
    """Refuse to pick a step on the samples that were trained on: the training set, a subset of it, or a concatenation
    with it. That two subsets of one larger dataset overlap is not seen.

    Raises:
        QueryError: the loader's samples are of the training set.
    """
    data = TrainingData.of(loader, forked=True)
    if any(replace(data, dataset=part).fingerprint() in fingerprints for part in _drawn_from(data.dataset, None)):
        raise QueryError(
            "a step is picked on samples that were held out of training",
            expected="a validation set",
            found="the training set itself, or samples of it",
            hint="pass a loader of samples that the model has not seen, and that no result is reported on",
        )


def _drawn_from(dataset: Any, positions: Sequence[int] | None) -> Iterator[Any]:
    """A dataset, and the datasets that the given ones of its samples (`None` is all) lie in."""
    yield dataset
    wanted = range(len(dataset)) if positions is None else positions
    if isinstance(dataset, Subset):
        if len(wanted):
            yield from _drawn_from(dataset.dataset, [int(dataset.indices[i]) for i in wanted])
    elif isinstance(dataset, ConcatDataset):
        ends = dataset.cumulative_sizes
        for start, end, each in zip([0, *ends], ends, dataset.datasets, strict=False):
            if inside := [i - start for i in wanted if start <= i < end]:
                yield from _drawn_from(each, inside)
