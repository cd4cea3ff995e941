"""Choosing λ: small removals are trained for a short while, and the damping that foretells them best is kept."""

from __future__ import annotations

import copy
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional import spearman_corrcoef
from tqdm.auto import tqdm

from lightning_influence.artifacts import ArtifactStore
from lightning_influence.callbacks.optimizer_record import optimizers_in
from lightning_influence.curvature import Damping, Relative, TrainingEvidence
from lightning_influence.errors import CurvatureError, QueryError
from lightning_influence.estimators.estimator import Queries, Stage
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.gradients import Dense, Gradients, inner, select
from lightning_influence.replay import TrainingData

FACTORS = tuple(10.0 ** (power / 4) for power in range(-16, 9))  # of the mean eigenvalue: 0.0001 to 100, four a decade


@dataclass(frozen=True)
class DampingChoice:
    """What `choose_damping` found.

    Attributes:
        damping: what was chosen: the best of the curve times `horizon`.
        curve: of every damping of the grid its mean rank correlation, over the held-out queries, between foretold and
            true changes of the short trainings; NaN where it could not be solved.
        horizon: sum of the learning rates of a short training over that of the fit, at most 1.
        removals, fraction, steps: how many parts of the training set were removed, how large, and trained how long.
        seconds: what it took.
    """

    damping: Damping
    curve: tuple[tuple[Damping, float], ...]
    horizon: float
    removals: int
    fraction: float
    steps: int
    seconds: float

    def record(self) -> dict[str, Any]:
        """The choice as plain JSON."""
        return {
            **self.damping.record(),
            "curve": [{**damping.record(), "spearman": None if s != s else s} for damping, s in self.curve],
            "horizon": self.horizon,
            "removals": self.removals,
            "fraction": self.fraction,
            "steps": self.steps,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Removals:
    """Which parts of the training set are removed, and how each is trained for a while.

    Attributes:
        count: at least 16 of them.
        fraction: of the training set in each.
        steps: optimizer steps of each short training; `None` is a third of those up to the curvature's checkpoint.
        seed: of the parts and of the order of the batches, which is the same in all trainings.
        trainer: arguments for the Trainer of the short trainings, such as `{"accelerator": "gpu"}`.
    """

    count: int = 16
    fraction: float = 0.05
    steps: int | None = None
    seed: int = 0
    trainer: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.count < 16 or not 0 < self.fraction < 1 or (self.steps is not None and self.steps < 1):
            raise QueryError(
                "these removals say too little about a damping",
                expected="count >= 16, 0 < fraction < 1, steps >= 1",
                found=f"count={self.count}, fraction={self.fraction}, steps={self.steps}",
                hint="leave the defaults: 16 removals of 5% each",
            )

    def parts(self, length: int) -> list[Tensor]:
        """The samples of each removal, (k,) ascending."""
        generator = torch.Generator().manual_seed(self.seed)
        size = max(1, round(self.fraction * length))
        return [torch.randperm(length, generator=generator)[:size].sort().values for _ in range(self.count)]


def choose_damping(
    stage: Stage,
    estimator: InfluenceFunction,
    queries: Queries,
    measured: Callable[[LightningModule], Tensor],
    removals: Removals,
    grid: Sequence[Damping] | None = None,
) -> DampingChoice:
    """The damping of a grid that foretells small removals best.

    For each removed part S the model is trained on, from its final weights and without S, with its own
    `training_step`, batch size and a fresh optimizer without its schedulers; another copy is trained on alike with all
    samples. The true change of a query's m is the difference of the two; the foretold one is
    (1/N) <∇m(q), (H + λI)⁻¹ Σ_{z in S} ∇ℓ(z)>. The best λ is the one with the highest Spearman correlation over the
    removals, averaged over the queries.

    A training that stops early moves as if it were damped: K gradient steps at rate η have the spectral filter
    (1 − exp(−ηKσ))/σ, which is about 1/(σ + 1/(ηK)). So the best λ of a short training is too large for the fit, by
    about the ratio of their sums of rates; it is multiplied with that ratio.

    Args:
        stage: model, store and `train_loader`.
        estimator: whose curvature is damped.
        queries: held out of training, and not those that are asked about later.
        measured: the measurement m of each query (Q,) at the weights of a module.
        removals: how many, how large, how long.
        grid: dampings to try; default: 0.0001 to 100 times the mean eigenvalue of each block.
    """
    began = time.perf_counter()
    found = estimator.recorded(stage)
    names = found.curvature.parameters
    length = stage.store.manifest.dataset_length
    parts = removals.parts(length)
    data = TrainingData.of(stage.train_loader, forked=True)
    steps = removals.steps or max(1, found.at.step // 3)
    with stage.at(found.at) as module:
        changes, rates = true_changes(module, data, parts, measured, removals, steps)  # (S, Q)
        removed = _summed_gradients(stage, module, data, names, parts)  # S rows
    asked = queries.gradients_at(found.at, names)
    curve = []
    for damping in grid or [Relative(factor) for factor in FACTORS]:
        try:
            foretold = inner(estimator.change(stage, found, removed, damping), asked).T  # (S, Q)
            curve.append((damping, _agreement(foretold.double().cpu(), changes)))
        except CurvatureError:  # singular at this damping, or one that an iterative solver cannot reach
            curve.append((damping, float("nan")))
    best = max(curve, key=lambda pair: -2.0 if pair[1] != pair[1] else pair[1])
    if best[1] != best[1]:
        raise QueryError(
            "no damping of the grid could be judged",
            expected="queries whose measurement changes when samples are removed",
            found="constant changes, or a curvature that cannot be inverted",
            hint="train the removals for more steps: Removals(steps=...), or look at the held-out queries",
        )
    of_fit = sum(max((g.learning_rate_sum for g in c.groups), default=0.0) for c in stage.checkpoints)
    horizon = min(1.0, rates / of_fit) if of_fit > 0 else 1.0
    return DampingChoice(
        damping=best[0].times(horizon),
        curve=tuple(curve),
        horizon=horizon,
        removals=removals.count,
        fraction=removals.fraction,
        steps=steps,
        seconds=time.perf_counter() - began,
    )


def record_choice(store: ArtifactStore, curvature: str, choice: DampingChoice) -> None:
    """Keep a choice in the store, where `InfluenceFunction(damping="auto")` finds it."""
    writer = ArtifactStore.resume(store.root, store.manifest, None)
    known = writer.manifest.facts.get("damping")
    writer.record("damping", {**(known if isinstance(known, dict) else {}), curvature: choice.record()})


def _agreement(foretold: Tensor, changes: Tensor) -> float:
    """Mean over the queries, in columns, of the rank correlation over the removals; constant columns say nothing."""
    telling = (changes.std(0) > 0) & (foretold.std(0) > 0)
    if not bool(telling.any()):
        return float("nan")
    return float(torch.as_tensor(spearman_corrcoef(foretold[:, telling], changes[:, telling])).mean())


def true_changes(
    module: LightningModule,
    data: TrainingData,
    parts: Sequence[Tensor],
    measured: Callable[[LightningModule], Tensor],
    removals: Removals,
    steps: int,
) -> tuple[Tensor, float]:
    """m after training on without each part, less m after training on with all, (S, Q); and the sum of the rates."""
    nothing = torch.zeros(0, dtype=torch.int64)
    with _silent():
        before, rates = _measured_after(module, data, nothing, measured, removals, steps)
        rows = [
            _measured_after(module, data, part, measured, removals, steps)[0] - before
            for part in tqdm(parts, desc="trained removals", delay=2.0, leave=False)
        ]
    return torch.stack(rows), rates


def _measured_after(
    module: LightningModule,
    data: TrainingData,
    removed: Tensor,
    measured: Callable[[LightningModule], Tensor],
    removals: Removals,
    steps: int,
) -> tuple[Tensor, float]:
    """m of each query (Q,) after a copy of the module was trained on for some steps without the samples `removed`, and
    the sum of the rates of these steps."""
    trained = copy.deepcopy(module)
    with isolate_rng(), torch.inference_mode(False), torch.enable_grad():
        trained.train()
        _without_schedulers(trained)
        for seeded in (random.seed, np.random.seed, torch.manual_seed):  # seed_everything would stay in os.environ
            seeded(removals.seed)
        batches = _Batches(len(data), data.batch_size, removed, removals.seed)
        loader = DataLoader(
            data.dataset, batch_sampler=batches, collate_fn=data.collate, num_workers=data.loader.num_workers
        )
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "max_epochs": -1,
            "accelerator": "cpu" if module.device.type == "cpu" else "auto",
            "devices": 1,
        }
        trainer = Trainer(**{**quiet, **(removals.trainer or {}), "max_steps": steps})
        trainer.fit(trained, loader)
        rate = max(float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
        return measured(trained.to(module.device)).detach().double().cpu(), rate * steps


@contextmanager
def _silent() -> Iterator[None]:
    """Without Lightning's remarks on every one of many small Trainers."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            yield
    finally:
        logger.setLevel(level)


def _without_schedulers(module: LightningModule) -> None:
    """Let a short training go on at the rate that the module's optimizers begin with."""
    own = module.configure_optimizers

    module.__dict__["configure_optimizers"] = lambda: optimizers_in(own())


class _Batches:
    """The batches of shuffled epochs, the same whatever is removed from them."""

    def __init__(self, length: int, batch_size: int, removed: Tensor, seed: int) -> None:
        self._length, self._batch_size = length, batch_size
        self._removed = frozenset(removed.tolist())
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-self._length // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self._length, generator=self._generator).tolist()
        for start in range(0, self._length, self._batch_size):
            kept = [i for i in order[start : start + self._batch_size] if i not in self._removed]
            if kept:
                yield kept


def _summed_gradients(
    stage: Stage, module: LightningModule, data: TrainingData, names: Sequence[str], parts: Sequence[Tensor]
) -> Gradients:
    """Σ_{z in S} ∇ℓ(z) of each part, as the rows of one block a parameter."""
    selection = select(module, list(names))
    rows = [
        TrainingEvidence(
            module,
            selection,
            data,
            positions=part.tolist(),
            per_sample_loss=stage.per_sample_loss,
            reduction=stage.reduction,
        ).summed_gradients("removed samples")
        for part in parts
    ]
    kinds = {name: p.dtype for name, p in selection.parameters.items()}
    return {name: Dense(torch.stack([row[name] for row in rows]).to(kinds[name])) for name in selection.names}
