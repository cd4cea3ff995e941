"""The two tasks of an image set: some of its classes to pretrain on, others to finetune on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from recipes.images.data import ImageSplits
from recipes.truths.retraining import Samples


@dataclass(frozen=True)
class Tasks:
    """Flat images (N, inputs); labels count from 0 in each task.

    Args:
        pretraining: what the first run is trained on.
        finetuning: what the second run is trained on.
        validation: of the finetuning task, where something is chosen.
        test: of the finetuning task, where a result is measured.
        classes: number of classes of either task.
    """

    pretraining: Samples
    finetuning: Samples
    validation: Samples
    test: Samples
    classes: tuple[int, int]

    @property
    def inputs(self) -> int:
        """Pixels of an image."""
        return self.pretraining.inputs.shape[1]


def tasks(
    images: ImageSplits,
    *,
    pretraining: Sequence[int],
    finetuning: Sequence[int],
    pretraining_size: int | None = None,
    finetuning_size: int | None = None,
    pooled: int = 1,
) -> Tasks:
    """Cut an image set by its classes.

    Args:
        images: all of them.
        pretraining: classes of the first task, in the order of its labels.
        finetuning: classes of the second one.
        pretraining_size: the first so many training images of these classes; None takes all.
        finetuning_size: likewise.
        pooled: average squares of so many pixels a side into one.
    """

    def of(samples: Samples, classes: Sequence[int], size: int | None = None) -> Samples:
        labels = torch.full_like(samples.labels, -1)
        for label, name in enumerate(classes):
            labels[samples.labels == name] = label
        chosen = (labels >= 0).nonzero().squeeze(1)[:size]
        if size is not None and len(chosen) < size:
            raise ValueError(f"Expected {size} images of the classes {list(classes)}, found {len(chosen)}.")
        smaller = F.avg_pool2d(samples.inputs[chosen], pooled)
        return Samples(smaller.flatten(1).contiguous(), labels[chosen])

    return Tasks(
        pretraining=of(images.train, pretraining, pretraining_size),
        finetuning=of(images.train, finetuning, finetuning_size),
        validation=of(images.validation, finetuning),
        test=of(images.test, finetuning),
        classes=(len(pretraining), len(finetuning)),
    )


def first(samples: Samples, count: int | None) -> Samples:
    """The first so many samples; None takes all."""
    return Samples(samples.inputs[:count], samples.labels[:count])


def tasks_of(config: Any) -> Tasks:
    """The two tasks of a configuration."""
    made: Tasks = instantiate(config.tasks, images=instantiate(config.images))
    return made


def part(samples: Samples, positions: Any) -> Samples:
    """Some of the samples, by a slice, a mask or positions."""
    return Samples(samples.inputs[positions].contiguous(), samples.labels[positions].contiguous())
