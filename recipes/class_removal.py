"""Forget a class: a trained classifier edited as if one digit had never been shown, beside one that is trained again.

python recipes/class_removal.py                                                        # scikit-learn's digits, a minute
python recipes/class_removal.py setting=class_removal_mnist data_root=/path/to/data    # MNIST, most of an hour
python recipes/class_removal.py setting=class_removal_cifar10 data_root=/path/to/data
python recipes/class_removal.py setting=class_removal_mnist data_root=/path/to/data quick=true   # five minutes
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_influence import ModelEdit, choose_target

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.images import tables
from recipes.images.comparing import Row, Solving, edited, part, quiet, shown
from recipes.images.data import ImageSplits, loader
from recipes.images.judging import RemovalJudgement, judge_removal, probabilities
from recipes.images.models import ImageClassifier

PERCENT = ("retained", "target", "F1")


def measured(judgement: RemovalJudgement) -> dict[str, float]:
    """What the table shows."""
    return {
        "retained": judgement.retained_accuracy,
        "target": judgement.target_accuracy,
        "F1": judgement.f1,
        "distance": judgement.distance,
    }


def rows_of(config: DictConfig, images: ImageSplits, seed: int) -> list[Row]:
    """All methods on one model, and the model retrained from the same initial weights."""
    build = partial(instantiate(config.classifier), channels=images.channels, size=images.size, classes=images.classes)
    train = partial(instantiate(config.training), seed=seed)
    removed = int(config.removed)
    gone, kept = images.train.labels == removed, images.train.labels != removed
    original: ImageClassifier = train(build, images.train)
    retrained: ImageClassifier = train(build, part(images.train, kept))
    truth = probabilities(retrained, images.test)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        shown(row)

    for name, module in (("original", original), ("retrained", retrained)):
        add(Row(name, None, seed, measured(judge_removal(module, images.test, removed, truth))))
    solving = Solving(**config.solving)
    training = loader(images.train, solving.batch_size, shuffle=False)
    ids = gone.nonzero().squeeze(1)
    examined = ids[: config.examined].tolist()
    targets = {
        float(ratio): choose_target(original, training, ratio=ratio, rule=config.rule, seed=seed, sample_ids=examined)
        for ratio in config.ratios
    }
    how = solving.how(original.weight_decay, seed)
    held_out = images.validation
    keep, forget = (
        loader(part(held_out, chosen), 500, shuffle=False)
        for chosen in (held_out.labels != removed, held_out.labels == removed)
    )
    for name, share, edit, seconds in edited(
        original, targets, lambda method: ModelEdit.from_removal(original, training, ids, method, how), solving
    ):
        step = edit.line_search(original, keep, forget).step
        values = measured(judge_removal(edit.apply(original, step), images.test, removed, truth))
        add(Row(name, share, seed, values, step, seconds, edit.record["steps"][-1]["left"]))
    return rows


@hydra.main(version_base="1.3", config_path="../configs", config_name="class_removal")
def main(config: DictConfig) -> float:
    """Compare, write the table and the picture, and return the mean F1 of GIF."""
    chosen: Any = OmegaConf.merge(config, config.when_quick) if config.quick else config
    quiet()
    images: ImageSplits = instantiate(chosen.images)
    rows = [row for seed in chosen.seeds for row in rows_of(chosen, images, seed)]
    samples = chosen.solving.hessian_samples or "all remaining"
    remarks = [
        f"Class {images.label_names[chosen.removed]} of {len(images.train)} training images removed; in per cent the "
        f"accuracies on {len(images.test)} test images, of the retained classes and of the removed one, and their F1; "
        "the mean total variation distance to the retrained model's predictions; mean ± standard deviation over "
        f"{len(chosen.seeds)} seeds.",
        "",
        f"Exact Hessian over {samples} training images, λ = {chosen.solving.damping}, at most "
        f"{chosen.solving.iterations} steps of MINRES; K by {chosen.rule}; step chosen on {len(images.validation)} "
        "validation images. PIF's solve is that of IF.",
    ]
    results = Path(chosen.results)
    body = tables.table(rows, PERCENT)
    tables.write(results.with_suffix(".md"), f"Class removal, {chosen.title}", chosen.command, remarks, body)
    tables.plot(rows, ("retained", "target", "F1", "distance"), results.with_suffix(".png"))
    found = [row.values["F1"] for row in rows if row.method == "GIF"]
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
