"""A training set with flipped labels, whatever it is of: texts and images as the hunt sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from recipes.data import TextDataModule
from recipes.data.corpus import in_one_line
from recipes.data.fewer_texts import FewerTexts
from recipes.data.text_data_module import EncodedTexts, collate
from recipes.hunting import out_of_fold
from recipes.images.data import ImageSplits

Batches = DataLoader[Any]


@dataclass(frozen=True)
class Hunted:
    """Training samples of which some have a wrong label.

    Args:
        build: makes the model, with the randomness of the global state.
        train: samples with the labels that are trained on.
        labels: those labels, (N,).
        wrong: which of them were flipped, (N,).
        held_out: samples with right labels that opponents are opponents of.
        test: other samples with right labels, on which accuracies are measured.
        label_names: of the classes.
        texts: of the training samples; empty for images.
        doubt: the simple baseline's suspicion of each label, (N,): one minus its out-of-fold probability.
        collate: makes a batch of samples; None is torch's own.
    """

    build: Callable[[], LightningModule]
    train: Dataset[Any]
    labels: Tensor
    wrong: Tensor
    held_out: Dataset[Any]
    test: Dataset[Any]
    label_names: Sequence[str]
    texts: Sequence[str]
    doubt: Callable[[], Tensor]
    collate: Callable[[Sequence[Any]], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def loader(self, samples: Dataset[Any], batch_size: int, seed: int | None = None) -> Batches:
        """Batches of some samples; shuffled by a seed, or in their order."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(samples, batch_size, shuffle=seed is not None, generator=generator, collate_fn=self.collate)

    def without(self, positions: Tensor) -> Dataset[Any]:
        """The training samples that are left when some are dropped."""
        kept = torch.ones(len(self), dtype=torch.bool).index_fill(0, positions, False)
        return Subset(self.train, kept.nonzero().squeeze(1).tolist())


def texts(
    data: TextDataModule,
    model: Callable[..., LightningModule],
    held_out: int,
    size: int | None,
    flipped: float,
    seed: int,
) -> Hunted:
    """A set of texts.

    Args:
        data: not set up yet.
        model: makes the classifier, given `vocabulary_size` and `num_classes`.
        held_out: of the data's test texts these many, at random, are the clean set; the others are the test set.
        size: train on fewer texts, chosen by hash; None takes all.
        flipped: share of the training labels that are replaced by another class.
        seed: of the flips and of the clean set.
    """
    data.flip_fraction, data.seed = flipped, seed
    if size is not None:
        data.source = FewerTexts(data.source, size)
    data.setup()
    build = partial(model, vocabulary_size=len(data.vocabulary), num_classes=len(data.label_names))
    train, test = data.train_dataloader().dataset, data.test_dataloader().dataset
    assert isinstance(train, EncodedTexts) and isinstance(test, EncodedTexts)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed)).tolist()
    written = [in_one_line(text) for text in data.train_texts]
    return Hunted(
        build,
        train,
        train.labels,
        torch.tensor(data.flipped),
        Subset(test, sorted(order[:held_out])),
        Subset(test, sorted(order[held_out:])),
        data.label_names,
        written,
        lambda: out_of_fold.of_texts(written, train.labels, seed),
        collate,
    )


def images(
    images: ImageSplits,
    model: Callable[..., LightningModule],
    held_out: int,
    size: int | None,
    flipped: float,
    seed: int,
) -> Hunted:
    """A set of images.

    Args:
        images: all of them.
        model: makes the classifier, given `channels`, `size` and `classes`.
        held_out: the first of the validation images are the clean set.
        size: train on the first images only; None takes all.
        flipped: share of the training labels that are replaced by another class.
        seed: of the flips.
    """
    build = partial(model, channels=images.channels, size=images.size, classes=images.classes)
    inputs, labels = images.train.inputs[:size], images.train.labels[:size].clone()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(flipped * len(labels))]
    shift = torch.randint(1, images.classes, (len(chosen),), generator=generator)  # so that the class changes
    labels[chosen] = (labels[chosen] + shift) % images.classes
    wrong = torch.zeros(len(labels), dtype=torch.bool).index_fill(0, chosen, True)
    clean = images.validation
    return Hunted(
        build,
        TensorDataset(inputs, labels),
        labels,
        wrong,
        TensorDataset(clean.inputs[:held_out], clean.labels[:held_out]),
        TensorDataset(images.test.inputs, images.test.labels),
        images.label_names,
        (),
        lambda: out_of_fold.of_images(inputs, labels, seed),
    )
