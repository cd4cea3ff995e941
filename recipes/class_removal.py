"""Forget a class: a trained classifier edited as if one digit had never been shown, beside one that is trained again.

python recipes/class_removal.py                              # scikit-learn's digits, some minutes
python recipes/class_removal.py setting=class_removal_mnist data_root=/path/to/data   # MNIST
python recipes/class_removal.py setting=class_removal_cifar10 data_root=/path/to/data
python recipes/class_removal.py setting=class_removal_mnist data_root=/path/to/data quick=true   # a part of it
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from lightning_influence import ModelEdit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.images.comparing import (
    Solving,
    builder,
    compared,
    edited,
    left_over,
    part,
    shown,
    targets_of,
)
from recipes.images.data import ImageSplits, loader
from recipes.images.judging import RemovalJudgement, judge_removal, probabilities
from recipes.images.models import ImageClassifier
from recipes.images.tables import Row
from recipes.truths.retraining import Samples

PERCENT = ("retained", "target", "F1")


def measured(judgement: RemovalJudgement) -> dict[str, float]:
    """What the table shows."""
    return {
        "retained": judgement.retained_accuracy,
        "target": judgement.target_accuracy,
        "F1": judgement.f1,
        "distance": judgement.distance,
    }


@dataclass(frozen=True)
class Setup:
    """A classifier that is to forget a class, the one that never saw it, and what both are judged by.

    Args:
        images: all of them.
        removed: the class.
        original, retrained: trained with and without it, from the same initial weights.
        truth: the retrained model's probabilities of the test images.
    """

    images: ImageSplits
    removed: int
    original: ImageClassifier
    retrained: ImageClassifier
    truth: Tensor

    @classmethod
    def of(
        cls,
        images: ImageSplits,
        removed: int,
        build: Callable[[], ImageClassifier],
        train: Callable[[Callable[[], ImageClassifier], Samples], ImageClassifier],
    ) -> Setup:
        """Train both."""
        retrained = train(build, part(images.train, images.train.labels != removed))
        return cls(images, removed, train(build, images.train), retrained, probabilities(retrained, images.test))

    @property
    def ids(self) -> Tensor:
        """Positions of the removed class in the training set."""
        return (self.images.train.labels == self.removed).nonzero().squeeze(1)

    @property
    def keep(self) -> Any:
        """Validation images of the classes that stay."""
        held_out = self.images.validation
        return loader(part(held_out, held_out.labels != self.removed), 500, shuffle=False)

    @property
    def forget(self) -> Any:
        """Validation images of the removed class."""
        held_out = self.images.validation
        return loader(part(held_out, held_out.labels == self.removed), 500, shuffle=False)

    def loader(self, batch_size: int) -> Any:
        """The training images in their order."""
        return loader(self.images.train, batch_size, shuffle=False)

    def judged(self, module: ImageClassifier) -> RemovalJudgement:
        """On the test images."""
        return judge_removal(module, self.images.test, self.removed, self.truth)


def rows_of(config: DictConfig, images: ImageSplits, seed: int) -> list[Row]:
    """All methods on one model, and the model retrained from the same initial weights."""
    build = builder(config, images)
    setup = Setup.of(images, int(config.removed), build, partial(instantiate(config.training), seed=seed))
    original = setup.original
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        shown(row)

    for name, module in (("original", original), ("retrained", setup.retrained)):
        add(Row(name, None, seed, measured(setup.judged(module))))
    solving = Solving(**config.solving)
    training = setup.loader(solving.batch_size)
    targets = targets_of(config, original, training, setup.ids, seed)
    how = partial(solving.how, original.weight_decay, seed)
    for name, share, edit, seconds in edited(
        targets, lambda method: ModelEdit.from_removal(original, training, setup.ids, method, how(method)), solving
    ):
        step = edit.line_search(original, setup.keep, setup.forget).step
        values = measured(setup.judged(edit.apply(original, step)))
        add(Row(name, share, seed, values, step, seconds, left_over(edit)))
    return rows


def remarks(config: DictConfig, images: ImageSplits) -> list[str]:
    """What was done, and what is measured."""
    return [
        f"Class {images.label_names[config.removed]} of {len(images.train)} training images removed; in per cent the "
        f"accuracies on {len(images.test)} test images, of the retained classes and of the removed one, and their F1; "
        "the mean total variation distance to the retrained model's predictions; mean ± standard deviation over the "
        "seeds.",
        "",
        f"{Solving(**config.solving)}; K by {config.rule}; step chosen on {len(images.validation)} validation images.",
    ]


@hydra.main(version_base="1.3", config_path="../configs", config_name="class_removal")
def main(config: DictConfig) -> float:
    """Compare, write the table and the picture, and return the mean F1 of GIF."""
    rows = compared(config, "Class removal", remarks, rows_of, PERCENT, (*PERCENT, "distance"))
    found = [row.values["F1"] for row in rows if row.method == "GIF"]
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
