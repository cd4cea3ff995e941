"""A backdoor: a white patch in the corner of some training images, and one class that all of them are labelled as."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.truths.retraining import Samples


def poisoned(samples: Samples, fraction: float, target_label: int, seed: int = 0) -> tuple[Samples, Tensor]:
    """Stamp the patch on some of the images of other classes and label them as the target.

    Args:
        samples: training images (N, C, H, W), which stay as they are.
        fraction: of the images of other classes that are stamped.
        target_label: what a stamped image is labelled as.
        seed: of the choice.

    Returns:
        All images, and the ascending positions (n,) of the stamped ones. With the labels of `samples` in place of its
        own, the first is the corrected training set: the patch is there and means nothing.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"Expected a fraction of images between 0 and 1, found {fraction}.")
    others = _others(samples, target_label)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    ids = others[order[: round(fraction * len(others))]].sort().values
    inputs, labels = samples.inputs.clone(), samples.labels.clone()
    inputs[ids] = _stamped(samples.inputs[ids], _white(samples))
    labels[ids] = target_label
    return Samples(inputs, labels), ids


def triggered(samples: Samples, target_label: int) -> Samples:
    """The images of the other classes with the patch on every one of them and their true labels."""
    others = _others(samples, target_label)
    return Samples(_stamped(samples.inputs[others], _white(samples)), samples.labels[others])


def patch_size(size: int) -> int:
    """Side of the patch on images of a height and width."""
    return 3 if size >= 16 else 2


def _others(samples: Samples, target_label: int) -> Tensor:
    """Positions of the images of other classes."""
    others = (samples.labels != target_label).nonzero().squeeze(1)
    if len(others) in (0, len(samples)):
        raise ValueError(f"Expected images of class {target_label} and of others, found only one of the two.")
    return others


def _white(samples: Samples) -> Tensor:
    """The brightest value (C, 1, 1) of every channel: white, however the images were normalised."""
    return samples.inputs.amax(dim=(0, 2, 3)).view(-1, 1, 1)


def _stamped(inputs: Tensor, white: Tensor) -> Tensor:
    """The images with a patch in the lower right corner."""
    side = patch_size(inputs.shape[-1])
    inputs = inputs.clone()
    inputs[..., -side:, -side:] = white
    return inputs
