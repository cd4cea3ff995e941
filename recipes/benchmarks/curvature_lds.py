"""LDS of influence functions on the digits: every curvature of this library, at its default damping and a chosen one.

    python recipes/benchmarks/curvature_lds.py --cache /tmp/truths --out recipes/results/curvature_lds.md

The set-up is that of peers_digits.py, and so are the three models of each kind: a Trainer fits `DigitsClassifier` with
the recipe's order of batches, and the weights that `GradientSnapshot` leaves in the store are checked to be those of
`reference_model`. Everything else goes through `InfluenceModule`, as a user would ask it: the curvature is estimated
from the training data when it is needed, or from the stored gradients (DataInf, LoGra). "auto" is the damping that
`InfluenceModule.choose_damping` finds with 200 images that are neither trained on nor asked about; it never sees the
truths. Exact curvatures are asked of the logistic regression alone; of the MLP they are not affordable (a step of
conjugate gradients with all queries takes 3 s there, and many are needed). CPU seconds are those of one model: the
curvature and all 200 x 1,000 scores, choosing apart.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import (
    EKFAC,
    KFAC,
    Attributor,
    DataInf,
    Diagonal,
    EmbeddingCosine,
    FactorProjection,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    LowRank,
    MatrixFree,
    ProjectedGram,
    Random,
    TracIn,
)
from lightning_influence.curvature import Dense
from lightning_influence.damping_choice import DampingChoice
from lightning_influence.metrics import QueryMean, linear_datamodeling_score, mean_over_models, noise_ceiling
from recipes.benchmarks.measuring import Row, report, timed
from recipes.truths.digits import (
    MODELS,
    RECIPES,
    REFERENCE_SEEDS,
    DigitsClassifier,
    Kind,
    digits,
    half_subset_truth,
    half_subsets,
    held_out,
    reference_model,
)
from recipes.truths.retraining import Samples
from recipes.truths.training import RecipesOrder, initial

RANK = 16  # of LoGra's projections, on either side of a layer


@dataclass(frozen=True)
class Fit:
    """A fitted model, and the loader and the stores of its fit: gradients in full, and projected."""

    module: LightningModule
    loader: DataLoader[Any]
    whole: Path
    projected: Path

    def ask(self, method: Method) -> InfluenceModule:
        """The method, ready to be asked."""
        store = self.projected if method.projected else self.whole
        return InfluenceModule(
            self.module, store, method.estimator(), measurement=method.measurement, train_loader=self.loader
        )


@dataclass(frozen=True)
class Method:
    """A line of the table.

    Args:
        name: of the method.
        estimator: made anew for every model, so that nothing is remembered.
        damping: what the table says of it; where it is "auto" it is chosen first.
        projected: ask the store of projected gradients.
        measurement: what queries are asked about, and which truth judges.
        only: the one kind of model that it is affordable for.
    """

    name: str
    estimator: Callable[[], Attributor]
    damping: str = ""
    projected: bool = False
    measurement: Literal["loss", "log_odds"] = "loss"
    only: Kind | None = None


@dataclass
class Found:
    """What a method did on the three models."""

    lds: list[QueryMean] = field(default_factory=list)
    choices: list[DampingChoice] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    choosing: list[float] = field(default_factory=list)


TENTH = "0.1·mean"
METHODS = (
    Method("random", lambda: Random(seed=0)),
    Method("cosine of the pixels", lambda: EmbeddingCosine(lambda module, batch: batch[0])),
    Method("gradient dot product, final weights", TracIn),
    Method("K-FAC, exact labels", lambda: InfluenceFunction(KFAC(), labels="exact"), TENTH),
    Method("K-FAC, sampled labels", lambda: InfluenceFunction(KFAC(), labels="sampled"), TENTH),
    Method("EK-FAC, exact labels (the default)", lambda: InfluenceFunction(EKFAC()), TENTH),
    Method("EK-FAC, sampled labels", lambda: InfluenceFunction(EKFAC(), labels="sampled"), TENTH),
    Method("EK-FAC, observed labels", lambda: InfluenceFunction(EKFAC(), labels="observed"), TENTH),
    Method("EK-FAC, exact labels (the default)", lambda: InfluenceFunction(EKFAC(), damping="auto"), "auto"),
    Method(
        "EK-FAC, sampled labels",
        lambda: InfluenceFunction(EKFAC(), labels="sampled", damping="auto"),
        "auto",
    ),
    Method("exact Hessian", lambda: InfluenceFunction(Dense("hessian")), TENTH, only="logistic_regression"),
    Method(
        "exact Hessian",
        lambda: InfluenceFunction(Dense("hessian"), damping="auto"),
        "auto",
        only="logistic_regression",
    ),
    Method(
        "Gauss–Newton, matrix-free to 1%",
        lambda: InfluenceFunction(MatrixFree(tolerance=1e-2), damping=1e-2),
        "0.01",
        only="logistic_regression",
    ),
    Method("Gauss–Newton, rank 50", lambda: InfluenceFunction(LowRank(50)), TENTH),
    Method("Gauss–Newton, rank 50", lambda: InfluenceFunction(LowRank(50), damping="auto"), "auto"),
    Method("diagonal", lambda: InfluenceFunction(Diagonal()), TENTH),
    Method("diagonal", lambda: InfluenceFunction(Diagonal(), damping="auto"), "auto"),
    Method("DataInf", lambda: InfluenceFunction(DataInf()), TENTH),
    Method("DataInf", lambda: InfluenceFunction(DataInf(), damping="auto"), "auto"),
    Method(f"LoGra, rank {RANK}", lambda: InfluenceFunction(ProjectedGram()), TENTH, projected=True),
    Method(f"LoGra, rank {RANK}", lambda: InfluenceFunction(ProjectedGram(), damping="auto"), "auto", projected=True),
    Method("EK-FAC, exact labels (the default)", lambda: InfluenceFunction(EKFAC()), TENTH, measurement="log_odds"),
    Method(
        f"LoGra, rank {RANK}",
        lambda: InfluenceFunction(ProjectedGram()),
        TENTH,
        projected=True,
        measurement="log_odds",
    ),
    Method(
        f"LoGra, rank {RANK}",
        lambda: InfluenceFunction(ProjectedGram(), damping="auto"),
        "auto",
        projected=True,
        measurement="log_odds",
    ),
)


def dataset(samples: Samples) -> TensorDataset:
    """Images and labels."""
    return TensorDataset(samples.inputs, samples.labels)


def fitted(kind: Kind, seed: int, cache: Path, folder: Path) -> Fit:
    """The reference model of a seed, fitted by a Trainer with the callbacks of a user.

    Raises:
        RuntimeError: the weights are not those of the reference model.
    """
    recipe, train = RECIPES[kind], dataset(digits().train)
    module = DigitsClassifier(kind)
    module.model.load_state_dict(initial(MODELS[kind], seed).state_dict())
    loader = DataLoader(train, recipe.batch_size, sampler=RecipesOrder(recipe, len(train), seed))
    whole, projected = folder / "whole", folder / "projected"
    once = recipe.epochs  # the last epoch's end is the one checkpoint
    callbacks: list[Callback] = [
        GradientSnapshot(whole, "all", every_n_epochs=once),
        GradientSnapshot(projected, "all", every_n_epochs=once, projection=FactorProjection(RANK)),
    ]
    trainer = Trainer(
        max_epochs=once, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    reference = reference_model(kind, seed, cache)
    for (name, ours), theirs in zip(module.model.named_parameters(), reference.parameters(), strict=True):
        if not torch.allclose(ours, theirs, rtol=0, atol=1e-5):
            raise RuntimeError(f"{name} differs by {float((ours - theirs).abs().max()):.2g} from the reference model.")
    return Fit(module.eval(), loader, whole, projected)


def ask(fit: Fit, method: Method, queries: Any, held: DataLoader[Any], found: Found) -> Tensor:
    """The scores (Q, N), the damping chosen before if it is to be."""
    influence = fit.ask(method)
    if method.damping == "auto":
        found.choosing.append(timed(lambda: found.choices.append(influence.choose_damping(held))))
        influence = fit.ask(method)  # estimates its curvature again, so that its seconds are those of the others
    scores: list[Tensor] = []
    found.seconds.append(timed(lambda: scores.append(influence.scores(queries))))
    return scores[0]


def rows_of(kind: Kind, methods: tuple[Method, ...], cache: Path) -> list[Row]:
    """The lines of one kind of model."""
    truth, subsets = half_subset_truth(kind, cache), half_subsets()
    measured = {"loss": truth.losses, "log_odds": truth.log_odds}
    queries = dataset(digits().queries).tensors
    held = DataLoader(dataset(held_out()), 200)
    results = {method: Found() for method in methods if method.only in (None, kind)}
    for seed in REFERENCE_SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            fit = fitted(kind, seed, cache, Path(folder))
            for method, found in results.items():
                scores = ask(fit, method, queries, held, found)
                found.lds.append(linear_datamodeling_score(scores, subsets, measured[method.measurement]))
                print(f"{kind} {seed}, {method.name}, {method.damping}, {method.measurement}: {found.lds[-1]}, "
                      f"{found.seconds[-1]:.2f} s", flush=True)  # fmt: skip
    ceilings = [
        {**_row(kind, "half of the seeds against the other half", noise_ceiling(truth).halves), "of": measurement}
        for measurement, truth in measured.items()
    ]
    return ceilings + [_line(kind, method, found) for method, found in results.items()]


def _line(kind: Kind, method: Method, found: Found) -> Row:
    damping = method.damping
    if found.choices:
        damping = f"auto: {', '.join(_shown(choice) for choice in found.choices)}"
    return {
        **_row(kind, method.name, mean_over_models(found.lds)),
        "damping": damping,
        "of": method.measurement,
        "of the three models": " ".join(f"{one.mean:.3f}" for one in found.lds),
        "CPU s": round(statistics.median(found.seconds), 2),
        "choosing, CPU s": round(statistics.median(found.choosing), 1) if found.choosing else "",
    }


def _shown(choice: DampingChoice) -> str:
    ((how, value),) = choice.damping.record().items()
    return f"{value:.3g}·mean" if how == "relative" else f"{value:.3g}"


def _row(kind: Kind, name: str, lds: QueryMean) -> dict[str, str | float]:
    interval = f"{lds.low:.3f} to {lds.high:.3f}"
    blank: dict[str, str | float] = {"model": kind, "of": "", "what": name, "damping": ""}
    return {**blank, "LDS": f"{lds.mean:.3f}", "95% interval": interval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the truths")
    parser.add_argument("--kind", choices=list(MODELS), action="append", help="one of the two models; both if omitted")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    methods = tuple(method for method in METHODS if options.only in method.name)
    rows = [row for kind in options.kind or MODELS for row in rows_of(kind, methods, options.cache)]
    report("LDS of influence functions on the digits", rows, options.out, models=3, queries=200, samples=1000)


if __name__ == "__main__":
    main()
