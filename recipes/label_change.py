"""Close a backdoor: a classifier trained on poisoned labels, edited as if the labels had been right.

A part of the training images carries a white patch and a wrong label, so that the patch decides. The edit gives those
images their own labels again; the retrained model has seen patch and right labels.

python recipes/label_change.py                                                     # scikit-learn's digits, some minutes
python recipes/label_change.py setting=label_change_mnist data_root=/path/to/data  # MNIST
python recipes/label_change.py setting=label_change_mnist data_root=/path/to/data quick=true
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_influence import ModelEdit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.images.backdoor import poisoned, triggered
from recipes.images.comparing import (
    Solving,
    builder,
    compared,
    edited,
    left_over,
    shown,
    targets_of,
)
from recipes.images.data import ImageSplits, loader
from recipes.images.judging import BackdoorJudgement, accuracy, judge_backdoor, probabilities
from recipes.images.models import ImageClassifier
from recipes.images.tables import Row
from recipes.truths.retraining import Samples

PERCENT = ("clean", "relabelled", "backdoored")


def measured(judgement: BackdoorJudgement) -> dict[str, float]:
    """What the table shows."""
    return {
        "clean": judgement.clean_accuracy,
        "relabelled": judgement.relabelled_accuracy,
        "backdoored": judgement.backdoored,
        "distance": judgement.distance,
    }


def rows_of(config: DictConfig, images: ImageSplits, seed: int) -> list[Row]:
    """All methods on one poisoned model, and the model trained on the right labels from the same initial weights."""
    build = builder(config, images)
    train = partial(instantiate(config.training), seed=seed)
    wrong = int(config.target_label)
    poison, ids = poisoned(images.train, config.fraction, wrong, seed)
    original: ImageClassifier = train(build, poison)
    retrained: ImageClassifier = train(build, Samples(poison.inputs, images.train.labels))
    stamped = triggered(images.test, wrong)
    truth = (probabilities(retrained, images.test), probabilities(retrained, stamped))
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        shown(row)

    for name, module in (("poisoned", original), ("retrained", retrained)):
        add(Row(name, None, seed, measured(judge_backdoor(module, images.test, stamped, wrong, truth))))
    solving = Solving(**config.solving)
    training = loader(poison, solving.batch_size, shuffle=False)
    targets = targets_of(config, original, training, ids, seed)
    how = partial(solving.how, original.weight_decay, seed)
    labels = {int(i): int(images.train.labels[i]) for i in ids}
    clean, patched = images.validation, triggered(images.validation, wrong)
    held_out = Samples(torch.cat((clean.inputs, patched.inputs)), torch.cat((clean.labels, patched.labels)))
    for name, share, edit, seconds in edited(
        targets, lambda method: ModelEdit.from_relabelling(original, training, labels, method, how(method)), solving
    ):
        step = edit.line_search(original, criterion=lambda module: accuracy(module, held_out)).step
        values = measured(judge_backdoor(edit.apply(original, step), images.test, stamped, wrong, truth))
        add(Row(name, share, seed, values, step, seconds, left_over(edit)))
    return rows


def remarks(config: DictConfig, images: ImageSplits) -> list[str]:
    """What was done, and what is measured."""
    return [
        f"{config.fraction:.0%} of {len(images.train)} training images of other classes stamped and labelled "
        f"{images.label_names[config.target_label]}; in per cent: accuracy on {len(images.test)} clean test images, on "
        "stamped ones by their true labels, and the share of stamped ones still taken for the wrong class; mean total "
        "variation distance to the retrained model's predictions; mean ± standard deviation over the seeds.",
        "",
        f"{Solving(**config.solving)}; K by {config.rule}; step chosen by the accuracy on "
        f"{len(images.validation)} validation images, clean and stamped.",
    ]


@hydra.main(version_base="1.3", config_path="../configs", config_name="label_change")
def main(config: DictConfig) -> float:
    """Compare, write the table and the picture, and return GIF's mean accuracy on stamped images."""
    rows = compared(config, "Label change", remarks, rows_of, PERCENT, (*PERCENT, "distance"))
    found = [row.values["relabelled"] for row in rows if row.method == "GIF"]
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
