"""Which parameters should change? A class is forgotten by generalized influence under six rules for choosing K.

python recipes/parameter_selection.py     # scikit-learn's digits, some minutes
python recipes/parameter_selection.py setting=parameter_selection_cifar10 data_root=/path/to/data
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_influence import GeneralizedInfluenceFunction, ModelEdit, Solver, TargetParameters, choose_target
from lightning_influence.targets import RULES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.class_removal import PERCENT, Setup, measured
from recipes.images import tables
from recipes.images.comparing import (
    Solving,
    builder,
    compared,
    left_over,
    shown,
    timed,
)
from recipes.images.data import ImageSplits
from recipes.images.tables import Row


def rows_of(config: DictConfig, images: ImageSplits, seed: int) -> list[Row]:
    """GIF on one model under every rule and at every share, and with all parameters."""
    build = builder(config, images)
    setup = Setup.of(images, int(config.removed), build, partial(instantiate(config.training), seed=seed))
    solving = Solving(**config.solving)
    training = setup.loader(solving.batch_size)
    how = partial(solving.how, setup.original.weight_decay, seed)
    examined = setup.ids[: config.examined].tolist()
    rows = [
        Row(name, None, seed, measured(setup.judged(module)))
        for name, module in (("original", setup.original), ("retrained", setup.retrained))
    ]
    for row in rows:
        shown(row)

    def add(name: str, share: float, target: TargetParameters) -> None:
        method = GeneralizedInfluenceFunction(
            target, damping=solving.damped("GIF"), solver=Solver("minres", solving.tolerance, solving.iterations)
        )
        edit, seconds = timed(lambda m: ModelEdit.from_removal(setup.original, training, setup.ids, m, how(m)), method)
        step = edit.line_search(setup.original, setup.keep, setup.forget).step
        values = measured(setup.judged(edit.apply(setup.original, step)))
        rows.append(Row(name, share, seed, values, step, seconds, left_over(edit)))
        shown(rows[-1])

    for rule in RULES:
        for ratio in config.ratios:
            target = choose_target(
                setup.original, training, ratio=float(ratio), rule=rule, seed=seed, sample_ids=examined
            )
            add(rule.replace("_", " "), float(ratio), target)
    add("everything", 1.0, TargetParameters.everything(setup.original))
    return rows


def remarks(config: DictConfig, images: ImageSplits) -> list[str]:
    """What was done, and what is measured."""
    return [
        f"GIF of the removal of class {images.label_names[config.removed]}, as in the class removal table. "
        f"{Solving(**config.solving)}.",
    ]


@hydra.main(version_base="1.3", config_path="../configs", config_name="parameter_selection")
def main(config: DictConfig) -> float:
    """Compare, write the table and the picture, and return the best mean F1."""
    rows = compared(config, "Parameter selection", remarks, rows_of, PERCENT, (*PERCENT, "distance"))
    return max(
        sum(row.values["F1"] for row in members) / len(members)
        for (_, share), members in tables.grouped(rows).items()
        if share is not None
    )


if __name__ == "__main__":
    main()
