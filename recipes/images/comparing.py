"""One model edited by every method: generalized, freezing, projected, whole and second-order influence."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_influence import (
    FreezingInfluenceFunction,
    GeneralizedInfluenceFunction,
    How,
    InfluenceFunction,
    MatrixFree,
    ModelEdit,
    ProjectedInfluenceFunction,
    SecondOrderInfluenceFunction,
    Solver,
    TargetParameters,
    choose_target,
)
from recipes.images import tables
from recipes.images.data import ImageSplits
from recipes.images.models import ImageClassifier
from recipes.images.tables import Row
from recipes.truths.retraining import Samples

Make = Callable[[InfluenceFunction], ModelEdit]


@dataclass(frozen=True)
class Solving:
    """How the methods solve, the same for all.

    Args:
        damping: λ, added to H, of all methods or by their names.
        iterations: steps of MINRES (of LSMR for GIF, each of which costs two products with H).
        hessian_samples: training images that H is taken over; None is all that stay.
        steps: linear steps, each at the weights that the one before has led to; SIF takes one.
        batch_size: images a batch in products with H.
        tolerance: relative residual at which a solver stops earlier.
    """

    damping: float | Mapping[str, float]
    iterations: int
    hessian_samples: int | None
    steps: int = 1
    batch_size: int = 256
    tolerance: float = 1e-3

    def __str__(self) -> str:
        images = "all training images" if self.hessian_samples is None else f"{self.hessian_samples} training images"
        each = self.damping if isinstance(self.damping, Mapping) else {}
        damping = ", ".join(f"{value} ({name})" for name, value in each.items()) or str(self.damping)
        return (
            f"Exact Hessian over {images}, λ = {damping}, at most {self.iterations} steps of MINRES or LSMR "
            f"in each of {self.steps} linear steps (SIF takes one)"
        )

    def damped(self, method: str) -> float:
        """λ of a method."""
        return float(self.damping[method] if isinstance(self.damping, Mapping) else self.damping)

    def how(self, weight_decay: float, seed: int, method: InfluenceFunction | None = None) -> How:
        """The rest of an edit's settings."""
        return How(
            weight_decay=weight_decay,
            steps=1 if isinstance(method, SecondOrderInfluenceFunction) else self.steps,
            hessian_samples=self.hessian_samples,
            seed=seed,
            batch_size=self.batch_size,
        )


def edited(
    targets: Mapping[float, TargetParameters],
    make: Make,
    solving: Solving,
) -> Iterator[tuple[str, float, ModelEdit, float]]:
    """(method, share of the parameters, edit, seconds of its solve) of all methods, each once it is there.

    Args:
        targets: K by share.
        make: the edit that a method gives.
    """
    matrix = MatrixFree("hessian", "minres", tolerance=solving.tolerance, max_iterations=solving.iterations)
    solver = Solver("minres", solving.tolerance, solving.iterations)
    for share, target in targets.items():
        generalized = GeneralizedInfluenceFunction(target, damping=solving.damped("GIF"), solver=solver)
        yield "GIF", share, *timed(make, generalized)
        freezing = FreezingInfluenceFunction(target, damping=solving.damped("FIF"), solver=solver)
        yield "FIF", share, *timed(make, freezing)
    first, seconds = timed(make, InfluenceFunction(matrix, damping=solving.damped("IF")))
    for share, target in targets.items():
        if solving.steps == 1 and solving.damped("PIF") == solving.damped("IF"):
            yield "PIF", share, first.within(target), seconds  # the same solve, cut
        else:  # each step begins where the one before has led K alone
            projected = ProjectedInfluenceFunction(target, matrix, damping=solving.damped("PIF"))
            yield "PIF", share, *timed(make, projected)
    yield "IF", 1.0, first, seconds
    yield "SIF", 1.0, *timed(make, SecondOrderInfluenceFunction(matrix, damping=solving.damped("SIF")))


def left_over(edit: ModelEdit) -> float | None:
    """What an edit leaves of the gradient, for the methods that say so."""
    left: float | None = edit.record["left"]
    return left


def builder(config: DictConfig, images: ImageSplits) -> Callable[[], ImageClassifier]:
    """What makes the classifier of a configuration for these images."""
    return partial(instantiate(config.classifier), channels=images.channels, size=images.size, classes=images.classes)


def targets_of(
    config: DictConfig, module: ImageClassifier, training: Any, ids: Tensor, seed: int
) -> dict[float, TargetParameters]:
    """K at every share of a configuration, chosen by some of the samples `ids` of the training set."""
    examined = ids[: config.examined].tolist()
    return {
        float(ratio): choose_target(module, training, ratio=ratio, rule=config.rule, seed=seed, sample_ids=examined)
        for ratio in config.ratios
    }


def compared(
    config: DictConfig,
    title: str,
    remarks: Callable[[DictConfig, ImageSplits], Sequence[str]],
    rows_of: Callable[[DictConfig, ImageSplits, int], list[Row]],
    percent: Sequence[str],
    measures: Sequence[str],
) -> list[Row]:
    """The rows of all seeds of a configuration, as a table and a picture at `config.results`.

    Args:
        title: of the table.
        remarks: what the table says above its rows.
        rows_of: of one seed.
        percent: the measures that are told in per cent.
        measures: those that are drawn.
    """
    chosen: Any = OmegaConf.merge(config, config.when_quick) if config.quick else config
    quiet()
    images: ImageSplits = instantiate(chosen.images)
    told, results, rows = remarks(chosen, images), Path(chosen.results), list[Row]()
    for seed in chosen.seeds:
        rows += rows_of(chosen, images, seed)  # written after each seed: a run that is stopped keeps what it has
        tables.write(results.with_suffix(".md"), f"{title}, {chosen.title}", chosen.command, told, rows, percent)
    print(results.with_suffix(".md").read_text())
    tables.plot(rows, measures, results.with_suffix(".png"))
    return rows


def part(samples: Samples, chosen: Tensor) -> Samples:
    """Some of the samples, by a mask or by positions."""
    return Samples(samples.inputs[chosen], samples.labels[chosen])


def shown(row: Row) -> None:
    """Print a row as soon as it is there."""
    share = "" if row.share is None else f"{row.share:.0%}"
    extra = "" if row.step is None else f"  step {row.step:g}, {row.seconds or 0:.0f} s"
    values = "  ".join(f"{name} {value:.4f}" for name, value in row.values.items())
    print(f"seed {row.seed}  {row.method:10s} {share:>5s}  {values}{extra}", flush=True)


def timed(make: Make, method: InfluenceFunction) -> tuple[ModelEdit, float]:
    """The edit that a method gives, and the seconds it took."""
    began = time.perf_counter()
    edit = make(method)
    return edit, time.perf_counter() - began


def quiet() -> None:
    """One thread, and none of the warnings that a solver stopped early: here that is the setting."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*(stopped before its tolerance|did not converge)")
