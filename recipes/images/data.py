"""The image sets: scikit-learn's digits, MNIST and a part of CIFAR-10, split into train, validation and test."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from recipes.truths.retraining import Samples

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class ImageSplits:
    """Three disjoint parts of an image set: float32 inputs (N, C, H, W) and labels (N,).

    Every channel is normalised by its mean and standard deviation over the training images.

    Args:
        train: what models are trained on.
        validation: where step sizes and the like are chosen.
        test: where a result is measured, and nothing else.
        label_names: of the classes.
    """

    train: Samples
    validation: Samples
    test: Samples
    label_names: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Colours of an image."""
        return self.train.inputs.shape[1]

    @property
    def size(self) -> int:
        """Height of an image, and its width."""
        return self.train.inputs.shape[2]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)


def digits(seed: int = 0) -> ImageSplits:
    """The 1,797 digits of scikit-learn, 8x8: 1,200 for training, 300 for validation, 297 for the test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    every = np.arange(len(labels))
    train, rest = train_test_split(every, train_size=1200, random_state=seed, stratify=labels)
    validation, test = train_test_split(rest, train_size=300, random_state=seed, stratify=labels[rest])
    parts = [(images[part], labels[part]) for part in (train, validation, test)]
    return _splits(*parts, label_names=tuple(str(digit) for digit in range(10)))


def mnist(
    data_root: str | os.PathLike[str] | None, train_size: int = 20_000, validation_size: int = 2_000, seed: int = 0
) -> ImageSplits:
    """MNIST, 28x28: training and validation images are drawn from the official training set, the test set is whole.

    Args:
        data_root: folder that holds ``mnist/mnist.npz``.
        train_size: training images.
        validation_size: validation images, none of them a training image.
        seed: of the draw. The training images do not depend on `validation_size`.
    """
    file = _read(data_root, "mnist/mnist.npz")
    available = len(file["y_train"])
    if train_size < 1 or validation_size < 1 or train_size + validation_size > available:
        raise ValueError(
            f"Expected at least one image in each part and {available} at most together, "
            f"found train_size={train_size} and validation_size={validation_size}."
        )
    order = np.random.default_rng(seed).permutation(available)
    train, validation = order[:train_size], order[train_size : train_size + validation_size]
    images = _channels_first(file["x_train"])
    return _splits(
        (images[train], file["y_train"][train]),
        (images[validation], file["y_train"][validation]),
        (_channels_first(file["x_test"]), file["y_test"]),
        label_names=tuple(str(name) for name in file["label_names"]),
    )


def cifar10(data_root: str | os.PathLike[str] | None, validation_size: int = 500) -> ImageSplits:
    """The first 4,000 training and 1,000 test images of CIFAR-10, 32x32; the last ones of the 4,000 are validation.

    Args:
        data_root: folder that holds ``cifar10_5k/cifar10_5k.npz``.
        validation_size: validation images; the other ones are for training.
    """
    file = _read(data_root, "cifar10_5k/cifar10_5k.npz")
    train_size = len(file["y_train"]) - validation_size
    if validation_size < 1 or train_size < 1:
        raise ValueError(
            f"Expected a validation_size of 1 to {len(file['y_train']) - 1}, found {validation_size}. "
            "HINT: what is not validation is trained on."
        )
    images = _channels_first(file["x_train"])
    return _splits(
        (images[:train_size], file["y_train"][:train_size]),
        (images[train_size:], file["y_train"][train_size:]),
        (_channels_first(file["x_test"]), file["y_test"]),
        label_names=tuple(str(name) for name in file["label_names"]),
    )


def loader(samples: Samples, batch_size: int, shuffle: bool, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """A loader of (inputs, labels); the order of its epochs depends on the seed alone, not on the global state."""
    dataset = TensorDataset(samples.inputs, samples.labels)
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator)


def _read(data_root: str | os.PathLike[str] | None, name: str) -> dict[str, Array]:
    """The arrays of a file below the data root."""
    hint = f"HINT: data_root=/path/to/data names the folder that holds {name}; it does not come with the library."
    if data_root is None:
        raise ValueError(f"Expected a data root with {name}, found none. {hint}")
    path = Path(data_root).expanduser() / name
    if not path.is_file():
        raise FileNotFoundError(f"Expected the images in {path}, found no such file. {hint}")
    with np.load(path, allow_pickle=False) as file:
        return {array: file[array] for array in file.files}


def _channels_first(images: Array) -> Array:
    """Bytes (N, H, W) or (N, H, W, C) as float32 (N, C, H, W) between 0 and 1."""
    images = images[..., None] if images.ndim == 3 else images
    scaled: Array = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
    return scaled


def _splits(*parts: tuple[Array, Array], label_names: tuple[str, ...]) -> ImageSplits:
    """The three parts, normalised by the first one's channels."""
    mean = parts[0][0].mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    std = parts[0][0].std(axis=(0, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    train, validation, test = (
        Samples(torch.from_numpy((images - mean) / std), torch.from_numpy(labels.astype(np.int64)))
        for images, labels in parts
    )
    return ImageSplits(train, validation, test, label_names)
