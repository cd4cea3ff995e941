"""Which pretraining images made the finetuned network say this: multi-stage influence against training both runs again.

python recipes/two_stages.py                 # scikit-learn's digits, some minutes
python recipes/two_stages.py quick=true      # a part of it
python recipes/two_stages.py setting=two_stages_mnist data_root=/path/to/data   # MNIST
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from lightning_influence.metrics import QueryMean, linear_datamodeling_score, noise_ceiling
from recipes import tables
from recipes.stages import removals
from recipes.stages.data import Tasks, part, tasks_of
from recipes.stages.fitting import check_losses, finetuned, pretrained
from recipes.stages.methods import methods
from recipes.stages.network import TwoRuns
from recipes.stages.removals import Agreement, agreement, ahead, predicted
from recipes.stages.retraining import retrain_both
from recipes.truths.retraining import Samples


@dataclass(frozen=True)
class Truth:
    """What networks say whose both runs were repeated.

    Args:
        subsets: halves of the pretraining samples.
        subset_losses: of the queries, after pretraining on each (S, seeds, Q).
        groups: removed samples, coherent ones first.
        losses: with all samples, and without each group (1 + G, seeds, Q).
        single_losses: likewise, without one sample each.
        singles: those samples.
        accuracy: on the queries, of the networks that have seen all.
    """

    subsets: Sequence[Tensor]
    subset_losses: Tensor
    groups: Sequence[Tensor]
    losses: Tensor
    singles: Sequence[Tensor]
    single_losses: Tensor
    accuracy: float


@dataclass(frozen=True)
class Judged:
    """A method and how it did."""

    name: str
    baseline: bool
    lds: QueryMean
    groups: Agreement
    singles: Agreement
    foretold: Tensor  # (G, Q)
    seconds: float


def truth_of(config: Any, runs: TwoRuns, tasks: Tasks, queries: Samples, cache: str) -> Truth:
    """Repeat both runs, many at once."""
    samples, seeds = tasks.pretraining, list(config.retrained)
    size = len(samples)
    subsets = removals.random_groups(samples, config.truth.subsets, size // 2, config.truth.seed)
    groups = [
        *removals.coherent_groups(samples, config.truth.groups // 2, config.truth.group_size, config.truth.seed + 1),
        *removals.random_groups(samples, config.truth.groups // 2, config.truth.group_size, config.truth.seed + 2),
    ]
    singles = removals.random_groups(samples, config.truth.singles, 1, config.truth.seed + 3)
    every = torch.arange(size)
    again = partial(retrain_both, runs, tasks, queries, seeds=seeds, cache=cache)
    of_subsets = again(subsets)
    of_groups = again([every] * (len(groups) + 1), weights=removals.without(groups, size))
    of_singles = again([every] * (len(singles) + 1), weights=removals.without(singles, size))
    return Truth(
        subsets, of_subsets.losses, groups, of_groups.losses, singles, of_singles.losses,
        float(of_groups.right[0].double().mean()),
    )  # fmt: skip


def judged(config: Any, runs: TwoRuns, tasks: Tasks, queries: Samples, truth: Truth) -> list[Judged]:
    """All methods, on the mean of their scores of several fits."""
    listed = methods(runs.finetuning.frozen, config.exact)
    scores: dict[str, Tensor] = {}
    seconds: dict[str, float] = dict.fromkeys((method.name for method in listed), 0.0)
    for seed in config.seeds:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            first = pretrained(
                runs, tasks.pretraining, seed, root / "pretraining", checkpoints=config.tracin_checkpoints
            )
            fits = finetuned(runs, tasks.finetuning, seed, first, root / "finetuning")
            if seed in config.retrained:
                check_losses(fits, queries, truth.losses[0, list(config.retrained).index(seed)])
            for method in listed:
                began = time.perf_counter()
                found = method.scores(fits, queries, tasks.pretraining) / len(config.seeds)
                seconds[method.name] += (time.perf_counter() - began) / len(config.seeds)
                scores[method.name] = scores.get(method.name, torch.zeros_like(found)) + found
    of_groups, of_singles = (removals.changes(losses).mean(1) for losses in (truth.losses, truth.single_losses))
    rows = []
    for method in listed:
        own = scores[method.name]
        foretold = predicted(own, truth.groups)
        lds = linear_datamodeling_score(own, truth.subsets, truth.subset_losses)
        singles = agreement(predicted(own, truth.singles), of_singles)
        row = Judged(
            method.name, method.baseline, lds, agreement(foretold, of_groups), singles, foretold, seconds[method.name]
        )
        print(f"{row.name}: LDS {row.lds}, groups {row.groups.pearson}, {row.seconds:.1f} s", flush=True)
        rows.append(row)
    return rows


def lines(setting: str, truth: Truth, rows: Sequence[Judged]) -> list[dict[str, object]]:
    """The rows of the table."""
    best = max((row for row in rows if row.baseline), key=lambda row: row.groups.pearson.value)
    noise = noise_ceiling(truth.subset_losses).halves if truth.subset_losses.shape[1] > 1 else ""
    found: list[dict[str, object]] = [
        {
            "embedding": setting,
            "method": "(half of the seeds against the other half)",
            "LDS": noise,
            "groups, Pearson": removals.agreement_of_halves(removals.changes(truth.losses)),
            "groups, Spearman": "",
            "groups, mean loss": "",
            "singles, Pearson": removals.agreement_of_halves(removals.changes(truth.single_losses)),
        }
    ]
    for row in rows:
        found.append(
            {
                "embedding": setting,
                "method": row.name,
                "LDS": row.lds,
                "groups, Pearson": row.groups.pearson,
                "groups, Spearman": row.groups.spearman,
                "groups, mean loss": row.groups.mean_loss,
                "singles, Pearson": row.singles.pearson,
                "singles, Spearman": row.singles.spearman,
                "Pearson over the best baseline's": "" if row.baseline else ahead(row.groups, best.groups),
                "s": row.seconds,
            }
        )
    return found


def remarks(config: Any, tasks: Tasks, truths: Mapping[str, Truth]) -> str:
    """What was done."""
    rates = "; ".join(
        f"{name}: rate {how.recipe.learning_rate * how.embedding:g}, of the head {how.recipe.learning_rate:g}, "
        f"{how.recipe.epochs} epochs"
        for name, how in ((name.replace("_", " "), how) for name, how in config.finetuning.items())
    )
    exact = (
        ""
        if config.exact is None
        else f"“Exact”: the Gauss–Newton matrix, damping {config.exact}; “EK-FAC, then exact”: EK-FAC for pretraining "
        "and the exact one for finetuning. "
    )
    accuracies = ", ".join(f"{name} {truth.accuracy:.1%}" for name, truth in truths.items())
    return (
        f"Pretrained on {len(tasks.pretraining)} images of the classes {list(config.tasks.pretraining)}, finetuned on "
        f"{len(tasks.finetuning)} of {list(config.tasks.finetuning)}, widths {list(config.widths)} with tanh, "
        f"weight decay {config.pretraining.weight_decay:g} in pretraining; "
        f"{config.queries} test images are asked about by their loss (accuracy: {accuracies}). The embedding's "
        f"learning: {rates}.\n\n"
        f"Truth: both runs trained again with seeds {list(config.retrained)}. LDS: {config.truth.subsets} random "
        f"halves of the pretraining set. Groups: {config.truth.group_size} pretraining images left out, "
        f"{config.truth.groups} times (first half: neighbours of one class, second half: any); singles: one image left "
        f"out, {config.truth.singles} times; both with 1/N kept, and against the whole model of the same seed. Scores "
        f"are means over the models of seeds {list(config.seeds)}, fitted by a Trainer and equal to the retrained ones "
        "of those seeds. Hyper-parameters, the weight decay among them, were chosen on scikit-learn's digits with "
        "other seeds and removals but the same test images, by the correlation that EK-FAC reached. Correlations are "
        "taken for each query and averaged; in brackets the 95% bootstrap interval, over queries for the LDS, over "
        "groups and queries for removals. “Mean loss”: Pearson for the queries' mean loss.\n\n"
        f"{exact}“Without a link”: the query's gradient at the finetuned weights as it is, which for a fixed embedding "
        "is multi-stage influence with ignore_cross_terms=True. “s”: seconds for one model's scores, the curvature "
        "included where it is not EK-FAC."
    )


@hydra.main(version_base="1.3", config_path="../configs", config_name="two_stages")
def main(config: DictConfig) -> float:
    """Compare, write the table and the picture, and return the best Pearson correlation with a frozen embedding."""
    config = tables.chosen(config)
    tasks = tasks_of(config)
    queries = part(tasks.test, slice(config.queries))
    results, rows, truths, found = Path(config.results), [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, how in config.finetuning.items():
            setting = str(name).replace("_", " ")
            runs = TwoRuns.of(tasks, config.widths, instantiate(config.pretraining), instantiate(how))
            truths[setting] = truth_of(config, runs, tasks, queries, config.cache or folder)
            found[setting] = judged(config, runs, tasks, queries, truths[setting])
            rows += lines(setting, truths[setting], found[setting])
            told = remarks(config, tasks, truths)
            tables.write(
                results.with_suffix(".md"), f"Two stages, {config.title}", config.command, [told, tables.table(rows)]
            )
    panels = [partial(_scatter, name, truths[name], found[name]) for name in found]
    panels += [partial(_bars, name, found[name]) for name in found]
    tables.picture(results.with_suffix(".png"), panels, width=5.6)
    return max(row.groups.pearson.value for row in next(iter(found.values())) if not row.baseline)


def _best(rows: Sequence[Judged]) -> Judged:
    """The method that is drawn: the best with EK-FAC alone that tells amounts."""
    drawn = [row for row in rows if row.name.endswith("EK-FAC") and "small" not in row.name and not row.baseline]
    return max(drawn, key=lambda row: row.groups.pearson.value)


def _scatter(setting: str, truth: Truth, rows: Sequence[Judged], axis: Any) -> None:
    row, true = _best(rows), removals.changes(truth.losses).mean((1, 2))
    foretold, half = row.foretold.mean(1), len(truth.groups) // 2
    for kind, name in ((slice(half), "of one class"), (slice(half, None), "random")):
        axis.scatter(foretold[kind], true[kind], s=14, label=name)
    axis.axline((0, 0), slope=1, color="black", linewidth=0.6)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel("predicted change of the mean test loss", fontsize=8)
    axis.set_ylabel("both runs trained again", fontsize=8)
    axis.set_title(f"embedding {setting}: {row.name}", fontsize=8)
    axis.legend(fontsize=7)


def _bars(setting: str, rows: Sequence[Judged], axis: Any) -> None:
    measures = {
        "LDS": [(row.lds.mean, row.lds.low, row.lds.high) for row in rows],
        "groups, Pearson": [(p.value, p.low, p.high) for p in (row.groups.pearson for row in rows)],
    }
    tables.paired_bars(axis, [row.name for row in rows], measures)
    axis.set_title(f"embedding {setting}", fontsize=8)


if __name__ == "__main__":
    main()
