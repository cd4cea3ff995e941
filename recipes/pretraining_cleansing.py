"""Which pretraining labels hurt the finetuned network? Flipped ones ranked by multi-stage influence, and left out.

python recipes/pretraining_cleansing.py                 # scikit-learn's digits, some minutes
python recipes/pretraining_cleansing.py quick=true      # a part of it
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
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
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from lightning_influence import InfluenceFunction, InfluenceModule, Proximity, Source
from recipes import tables
from recipes.stages import removals
from recipes.stages.data import Tasks, tasks_of
from recipes.stages.fitting import TwoFits, fitted
from recipes.stages.methods import estimator, gradient_dot
from recipes.stages.network import TwoRuns
from recipes.stages.retraining import Measured, retrain_both
from recipes.truths.retraining import Samples


@dataclass(frozen=True)
class Flipped:
    """Tasks with wrong labels in pretraining.

    Args:
        tasks: with them.
        wrong: which pretraining samples have one (N,).
    """

    tasks: Tasks
    wrong: Tensor


def flipped(tasks: Tasks, share: float, seed: int) -> Flipped:
    """Give a share of the pretraining samples another label."""
    generator = torch.Generator().manual_seed(seed)
    labels, classes = tasks.pretraining.labels.clone(), tasks.classes[0]
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    labels[chosen] = (labels[chosen] + torch.randint(1, classes, (len(chosen),), generator=generator)) % classes
    wrong = torch.zeros(len(labels), dtype=torch.bool).index_fill(0, chosen, True)
    return Flipped(replace(tasks, pretraining=Samples(tasks.pretraining.inputs, labels)), wrong)


def suspicion(fits: TwoFits, tasks: Tasks, frozen: bool, seed: int) -> dict[str, Tensor]:
    """How suspicious every pretraining sample is (N,), by all methods: the highest are left out first."""
    asked = DataLoader(TensorDataset(tasks.validation.inputs, tasks.validation.labels), 100)
    links = {"": Proximity()} if frozen else {"proximity, ": Proximity(), "SOURCE, ": Source()}
    found = {f"multi-stage, {name}EK-FAC": -estimator(fits, link).group_scores(asked) for name, link in links.items()}
    first = fits.first
    own = InfluenceModule(first.module, first.store, InfluenceFunction("ekfac"), train_loader=first.loader)
    found["self-influence in pretraining"] = own.self_influence()
    with torch.no_grad():
        samples = tasks.pretraining
        found["loss in pretraining"] = F.cross_entropy(first.module(samples.inputs), samples.labels, reduction="none")
    found["gradient dot product"] = -gradient_dot(fits, tasks.validation, tasks.pretraining).sum(0)
    found["random"] = torch.rand(len(samples), generator=torch.Generator().manual_seed(seed))
    return {name: values.double() for name, values in found.items()}


def rows_of(config: Any, seed: int, cache: str) -> list[dict[str, object]]:
    """All methods on one model, each with what leaving out its first samples gives."""
    data = flipped(tasks_of(config), config.flipped, config.flipping_seed + seed)
    tasks, size = data.tasks, len(data.wrong)
    runs = TwoRuns.of(tasks, config.widths, instantiate(config.pretraining), instantiate(config.finetuning))
    with tempfile.TemporaryDirectory() as folder:
        fits = fitted(runs, tasks, seed, Path(folder))
        suspicious = suspicion(fits, tasks, runs.finetuning.frozen, seed)
    counts = [round(share * size) for share in config.shares]
    orders = {name: values.argsort(descending=True) for name, values in suspicious.items()}
    groups = [order[:count] for order in orders.values() for count in counts]
    groups.append(data.wrong.nonzero().squeeze(1))
    weights = removals.without(groups, size)
    split = len(tasks.validation)
    both = Samples(
        torch.cat([tasks.validation.inputs, tasks.test.inputs]), torch.cat([tasks.validation.labels, tasks.test.labels])
    )
    again = retrain_both(
        runs, tasks, both, [torch.arange(size)] * len(weights), seeds=[seed], weights=weights, cache=cache
    )
    rows = [_row("nothing left out", None, None, again, 0, split)]
    rows.append(_row("the flipped ones left out", None, 1.0, again, len(weights) - 1, split))
    for number, (name, order) in enumerate(orders.items()):
        for place, (share, count) in enumerate(zip(config.shares, counts, strict=True)):
            caught = float(data.wrong[order[:count]].double().sum() / data.wrong.sum())
            rows.append(_row(name, share, caught, again, 1 + number * len(counts) + place, split))
    return [{**row, "seed": seed} for row in rows]


def averaged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Rows of one method and share as one row: mean ± standard deviation over the seeds."""
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["ranked by"], row["left out"]), []).append(row)
    found = []
    for members in groups.values():
        merged: dict[str, object] = {}
        for name, value in members[0].items():
            if isinstance(value, float):
                values = torch.tensor([member[name] for member in members], dtype=torch.float64)
                spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
                merged[name] = f"{values.mean():.3f}{spread}"
            elif name != "seed":
                merged[name] = value
        found.append(merged)
    return found


