"""Gradients of queries: those of a measurement, for each query alone, at the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.artifacts import Checkpoint
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import Queries, Stage
from lightning_influence.estimators.tracin import look_ups
from lightning_influence.fitted import check_model
from lightning_influence.gradients import GradientBlock, GradientCapture, Gradients, Selection, cat, select
from lightning_influence.objective import Measurement, Objective, Predictions, query_objective
from lightning_influence.queries.batches import Carried, laid_aside, num_queries
from lightning_influence.replay import autocast, isolated, sample_gradients, to_device

_UNLABELLED = (KeyError, IndexError, AttributeError, TypeError, ValueError)  # what a training_step raises then


@dataclass(frozen=True)
class _Asked:
    """The queries of one call, and what the fitted model predicts of them once that has been asked.

    Attributes:
        batches: of queries.
        sizes: queries of each batch.
        trainer: that asks, if there is one.
    """

    batches: Sequence[Any]
    sizes: Sequence[int]
    trainer: Trainer | None

    @cached_property
    def predictions(self) -> list[Predictions]:
        """Of each batch, empty at first."""
        return [Predictions() for _ in self.sizes]

    def __iter__(self) -> Iterator[tuple[Any, int, Predictions]]:
        yield from zip(self.batches, self.sizes, self.predictions, strict=True)


@dataclass(frozen=True)
class QueryGradients:
    """Where query gradients come from.

    Attributes:
        stage: a store and its module.
        measurement: see `objective.query_objective`.
    """

    stage: Stage
    measurement: Measurement | None

    def of(self, batches: Sequence[Any], sizes: Sequence[int] | None, trainer: Trainer | None) -> Queries:
        """Queries of one call; batches without sizes come from outside a Trainer and are moved first."""
        module = self._module
        check_model(module, self.stage.store)
        if sizes is None:
            sizes, trainer = [num_queries(batch) for batch in batches], None
            batches = [laid_aside(to_device(batch, module, None)) for batch in batches]
        asked = _Asked(Carried(batches, module), sizes, trainer)
        return Queries(
            asked.batches, sizes, lambda at, names: self._at(at, names, asked, lambda parts: cat(list(parts)))
        )

    def together(self, batches: Sequence[Any]) -> Queries:
        """All queries of some batches as one: its gradient is the sum of theirs, held for one batch at a time.

        Raises:
            QueryError: there are none.
        """
        if not batches:
            raise QueryError("there are no queries", expected="one batch or more", found=0, hint="look at the loader")
        every = self.of(batches, None, None)
        asked = _Asked(every.batches, every.sizes, None)
        return Queries(every.batches, [1], lambda at, names: self._at(at, names, asked, _summed))

    def measured(self, module: LightningModule, batches: Sequence[Any]) -> Tensor:
        """The measurement of each query, (Q,), at the weights that a module has now."""
        placed = [laid_aside(to_device(batch, module, None)) for batch in batches]
        asked = _Asked(Carried(placed, module), [num_queries(batch) for batch in batches], None)
        if self.measurement == "predicted_class":
            self._predict(asked)
        return torch.cat(self._values(module, asked))

    def selection(self, names: Collection[str]) -> Selection:
        """The parameters as the fit selected them: of tied embeddings it may have taken the look-ups alone."""
        alone = [name for name in look_ups(self.stage.store) if name in names]
        whole = [name for name in names if name not in alone]
        return select(self._module, ["word_embeddings", *whole] if alone else whole)

    def _at(
        self,
        at: Checkpoint,
        names: Collection[str],
        asked: _Asked,
        merged: Callable[[Iterator[Gradients]], Gradients],
    ) -> Gradients:
        """Per-query gradients of the measurement at the weights of a checkpoint, those of all batches `merged`."""
        if self.measurement == "predicted_class" and at != self.stage.checkpoints[-1]:
            self._predict(asked)
        capture, trainer = GradientCapture(self.selection(names)), asked.trainer
        hidden = trainer is not None and not trainer.is_global_zero
        bar = tqdm(total=sum(asked.sizes), desc="query gradients", unit="query", delay=2.0, leave=False, disable=hidden)
        with self.stage.at(at) as module, isolated(module, trainer) as manual_losses, bar:
            options = self._loss_options(manual_losses)

            def parts() -> Iterator[Gradients]:
                for batch, size, said in asked:

                    def objective(batch: Any = batch, size: int = size, said: Predictions = said) -> Any:
                        return self._objective(module, batch, size, said, options)

                    yield sample_gradients(module, capture, size, objective, trainer)[0]
                    bar.update(size)

            return merged(parts())

    def _predict(self, asked: _Asked) -> None:
        """Note which classes the fitted model predicts, that of the last checkpoint, unless they are known already."""
        if not all(said.classes for said in asked.predictions):
            with self.stage.at(self.stage.checkpoints[-1]) as module:
                self._values(module, asked)

    def _values(self, module: LightningModule, asked: _Asked) -> list[Tensor]:
        """The measurement of each query, batch by batch, at the weights that a module has now."""
        with isolated(module, asked.trainer) as manual_losses, autocast(asked.trainer):
            options = self._loss_options(manual_losses)
            return [self._objective(module, *each, options).each().detach() for each in asked]

    def _objective(
        self, module: LightningModule, batch: Any, size: int, said: Predictions, options: dict[str, Any]
    ) -> Objective:
        own = callable(self.measurement) or self.measurement == "predicted_class"
        own = own or (self.measurement is None and callable(getattr(module, "measurement", None)))
        try:
            return query_objective(module, batch, size, self.measurement, predictions=said, **options)
        except _UNLABELLED as error:
            if own:
                raise
            raise QueryError(
                f"the training_step of {type(module).__name__} failed on a query: {type(error).__name__}: {error}",
                expected="queries as the training loader brings them, with their labels",
                found=f"a batch of {size} queries, of type {type(batch).__name__}",
                hint="for queries without labels ask with InfluenceModule(..., measurement='predicted_class'), or give "
                "measurement=(module, batch) -> (N,)",
            ) from error

    def _loss_options(self, manual_losses: list[Tensor]) -> dict[str, Any]:
        if self.measurement not in (None, "loss"):
            return {}
        return {
            "per_sample_loss": self.stage.per_sample_loss,
            "reduction": self.stage.reduction,
            "manual_losses": manual_losses,
        }

    @property
    def _module(self) -> LightningModule:
        assert self.stage.module is not None
        return self.stage.module


def _summed(parts: Iterator[Gradients]) -> Gradients:
    """The sum over all queries of all batches, as blocks of one."""
    total: dict[str, GradientBlock] = {}
    for part in parts:
        for name, block in part.items():
            total[name] = total[name].plus(block.summed()) if name in total else block.summed()
    return total
