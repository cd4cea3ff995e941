"""How much does pretraining still matter, the further the finetuning task is away, and the more data it has?

python recipes/task_similarity.py                 # scikit-learn's digits, some minutes
python recipes/task_similarity.py quick=true      # a part of it
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from lightning_influence import InfluenceFunction, InfluenceModule, Proximity, Source
from recipes import tables
from recipes.images.data import ImageSplits
from recipes.stages import removals
from recipes.stages.data import Tasks, part
from recipes.stages.fitting import finetuned, pretrained
from recipes.stages.methods import estimator
from recipes.stages.network import TwoRuns
from recipes.stages.retraining import retrain_both
from recipes.truths.retraining import Samples


@dataclass(frozen=True)
class Variant:
    """One finetuning task.

    Args:
        name: of the task.
        axis: what it varies: "task" or "size".
        value: how far along the axis.
        tasks: the pretraining task, and this one.
    """

    name: str
    axis: str
    value: float
    tasks: Tasks


def rotated(samples: Samples, side: int, degrees: float) -> Samples:
    """Square images turned about their middle; what comes in from outside repeats the border."""
    if degrees == 0:
        return samples
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    images = samples.inputs.view(-1, 1, side, side)
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return Samples(F.grid_sample(images, grid, padding_mode="border", align_corners=False).flatten(1), samples.labels)


def shuffled(samples: Samples, seed: int) -> Samples:
    """Images whose pixels all changed places, in the same way in all."""
    order = torch.randperm(samples.inputs.shape[1], generator=torch.Generator().manual_seed(seed))
    return Samples(samples.inputs[:, order].contiguous(), samples.labels)


def variants(config: Any, images: ImageSplits) -> list[Variant]:
    """All finetuning tasks of a configuration."""
    make = partial(instantiate, config.tasks, images=images)
    whole = make(finetuning_size=None)
    cut, seed = int(config.tasks.finetuning_size), int(config.truth.seed)
    side = math.isqrt(whole.inputs)
    base = make()
    same = make(finetuning=config.tasks.pretraining, finetuning_size=None)
    rest = part(same.finetuning, slice(len(base.pretraining), len(base.pretraining) + cut))
    found = [Variant("the same classes, other images", "task", -1, replace(same, finetuning=rest))]
    for degrees in config.angles:
        turned = replace(
            base, finetuning=rotated(base.finetuning, side, degrees), test=rotated(base.test, side, degrees)
        )
        name = "other classes" + (f", rotated by {degrees}°" if degrees else "")
        found.append(Variant(name, "task", degrees, turned))
    mixed = replace(base, finetuning=shuffled(base.finetuning, seed), test=shuffled(base.test, seed))
    found.append(Variant("other classes, shuffled pixels", "task", 180, mixed))
    for size in config.sizes:
        fewer = replace(base, finetuning=part(whole.finetuning, slice(size)))
        found.append(Variant(f"other classes, {size} images", "size", size, fewer))
    return found


def row_of(config: Any, variant: Variant, cache: str) -> dict[str, object]:
    """Sizes of influences of one task, means over the seeds."""
    tasks = variant.tasks
    recipe = instantiate(config.pretraining)
    how = instantiate(config.finetuning)
    if variant.axis == "size":  # as many steps, whatever the number of images
        steps = how.recipe.epochs * -(-int(config.tasks.finetuning_size) // how.recipe.batch_size)
        epochs = max(1, round(steps / -(-len(tasks.finetuning) // how.recipe.batch_size)))
        how = replace(how, recipe=replace(how.recipe, epochs=epochs))
    runs = TwoRuns.of(tasks, config.widths, recipe, how)
    queries = part(tasks.test, slice(config.queries))
    size, seeds = len(tasks.pretraining), list(config.seeds)
    groups = removals.random_groups(tasks.pretraining, config.truth.groups, config.truth.group_size, config.truth.seed)
    again = retrain_both(
        runs, tasks, queries, [torch.arange(size)] * (len(groups) + 1), seeds=seeds,
        weights=removals.without(groups, size), cache=cache,
    )  # fmt: skip
    true = removals.changes(again.losses)
    ours, theirs, of_groups, agreeing = [], [], [], []
    link = Proximity() if runs.finetuning.frozen else Source()
    for number, seed in enumerate(seeds):
        with tempfile.TemporaryDirectory() as folder:
            first = pretrained(runs, tasks.pretraining, seed, Path(folder) / "pretraining")
            fits = finetuned(runs, tasks.finetuning, seed, first, Path(folder) / "finetuning", gradients=True)
            asked = queries.inputs, queries.labels
            scores = estimator(fits, link).scores(asked)
            second = fits.second
            own = InfluenceModule(second.module, second.store, InfluenceFunction("ekfac"), train_loader=second.loader)
            theirs.append(_size(own.scores(asked) / len(tasks.finetuning)))
        foretold = removals.predicted(scores, groups)
        ours.append(_size(scores / size))
        of_groups.append(_size(foretold))
        agreeing.append(float(removals.pearson(foretold, true[:, number]).nanmean()))
    return {
        "finetuning task": variant.name,
        "test accuracy": f"{again.right[0].double().mean():.1%}",
        "of a pretraining image": _mean(ours),
        "of a finetuning image": _mean(theirs),
        "ratio": _mean([one / other for one, other in zip(ours, theirs, strict=True)]),
        "of a group, predicted": _mean(of_groups),
        "of a group, true": _mean([_size(true[:, number]) for number in range(len(seeds))]),
        "groups, Pearson": _mean(agreeing),
    }


@hydra.main(version_base="1.3", config_path="../configs", config_name="task_similarity")
def main(config: DictConfig) -> float:
    """Compare, write the table and the picture, and return the influence of pretraining on the nearest task."""
    config = tables.chosen(config)
    results, rows, known = Path(config.results), list[dict[str, object]](), list[Variant]()
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants(config, instantiate(config.images)):
            known.append(variant)
            rows.append(row_of(config, variant, config.cache or folder))
            tables.write(
                results.with_suffix(".md"),
                f"Task similarity, {config.title}",
                config.command,
                [_remarks(config), tables.table(rows)],
            )
    tables.picture(
        results.with_suffix(".png"), [partial(_panel, known, rows, "task"), partial(_panel, known, rows, "size")]
    )
    value = rows[0]["of a pretraining image"]
    assert isinstance(value, float)
    return value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _size(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def _remarks(config: Any) -> str:
    return (
        f"Pretrained on {config.tasks.pretraining_size} images of the classes {list(config.tasks.pretraining)}, "
        f"finetuned on {config.tasks.finetuning_size} (or as many as is said) of {list(config.tasks.finetuning)}, with "
        f"the embedding's learning rate {config.finetuning.embedding:g} of the head's (0: frozen) and as many steps in "
        "all rows. Sizes are root mean squares, over test images of the row's own task and over what is removed, of "
        "the predicted change of the loss when one image is removed (multi-stage influence for pretraining images, "
        f"the influence function of the finetuning run for its own, both EK-FAC), or {config.truth.group_size} random "
        f'pretraining images ({config.truth.groups} times); "true": both runs trained again without them. Means over '
        f"the models of the seeds {list(config.seeds)}; the Pearson correlation is of one model's prediction with its "
        "own change, mean over test images."
    )


def _panel(known: Sequence[Variant], rows: Sequence[dict[str, Any]], axis_name: str, axis: Any) -> None:
    chosen = [(variant, row) for variant, row in zip(known, rows, strict=True) if variant.axis == axis_name]
    places = list(range(len(chosen)))
    for name in ("of a pretraining image", "of a finetuning image", "of a group, predicted", "of a group, true"):
        axis.plot(places, [row[name] for _, row in chosen], marker="o", markersize=4, label=name)
    names = [variant.name.removeprefix("other classes, ") for variant, _ in chosen]
    axis.set_xticks(places, names, fontsize=6, rotation=25, ha="right")
    axis.set_yscale("log")
    axis.set_ylabel("change of the loss by removal (RMS)", fontsize=8)
    axis.legend(fontsize=6)


if __name__ == "__main__":
    main()