@hydra.main(version_base="1.3", config_path="../configs", config_name="pretraining_cleansing")
def main(config: DictConfig) -> float:
    """Rank, leave out, train again; write the table and the picture, and return the best share that was found."""
    config = tables.chosen(config)
    results, rows = Path(config.results), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in config.seeds:
            rows += rows_of(config, seed, config.cache or folder)
            tables.write(
                results.with_suffix(".md"),
                f"Cleansing of pretraining labels, {config.title}",
                config.command,
                [_remarks(config), tables.table(averaged(rows))],
            )
    panels = [partial(_panel, rows, name) for name in ("flipped labels found", "test loss", "test accuracy")]
    tables.picture(results.with_suffix(".png"), panels)
    first = config.shares[0]
    return float(max(row["flipped labels found"] for row in rows if row["left out"] == f"{first:.0%}"))


def _row(
    name: str, share: float | None, caught: float | None, again: Measured, place: int, split: int
) -> dict[str, object]:
    losses, right = again.losses[place, 0], again.right[place, 0].double()
    return {
        "ranked by": name,
        "left out": "" if share is None else f"{share:.0%}",
        "flipped labels found": "" if caught is None else caught,
        "validation loss": float(losses[:split].mean()),
        "test loss": float(losses[split:].mean()),
        "test accuracy": float(right[split:].mean()),
    }


def _remarks(config: Any) -> str:
    return (
        f"{config.flipped:.0%} of the labels of {config.tasks.pretraining_size} pretraining images (classes "
        f"{list(config.tasks.pretraining)}) are wrong. Finetuned on {config.tasks.finetuning_size} images of the "
        f"classes {list(config.tasks.finetuning)}, embedding's learning rate {config.finetuning.embedding:g} of the "
        "head's (0: frozen). Multi-stage influence and gradient products ask about the summed loss of the finetuning "
        'validation images; the most harmful samples come first. "Flipped labels found": share of all wrong labels '
        "among those left out. Losses and accuracies are of the finetuning task, after both runs were trained again "
        "with the samples' weight 0 from the same initial weights and batches. Mean ± standard deviation over seeds "
        f"{list(config.seeds)}."
    )


def _panel(rows: Sequence[Mapping[str, Any]], measure: str, axis: Any) -> None:
    lines: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["left out"]:
            share = float(str(row["left out"]).rstrip("%"))
            lines.setdefault(row["ranked by"], {}).setdefault(share, []).append(row[measure])
        elif measure != "flipped labels found":
            lines.setdefault(row["ranked by"], {}).setdefault(0.0, []).append(row[measure])
    for name, points in lines.items():
        shares, means = list(points), [sum(values) / len(values) for values in points.values()]
        if name.endswith("left out"):
            axis.axhline(means[0], color="black", linewidth=1, linestyle=":" if "nothing" in name else "--", label=name)
        else:
            axis.plot(shares, means, marker="o", markersize=3, label=name)
    axis.set_xlabel("pretraining samples left out, %", fontsize=8)
    axis.set_title(measure, fontsize=9)
    axis.legend(fontsize=6)


if __name__ == "__main__":
    main()
